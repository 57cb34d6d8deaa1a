"""The texts of the tasks: Python for the embedded model, English for GPT-2.

Each function draws clean prompt, corrupt twin (None where no single token decides the answer), answer and wrong answer. They
do not know the tokenizer; `tasks.make_task` leaves out what a tokenizer cuts in another way.
"""

from __future__ import annotations

from random import Random

NAMES = (
    "name value result path index items key data text line size count width height start end left right first last node "
    "file args obj other type mode x y a b n i func code string level"
).split()
"""Variables of the Python prompts."""

BRACKETS = {"[": "]", "(": ")"}
QUOTES = ('"', "'")

BRACKET_LINES = (
    "    return {a}{open}{b}",
    "    {a} = {b}{open}{c}",
    "    if {a}{open}{b}",
    "    for {a} in {b}{open}{c}",
    "    {a} = {b}{open}{c}, {d}",
    "    return {a} + {b}{open}{c}",
    "    print({a}, {b}{open}{c}",
    "    assert {a} == {b}{open}{c}",
    "    {a} = self.{b}{open}{c}",
)

REPEATED_LINES = (
    "    {a} = {b}({c}, {slot}",
    "    self.{a} = {b}\n    self.{c} = {slot}",
    "    {a} = {b} + {slot}",
    "    if {a} == {b}:\n        return {slot}",
    "    for {a} in {b}:\n        {c} = {slot}",
    "    {a}.{b}({c}, {slot}",
    "    {a} = {b}\n    {c} = {a} - {slot}",
)
"""A text up to the token that is asked for in its second copy."""

QUOTE_LINES = (
    "    {a} = {quote}{b}",
    "    return {quote}{b}",
    "    if {a} == {quote}{b}",
    "    {a} = {b} + {quote}{c}",
    "    print({a}, {quote}{b}",
    "    self.{a} = {quote}{b}",
)

RETURN_LINES = (
    "def {f}({a}):\n    {x} = []\n    for {i} in {a}:\n        {x}.append({i})\n    return",
    "def {f}({a}):\n    {x} = {a} + 1\n    return",
    "def {f}(self, {a}):\n    {x} = self.{f}({a})\n    if {x} is None:\n        {x} = {a}\n    return",
    "def {f}({a}, {i}):\n    {x} = {{}}\n    {x}[{a}] = {i}\n    return",
)

OPEN_LINES = (
    "    with open({a}) as",
    "    with open({a}, 'r') as",
    '    with open({a}, "rb") as',
    "    with open(self.{a}) as",
    "    {b} = {c}\n    with open({a}) as",
    "def {b}({a}):\n    with open({a}, 'w') as",
)

YEAR_NOUNS = (
    "war siege campaign voyage drought famine reign strike dispute exhibition expedition occupation rebellion trial project"
).split()

PEOPLE = (
    "John Mary Tom James Mark Paul David Peter Robert Michael William George Charles Richard Daniel Anna Sarah Laura Emma Kate "
    "Alice Jane Susan Martin Kevin Simon Adam Jack Henry Lisa"
).split()
"""First names that are one token of GPT-2's tokenizer with a space in front."""

NOUNS = {
    "PLACE": ("garden", "library", "market", "station", "office", "school", "museum", "harbor"),
    "OBJECT": ("book", "letter", "key", "map", "coat", "ticket", "radio", "basket"),
}

IOI_LINES = (
    "Then, [A] and [B] went to the [PLACE]. [B] gave a [OBJECT] to [A]",
    "After [A] and [B] met at the [PLACE], [B] handed a [OBJECT] to [A]",
    "When [A] and [B] came to the [PLACE], [B] passed the [OBJECT] to [A]",
    "While [A] and [B] waited in the [PLACE], [B] offered the [OBJECT] to [A]",
    "Yesterday [A] and [B] worked at the [PLACE]. [B] showed the [OBJECT] to [A]",
    "As [A] and [B] walked to the [PLACE], [B] returned the [OBJECT] to [A]",
    "Because [A] and [B] left the [PLACE] early, [B] lent a [OBJECT] to [A]",
    "Before [A] and [B] closed the [PLACE], [B] brought a [OBJECT] to [A]",
    "Once [A] and [B] were inside the [PLACE], [B] threw a [OBJECT] to [A]",
    "Last week [A] and [B] visited the [PLACE], and [B] sold a [OBJECT] to [A]",
    "The day [A] and [B] found the [PLACE], [B] gave the old [OBJECT] to [A]",
    "In the evening [A] and [B] sat in the [PLACE]. [B] sent a [OBJECT] to [A]",
    "Since [A] and [B] owned the [PLACE], [B] promised the [OBJECT] to [A]",
    "Near the [PLACE], [A] and [B] talked for an hour. [B] then left a [OBJECT] to [A]",
    "At the [PLACE] [A] and [B] looked for a [OBJECT]. [B] found it and gave it to [A]",
)
"""The indirect object [A] comes first; `ioi_templates` adds those in which it comes second."""


