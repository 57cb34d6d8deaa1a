"""The dry run of a grid: every arm with its size and its estimates, and the total, without training anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ln_removal.planning import Plan, plan
from ln_removal.pretraining.grid_file import Grid

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class GridPlan:
    """What a grid will be: the plan of one run of each arm, in the order of the file."""

    grid: Grid
    plans: tuple[Plan, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of all runs."""
        return self.grid.tokens * len(self.grid.order())

    @property
    def seconds(self) -> float | None:
        """Estimate for all runs; None where only a run can tell."""
        found = [each.seconds for each in self.plans if each.seconds is not None]
        return sum(found) * len(self.grid.seeds) if len(found) == len(self.plans) else None

    @property
    def seconds_elsewhere(self) -> dict[str, float]:
        """The same on one GPU of other kinds, by name."""
        names = self.plans[0].seconds_elsewhere
        return {name: sum(each.seconds_elsewhere[name] for each in self.plans) * len(self.grid.seeds) for name in names}

    def to_json(self) -> dict[str, object]:
        """A dictionary of plain values: what `--grid FILE --dry-run --json` prints."""
        arms = [
            {
                "name": arm.name,
                "recipe": arm.recipe.model_dump(mode="json", exclude={"name", "seed"}),
                "parameters": each.parameters,
                "tokens": each.tokens,
                "steps": each.steps,
                "micro_batch": each.micro_batch,
                "memory_bytes": each.memory.total,
                "seconds": each.seconds,
                "directories": [self.grid.directory_name(arm, seed) for seed in self.grid.seeds],
            }
            for arm, each in zip(self.grid.arms, self.plans, strict=True)
        ]
        return {
            "name": self.grid.name,
            "baseline": self.grid.baseline,
            "seeds": list(self.grid.seeds),
            "arms": arms,
            "runs": len(self.grid.order()),
            "tokens": self.tokens,
            "device": self.plans[0].device,
            "seconds": self.seconds,
            "seconds_elsewhere": self.seconds_elsewhere,
        }


def plan_grid(grid: Grid, *, device: str = "cpu") -> GridPlan:
    """Work out what a grid will be, arm by arm.

    Args:
        grid: the resolved grid.
        device: as of `planning.plan`.

    Raises:
        UserError: as `planning.plan`.
    """
    return GridPlan(grid, tuple(plan(arm.recipe, device=device) for arm in grid.arms))


def render_plan(found: GridPlan, console: Console) -> None:
    """Print the arms as a table, and the total."""
    from rich.table import Table
    from rich.text import Text

    grid = found.grid
    if grid.description:
        console.print(grid.description, markup=False, highlight=False)
    table = Table(
        title=f"grid {grid.name}: {len(grid.arms)} arms, {_count(len(grid.seeds), 'seed')}", title_justify="left"
    )
    table.add_column("arm")
    for name in ("parameters", "tokens", "steps", "context", "memory", "time of a run"):
        table.add_column(name, justify="right")
    table.add_column("directories")
    for arm, each in zip(grid.arms, found.plans, strict=True):
        mark = " (baseline)" if arm.name == grid.baseline else ""
        table.add_row(
            Text(arm.name + mark),
            f"{each.parameters:,}",
            f"{each.tokens:,}",
            f"{each.steps:,}",
            f"{arm.recipe.data.context:,}",
            f"{each.memory.total / 1e9:.1f} GB",
            "measured" if each.seconds is None else _hours(each.seconds),
            f"{arm.slug}-seed{','.join(map(str, grid.seeds))}",
        )
    console.print(table)
    time = "measured when it runs" if found.seconds is None else f"about {_hours(found.seconds)}"
    total = f"all {_count(len(grid.order()), 'run')}: {found.tokens:,} tokens, {time} on {found.plans[0].device}"
    elsewhere = [f"about {_hours(seconds)} on one {name}" for name, seconds in found.seconds_elsewhere.items()]
    for line in (total, *elsewhere):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
