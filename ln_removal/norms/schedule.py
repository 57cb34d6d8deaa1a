"""When each site freezes: a recipe's few numbers expanded into events, for any depth. Pure Python, no torch.

Steps are optimizer steps counted from 0. An event's value holds from before the forward pass of its step: the loop
writes `freeze_values(step)` into the mixes, then trains step `step`. A taper of n puts n intermediate values between
0 and 1; the value is (step - event.step + 1) / (n + 1), so with n = 0 the change is abrupt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ln_removal.errors import UserError
from ln_removal.models.layout import SITE_KINDS, SPECIALS, Site, all_sites

if TYPE_CHECKING:
    from ln_removal.config.recipe import ScheduleSpec

Action = Literal["freeze", "drop_special", "lift_cap"]

CAP = "cap"
"""Name of the event in which the bound of what the norms give is lifted."""

_ACTIONS: dict[str, Action] = {**dict.fromkeys(SPECIALS, "drop_special"), CAP: "lift_cap"}
"""What happens to everything that is no site."""

_SHADES = ".-+=#"


@dataclass(frozen=True)
class Event:
    """From `step` on one site freezes, one special constant is dropped (`site` is "eot" or "first"), or the cap is lifted ("cap")."""

    step: int
    site: str
    action: Action
    taper: int = 0

    @property
    def complete_at(self) -> int:
        """The first step at which the value is 1."""
        return self.step + self.taper

    def value(self, step: int) -> float:
        """The mix, or the dropped share, during optimizer step `step`: in [0, 1], never falling."""
        if step < self.step:
            return 0.0
        return min(1.0, (step - self.step + 1) / (self.taper + 1))


@dataclass(frozen=True)
class Change:
    """A value that differs from the one of the step before."""

    site: str
    action: Action
    value: float


@dataclass(frozen=True)
class RemovalSchedule:
    """The events of one removal, sorted by step and, within a step, in the order of removal.

    Attributes:
        events: one freeze for each site of the model, one drop for each special constant, and with a cap one that lifts it.
        n_layer: layers of the model.
        steps: optimizer steps of the whole run, recovery included.
        cap: of `NormSites.set_cap`, until it is lifted; None for norms without one.
    """

    events: tuple[Event, ...]
    n_layer: int
    steps: int
    cap: float | None = None
    _order: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [*map(str, all_sites(self.n_layer)), *SPECIALS, *([CAP] if self.cap is not None else [])]
        order = {name: place for place, name in enumerate(names)}
        events = sorted(self.events, key=lambda event: (event.step, order.get(event.site, len(order))))
        object.__setattr__(self, "_order", order)
        object.__setattr__(self, "events", tuple(events))

    @property
    def complete_at(self) -> int:
        """The first step at which everything is frozen, both special constants are gone and there is no cap."""
        return max(event.complete_at for event in self.events)

    @property
    def recovery_steps(self) -> int:
        """Steps trained with everything constant: what the model has to recover."""
        return self.steps - self.complete_at

    def freeze_values(self, step: int) -> dict[str, float]:
        """The mix of every site during a step: 0 is LayerNorm, 1 is constant."""
        return {event.site: event.value(step) for event in self.events if event.action == "freeze"}

    def special_values(self, step: int) -> dict[str, float]:
        """The dropped share of "eot" and "first" during a step: 0 keeps the special constant, 1 is the ordinary one."""
        return {event.site: event.value(step) for event in self.events if event.action == "drop_special"}

    def changes(self, step: int) -> list[Change]:
        """What differs from the step before, in order of removal; at step 0 everything that is not zero."""
        found: list[Change] = []
        for event in self.events:
            value = event.value(step)
            if value != (event.value(step - 1) if step > 0 else 0.0):
                found.append(Change(event.site, event.action, value))
        return found

    def stage(self, step: int) -> str:
        """A label for the progress bar: "real", "ln_2 3/12", "ln_1_qk 1/12", "ln_f", "special", "cap" or "recovery".

        The counts are those of the latest kind of which a site has begun to freeze. "freezing 35 %" where all sites begin together.
        """
        if step > self.complete_at:
            return "recovery"
        freezes = [event for event in self.events if event.action == "freeze"]
        begun = Counter(_kind(event) for event in freezes if event.step <= step)
        if not begun:
            return "real"
        share = sum(event.value(step) for event in freezes) / len(freezes)
        if share == 1 and any(event.value(step) for event in self.events if event.action == "lift_cap"):
            return CAP
        if share == 1 and any(self.special_values(step).values()):
            return "special"
        if share < 1 and freezes[0].step == freezes[-1].step:
            return f"freezing {int(100 * share)} %"
        latest = max(begun, key=SITE_KINDS.index)
        return latest if latest == "ln_f" else f"{latest} {begun[latest]}/{self.n_layer}"

    def to_json(self, tokens_per_step: int | None = None) -> list[dict[str, object]]:
        """One dictionary an event: site, step, action, taper, and with tokens_per_step the tokens seen before it."""
        rows: list[dict[str, object]] = []
        for event in self.events:
            row: dict[str, object] = {
                "site": event.site,
                "step": event.step,
                "action": event.action,
                "taper": event.taper,
            }
            if tokens_per_step is not None:
                row["tokens"] = event.step * tokens_per_step
            rows.append(row)
        return rows

    def table(self) -> list[list[str]]:
        """Rows of text, the header first: one row a layer with the step of each of its sites, then ln_f, eot, first.

        A tapered event reads "20-28": the first step with a mix above 0 and the first one with mix 1.
        """
        spans = {event.site: _span(event) for event in self.events}
        layered = SITE_KINDS[:-1]
        rows = [["layer", *layered]]
        for layer in range(self.n_layer):
            rows.append([str(layer), *(spans.get(str(Site(kind, layer)), "-") for kind in layered)])
        last = ("ln_f", *SPECIALS, *([CAP] if self.cap is not None else []))
        rows += [[name, spans.get(name, "-"), "", ""] for name in last]
        return rows

    def timeline(self, width: int = 80) -> str:
        """A picture of the run: one line a kind of site, a column for each few steps.

        "." is LayerNorm (for a special constant: kept), "#" constant (dropped), "-", "+" and "=" lie between.

        Args:
            width: characters of a line, at least 30.
        """
        labels = [*SITE_KINDS, *SPECIALS, *([CAP] if self.cap is not None else [])]
        margin = max(map(len, labels)) + 2
        columns = max(width, 30) - margin
        lines = []
        for label in labels:
            group = [event for event in self.events if _kind(event) == label]
            shades = []
            for column in range(columns):
                step = column * self.steps // columns
                mean = sum(event.value(step) for event in group) / len(group) if group else 0.0
                shades.append(_shade(mean))
            lines.append(label.ljust(margin) + "".join(shades))
        ends = f"0{str(self.steps).rjust(columns - 1)}"
        return "\n".join([*lines, "step".ljust(margin) + ends])

    def validate(self) -> None:
        """Check that the schedule can be carried out within its run.

        Raises:
            UserError: all faults at once, one a line: sites missing, unknown or twice, events before step 1 or after
                the last step, special constants dropped before every site has begun to freeze.
        """
        faults = self._membership_faults() + self._time_faults()
        if faults:
            count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
            lines = "\n".join(f"  {fault}" for fault in faults)
            raise UserError(f"the schedule for {self.n_layer} layers in {self.steps} steps has {count}:\n{lines}")

    def _membership_faults(self) -> list[str]:
        """Every site and every special constant must have exactly one event, of the right action."""
        faults: list[str] = []
        counts = Counter(event.site for event in self.events)
        unknown = [site for site in counts if site not in self._order]
        missing = [site for site in self._order if site not in counts]
        repeated = [site for site, count in counts.items() if count > 1]
        wrong = [event.site for event in self.events if event.action != _ACTIONS.get(event.site, "freeze")]
        if unknown:
            faults.append(f"{_listed(unknown)}: not in a model of {self.n_layer} layers; remove")
        if missing:
            faults.append(f"{_listed(missing)}: missing; add an event for each")
        if repeated:
            faults.append(f"{_listed(repeated)}: more than one event; keep one")
        if wrong:
            faults.append(
                f"{_listed(wrong)}: wrong action; sites freeze, only {' and '.join(SPECIALS)} are dropped, only a cap is lifted"
            )
        return faults

    def _time_faults(self) -> list[str]:
        """Events must lie inside the run, after its first step, and in an order that makes sense."""
        faults: list[str] = []
        negative = [event.site for event in self.events if event.taper < 0]
        if negative:
            faults.append(f"{_listed(negative)}: taper below 0; use 0 for an abrupt change")
        early = [event.site for event in self.events if event.step < 1]
        if early:
            first = min(event.step for event in self.events)
            faults.append(f"{_listed(early)}: at step {first}, before any statistics; start at step 1 or later")
        late = [event for event in self.events if event.complete_at > self.steps - 1]
        if late:
            names = _listed([event.site for event in late])
            faults.append(
                f"{names}: not complete by the last step ({self.steps - 1}), the last one at {self.complete_at}; "
                f"train at least {self.complete_at + 1} steps, or lower gaps and tapers"
            )
        freezes = [event for event in self.events if event.action == "freeze"]
        last = max(freezes, key=lambda event: event.step, default=None)
        hasty = [e.site for e in self.events if last and e.action == "drop_special" and e.step < last.step]
        if hasty and last:
            faults.append(f"{_listed(hasty)}: dropped before {last.site} freezes (step {last.step}); drop them later")
        return faults


def expand(spec: ScheduleSpec, n_layer: int, steps: int) -> RemovalSchedule:
    """Expand a recipe's [schedule] for a model of n_layer layers and a run of `steps` optimizer steps.

    ln_2.i freezes at ln_2_start + i * ln_2_gap. The queries' and keys' sites start where the last ln_2 gap ends, at
    ln_2_start + n_layer * ln_2_gap; the values' sites, then ln_f, follow in the same way, unless the recipe gives their
    starts. The end-of-text constant is dropped eot_after steps after ln_f, that of position 0 first_after steps after
    that. A cap begins to rise cap_after steps after everything is constant. Order and chaining: Heimersheim 2024 (arXiv
    2409.13710), Baroni et al. 2025 (arXiv 2507.02559); tapers and cap are ours.

    Raises:
        UserError: the schedule does not fit the run (see `RemovalSchedule.validate`).
    """
    qk_start = spec.ln_2_start + n_layer * spec.ln_2_gap if spec.qk_start is None else spec.qk_start
    v_start = qk_start + n_layer * spec.qk_gap if spec.v_start is None else spec.v_start
    ln_f_at = v_start + n_layer * spec.v_gap if spec.ln_f_at is None else spec.ln_f_at
    begins = {
        "ln_2": (spec.ln_2_start, spec.ln_2_gap),
        "ln_1_qk": (qk_start, spec.qk_gap),
        "ln_1_v": (v_start, spec.v_gap),
    }
    events: list[Event] = []
    for site in all_sites(n_layer):
        if site.layer is None:
            step = ln_f_at
        else:
            start, gap = begins[site.kind]
            step = start + site.layer * gap
        events.append(Event(step, str(site), "freeze", spec.taper))
    eot_at = ln_f_at + spec.eot_after
    events.append(Event(eot_at, "eot", "drop_special", spec.special_taper))
    events.append(Event(eot_at + spec.first_after, "first", "drop_special", spec.special_taper))
    if spec.cap is not None:
        constant_at = max(event.complete_at for event in events)
        events.append(Event(constant_at + spec.cap_after, CAP, "lift_cap", spec.cap_taper))
    schedule = RemovalSchedule(tuple(events), n_layer, steps, spec.cap)
    schedule.validate()
    return schedule


def _kind(event: Event) -> str:
    """ "ln_2" of "ln_2.7"; names without a layer stay as they are."""
    return event.site.partition(".")[0]


def _span(event: Event) -> str:
    return str(event.step) if event.taper == 0 else f"{event.step}-{event.complete_at}"


def _shade(mean: float) -> str:
    """A character for a mean value: the outer two stand for exactly 0 and exactly 1."""
    if mean <= 0.0 or mean >= 1.0:
        return _SHADES[0] if mean <= 0.0 else _SHADES[-1]
    return _SHADES[1 + min(2, int(mean * 3))]


def _listed(names: list[str]) -> str:
    """All of a few names, or the ends of a long list."""
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)} in all)"