def ioi_templates() -> list[str]:
    """15 templates in the order ABBA and the same 15 in the order BABA, for TransformerLens' IOIDataset."""
    swapped = [line.replace("[A]", "[C]", 1).replace("[B]", "[A]", 1).replace("[C]", "[B]", 1) for line in IOI_LINES]
    return [*IOI_LINES, *swapped]


def _names(random: Random, *slots: str) -> dict[str, str]:
    return dict(zip(slots, random.sample(NAMES, len(slots)), strict=True))


def bracket(random: Random) -> tuple[str, str, str, str]:
    """What closes the bracket that is open."""
    line, names = random.choice(BRACKET_LINES), _names(random, *"abcd")
    clean, corrupt = random.sample(sorted(BRACKETS), 2)
    texts = (line.format(open=one, **names) for one in (clean, corrupt))
    return (*texts, BRACKETS[clean], BRACKETS[corrupt])  # type: ignore[return-value]


def repeat(random: Random) -> tuple[str, str, str, str]:
    """The token that followed the same text before. The corrupt twin has another token there, in the first copy."""
    line, names = random.choice(REPEATED_LINES), _names(random, "a", "b", "c", "slot", "other")
    slot, other = names.pop("slot"), names.pop("other")
    end = ")\n" if "(" in line else "\n"
    second = line.format(slot="", **names).rstrip(" ")
    clean, corrupt = (line.format(slot=one, **names) + end + second for one in (slot, other))
    return clean, corrupt, f" {slot}", f" {other}"


def quote(random: Random) -> tuple[str, str, str, str]:
    """What closes the string that is open."""
    line, names = random.choice(QUOTE_LINES), _names(random, *"abc")
    clean, corrupt = random.sample(QUOTES, 2)
    texts = (line.format(quote=one, **names) for one in (clean, corrupt))
    return (*texts, clean, corrupt)  # type: ignore[return-value]


def attribute(random: Random) -> tuple[str, str, str, str]:
    """The argument of the constructor that has the attribute's name."""
    names = _names(random, *"abc")
    one, two = random.sample("abc", 2)
    head = "    def __init__(self, {a}, {b}, {c}):\n        self.".format(**names)
    return f"{head}{names[one]} =", f"{head}{names[two]} =", f" {names[one]}", f" {names[two]}"


def returned(random: Random) -> tuple[str, None, str, str]:
    """The variable that was made in the function, against its argument."""
    names = _names(random, "f", "a", "i", "x")
    return random.choice(RETURN_LINES).format(**names), None, f" {names['x']}", f" {names['a']}"


def opened(random: Random) -> tuple[str, None, str, str]:
    """f, by convention, against the path that was opened."""
    names = _names(random, *"abc")
    return random.choice(OPEN_LINES).format(**names), None, " f", f" {names['a']}"


def greater_than(random: Random) -> tuple[str, str, str, str]:
    """A later year of the same century (Hanna et al. 2023, arXiv 2305.00586), against one before the year that is given.

    The corrupt twin gives the year 01, after which both are possible.
    """
    century, year = random.randint(11, 17), random.randint(4, 97)
    later, earlier = random.randint(year + 1, 99), random.randint(2, year - 1)
    noun = random.choice(YEAR_NOUNS)
    clean, corrupt = (f"The {noun} lasted from the year {century}{one:02d} to the year {century}" for one in (year, 1))
    return clean, corrupt, f"{later:02d}", f"{earlier:02d}"
