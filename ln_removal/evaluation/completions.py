"""A completion test for models of Python: HellaSwag's format, built from modules that the model was never trained on.

A question shows consecutive lines of a real module and offers four continuations: the next one to three lines, and
three runs of lines from other modules. These begin at the same indentation, have the same number of lines if such runs
exist, and differ by at most 15 % in length, so neither length nor layout gives the answer away. At least half of the names
in the right ending occur in the context, so that it can be foreseen.

Questions depend on the modules and the seed alone: same modules, same questions. Score them with the protocol `code`.
"""

from __future__ import annotations

import keyword
import re
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

from ln_removal.errors import UserError
from ln_removal.evaluation.questions import ENDINGS, Question

DEFAULT_COUNT = 2000
CONTEXT_BYTES = (400, 700)
ENDING_BYTES = (40, 160)
ENDING_LINES = 3
LENGTH_TOLERANCE = 0.15

STRIDE_BYTES = 240
"""Distance between two questions of a module. Their contexts may overlap; their right endings do not."""

KNOWN_NAMES = 0.5
"""Share of the right ending's names that must occur in the context. Without this rule, a quarter of the questions are guesses."""

LONG_LINE = 20  # characters from which a line that stands in several places counts as boilerplate
COMMON_LINE = 3  # places
LEAST_LETTERS = 12  # in an ending: shorter ones are brackets and `pass`, right in too many places


@dataclass(frozen=True, slots=True)
class _Run:
    """One to three consecutive lines that can serve as an ending."""

    module: int
    text: str
    size: int


@dataclass(frozen=True, slots=True)
class _Module:
    name: str
    lines: list[str]
    sizes: list[int]  # UTF-8 bytes, line break included


@dataclass
class _Pool:
    """Runs by indentation and number of lines, ordered by size, so that the runs of a range of sizes are a slice."""

    runs: dict[tuple[str, int], list[_Run]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def add(self, indent: str, count: int, run: _Run) -> None:
        self.runs[indent, count].append(run)

    def order(self) -> None:
        for key, runs in self.runs.items():
            runs.sort(key=lambda run: (run.size, run.text, run.module))
            self.sizes[key] = [run.size for run in runs]

    def draw(self, random: Random, indent: str, count: int, size: int, fits: Callable[[_Run], bool]) -> _Run | None:
        """A run of about `size` bytes that fits, with `count` lines if there is one, else with another number of lines."""
        room = int(size * LENGTH_TOLERANCE)
        for lines in (count, *(other for other in range(1, ENDING_LINES + 1) if other != count)):
            sizes = self.sizes.get((indent, lines), [])
            low, high = bisect_left(sizes, size - room), bisect_right(sizes, size + room)
            if low == high:
                continue
            # The search goes once around the slice from a drawn place, so every run is tried and the search ends.
            start = _below(random, high - low)
            for step in range(high - low):
                run = self.runs[indent, lines][low + (start + step) % (high - low)]
                if fits(run):
                    return run
        return None


def build_completions(
    modules: Iterable[tuple[str, str]], *, count: int = DEFAULT_COUNT, seed: int = 0
) -> list[Question]:
    """Build completion questions from source texts.

    Args:
        modules: (name, text) of modules that no model under test was trained on, in any order.
        count: how many questions; there may be fewer when the modules are small.

    Returns:
        Questions in random order, so that the first n are a fair sample of all; `activity_label` is the module's name,
        `ctx` ends with a line break, an ending is whole lines with their indentation and without the last line break.

    Raises:
        UserError: the modules are too few or too small for a single question.
    """
    parsed = [_parse(name, text) for name, text in sorted(modules)]
    common = Counter(line.strip() for module in parsed for line in set(module.lines) if len(line.strip()) >= LONG_LINE)
    repeated = {line for line, places in common.items() if places >= COMMON_LINE}
    pool = _pool(parsed, repeated)
    random = Random(seed)
    found: list[Question] = []
    right_endings: set[str] = set()
    for number, module in enumerate(parsed):
        travelled = STRIDE_BYTES
        used = 0  # lines before this one are taken by an earlier right ending
        for at, line in enumerate(module.lines):
            if travelled >= STRIDE_BYTES and at >= used and line.strip():
                made = _question(module, number, at, random, pool, repeated)
                if made is not None and (text := made.endings[made.label]).strip() not in right_endings:
                    right_endings.add(text.strip())
                    found.append(made)
                    travelled, used = 0, at + text.count("\n") + 1
            travelled += module.sizes[at]
    if not found:
        raise UserError(
            f"no completion question can be built from {len(parsed)} modules with "
            f"{sum(len(module.lines) for module in parsed)} lines; give more source, or questions with --data FILE"
        )
    shuffled = sorted(found, key=lambda _: random.random())
    return [replace(question, ind=ind) for ind, question in enumerate(shuffled[:count])]


def _question(
    module: _Module, number: int, at: int, random: Random, pool: _Pool, repeated: set[str]
) -> Question | None:
    """A question whose right ending begins at line `at`, or None where none can be made."""
    start = _context_start(module, at, CONTEXT_BYTES[0] + _below(random, CONTEXT_BYTES[1] - CONTEXT_BYTES[0] + 1))
    if start is None or _is_dull(module.lines[start:at], repeated):
        return None
    context = "".join(line + "\n" for line in module.lines[start:at])
    runs = [_run(module, number, at, lines, repeated) for lines in range(1, ENDING_LINES + 1)]
    choices = [run for run in runs if run is not None and _is_foreseeable(run.text, context)]
    if not choices:
        return None
    right = choices[_below(random, len(choices))]
    lines = right.text.count("\n") + 1
    taken = {right.text.strip()}
    openings = {_opening(right.text)}
    seen = {line.strip() for line in module.lines[start:at]}

    def fits(run: _Run) -> bool:
        opening = _opening(run.text)
        return (
            run.module != number and run.text.strip() not in taken and opening not in openings and opening not in seen
        )

    endings: list[str] = []
    for _ in range(ENDINGS - 1):
        run = pool.draw(random, _indent(module.lines[at]), lines, right.size, fits)
        if run is None:
            return None
        endings.append(run.text)
        taken.add(run.text.strip())
        openings.add(_opening(run.text))
    label = _below(random, ENDINGS)
    endings.insert(label, right.text)
    first, second, third, fourth = endings
    return Question(
        ind=0,
        activity_label=module.name,
        ctx_a=context,
        ctx_b="",
        ctx=context,
        endings=(first, second, third, fourth),
        label=label,
        source_id=f"python~{module.name}~{at + 1}",
    )


def _parse(name: str, text: str) -> _Module:
    # splitlines would also break at form feeds, which are no line ends in Python source.
    lines = text.replace("\r\n", "\n").split("\n")
    return _Module(name, lines, [len(line.encode()) + 1 for line in lines])


def _pool(modules: list[_Module], repeated: set[str]) -> _Pool:
    pool = _Pool()
    for number, module in enumerate(modules):
        for at, line in enumerate(module.lines):
            for lines in range(1, ENDING_LINES + 1):
                if (run := _run(module, number, at, lines, repeated)) is not None:
                    pool.add(_indent(line), lines, run)
    pool.order()
    return pool


def _run(module: _Module, number: int, at: int, lines: int, repeated: set[str]) -> _Run | None:
    """The `lines` lines from `at`, if they can serve as an ending."""
    chosen = module.lines[at : at + lines]
    size = sum(module.sizes[at : at + lines]) - 1
    if len(chosen) < lines or not ENDING_BYTES[0] <= size <= ENDING_BYTES[1]:
        return None
    if any(not line.strip() or _is_data(line) or line.strip() in repeated for line in chosen):
        return None
    text = "\n".join(chosen)
    return _Run(number, text, size) if sum(map(str.isalpha, text)) >= LEAST_LETTERS else None


def _context_start(module: _Module, at: int, target: int) -> int | None:
    """First line of the longest run of whole lines before `at` within `target` bytes; None when it is too short."""
    start, size = at, 0
    while start > 0 and size + module.sizes[start - 1] <= target:
        start -= 1
        size += module.sizes[start]
    while start < at and not module.lines[start].strip():
        size -= module.sizes[start]
        start += 1
    return start if size >= CONTEXT_BYTES[0] else None


def _is_dull(lines: list[str], repeated: set[str]) -> bool:
    """Whether a context is a table, a comment block such as a licence, or text that stands in many places."""
    filled = [line.strip() for line in lines if line.strip()]
    data = sum(_is_data(line) for line in filled)
    comments = sum(line.startswith("#") for line in filled)
    copied = sum(line in repeated for line in filled)
    return max(data * 3, comments * 2, copied * 4) > len(filled)


_NAME = re.compile(r"[A-Za-z_]\w{2,}")


def _is_foreseeable(ending: str, context: str) -> bool:
    """Whether at least half of the ending's names (three letters or more, no keywords) stand in the context."""
    names = set(_NAME.findall(ending)).difference(keyword.kwlist)
    return bool(names) and len(names.intersection(_NAME.findall(context))) >= KNOWN_NAMES * len(names)


_DATA_LINE = re.compile(r"""^[\[({]*\s*(?:[\d'"+-]|[bru]['"]).*[,\])}]$""")


def _is_data(line: str) -> bool:
    """Whether a line looks like a row of a table: literals up to a comma or bracket, or more digits than letters."""
    text = line.strip()
    return bool(_DATA_LINE.match(text)) or sum(map(str.isdigit, text)) > sum(map(str.isalpha, text))


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _opening(text: str) -> str:
    return text.split("\n", 1)[0].strip()


def _below(random: Random, bound: int) -> int:
    """A draw from range(bound). Python guarantees the sequence of random() in all versions, but not that of randrange()."""
    return int(random.random() * bound)
