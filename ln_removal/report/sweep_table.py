"""The table of a sweep: the perplexity of every arm and its change against the baseline, with the spread over seeds.

Perplexity is exp(cross-entropy) on the whole validation split, with the cross-entropy in nats per token. The perplexity of
an arm is the mean over its finished seeds. The change is

    100 (perplexity of the arm / perplexity of the baseline - 1)      [%]

averaged over the seeds that both the arm and the baseline have finished. It is paired by seed, so an effect that a seed has
on both of them cancels. The spread of either is half the range for two seeds and the standard deviation (with n - 1) for
more. A run that diverged has no perplexity and is in neither mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ln_removal.config.estimate import readable_duration
from ln_removal.config.sweep import Sweep
from ln_removal.errors import UserError
from ln_removal.files.atomic import write_json_atomically
from ln_removal.report.tables import as_it_is, markdown_table, text_table

if TYPE_CHECKING:
    from rich.console import Console

RESULT_FILE = "result.json"
"""In the directory of every run of the sweep that is finished or has diverged."""

TABLE_JSON = "table.json"
TABLE_MARKDOWN = "table.md"


class RunResult(BaseModel):
    """What is kept of a run that is finished or has diverged.

    Attributes:
        cross_entropy: on the validation split, nats per token; None for a run that diverged.
        seconds: of training, without evaluations and checkpoints.
        tokens_sha256: of the tokens that it was trained and scored on, see `sweep.fingerprint`.
        message: why it diverged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arm: str
    seed: int
    status: Literal["finished", "diverged"]
    cross_entropy: float | None = None
    bits_per_byte: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    device: str = ""
    tokens_sha256: str = ""
    message: str = ""

    @property
    def perplexity(self) -> float | None:
        """None for a run that diverged."""
        return None if self.cross_entropy is None else math.exp(self.cross_entropy)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the training; 0 where nothing was timed."""
        return self.tokens / self.seconds if self.seconds else 0.0


def read_result(directory: Path) -> RunResult | None:
    """The result of a run, or None while it is not over.

    Raises:
        UserError: the file does not hold a result.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return None
    try:
        return RunResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged; remove it, and --resume measures that run again") from error


def write_result(directory: Path, result: RunResult) -> None:
    """Write a run's result, whole or not at all. A run with a result is over."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json_atomically(directory / RESULT_FILE, result.model_dump())


@dataclass(frozen=True)
class ArmRow:
    """One arm over all seeds. Every mean is over the seeds that it has finished, and None where there are none.

    Attributes:
        change_percent: against the baseline, paired by seed; None where no seed is finished in both.
        tokens, seconds: of one run.
        perplexities, changes: by seed.
    """

    name: str
    perplexity: float | None
    perplexity_spread: float | None
    change_percent: float | None
    change_percent_spread: float | None
    tokens: int
    seconds: float | None
    tokens_per_second: float | None
    finished: int
    diverged: int
    perplexities: dict[int, float]
    changes: dict[int, float]


@dataclass(frozen=True)
class SweepTable:
    """The results of a sweep so far."""

    grid: Sweep
    rows: tuple[ArmRow, ...]
    results: Mapping[tuple[str, int], RunResult]

    @property
    def runs_over(self) -> int:
        """Runs that are finished or have diverged."""
        return len(self.results)

    @property
    def complete(self) -> bool:
        """Whether every run is over."""
        return self.runs_over == len(self.grid.order())

    def to_json(self) -> dict[str, object]:
        """A dictionary of plain values: what table.json holds and --json prints."""
        arms = []
        for arm, row in zip(self.grid.arms, self.rows, strict=True):
            figures = asdict(row)
            perplexities, changes = figures.pop("perplexities"), figures.pop("changes")
            figures["runs"] = [
                self._run_json(arm.name, seed, perplexities.get(seed), changes.get(seed))
                | {"directory": self.grid.directory_name(arm, seed)}
                for seed in self.grid.seeds
            ]
            arms.append(figures)
        return {
            "name": self.grid.name,
            "description": self.grid.description,
            "baseline": self.grid.baseline,
            "context": self.grid.arms[0].recipe.data.context,
            "seeds": list(self.grid.seeds),
            "complete": self.complete,
            "spread": "half the range for two seeds, standard deviation for more",
            "arms": arms,
        }

    def _run_json(self, arm: str, seed: int, perplexity: float | None, change: float | None) -> dict[str, object]:
        result = self.results.get((arm, seed))
        if result is None:
            return {"seed": seed, "status": "unfinished"}
        figures = {"perplexity": perplexity, "change_percent": change, "tokens_per_second": result.tokens_per_second}
        return result.model_dump(exclude={"arm"}) | figures

    def header(self) -> list[str]:
        """The names of the table's columns."""
        return ["arm", f"perplexity, T={self.grid.arms[0].recipe.data.context}", *_FURTHER]

    def cells(self) -> list[list[str]]:
        """The cells of the table as text, a row for each arm."""
        return [
            [
                row.name,
                self._figure(row),
                _spread(row.perplexity_spread, ".3f"),
                "" if row.name == self.grid.baseline else _spread(row.change_percent_spread, ".2f", " %"),
                self._seeds(row),
                f"{row.tokens:,}",
                "" if row.seconds is None else readable_duration(row.seconds),
                "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
            ]
            for row in self.rows
        ]

    def cells_by_seed(self) -> list[list[str]]:
        """Perplexity and change of every run, a row for each arm."""
        return [[row.name, *(self._run_figure(row, seed) for seed in self.grid.seeds)] for row in self.rows]

    def notes(self) -> list[str]:
        """What a reader of the table has to know, one line for each note."""
        several = len(self.grid.seeds) > 1
        paired = ", paired by seed" if several else ""
        found = [f"In brackets: change against {self.grid.baseline}{paired}."]
        if several:
            kind = "half the range" if len(self.grid.seeds) == 2 else "standard deviation"
            found.append(
                f"±: {kind} over seeds." + ("" if len(self.grid.seeds) == 2 else " (Two seeds: half the range.)")
            )
        if not self.complete:
            found.append(f"Unfinished: {self.runs_over} of {len(self.grid.order())} runs are over.")
        for result in self.results.values():
            if result.status == "diverged":
                found.append(f"{result.arm}, seed {result.seed}, diverged: {result.message.partition(';')[0]}.")
        return found

    def _figure(self, row: ArmRow) -> str:
        if row.perplexity is None:
            return "diverged" if row.diverged == len(self.grid.seeds) else "-"
        return _with_change(row.perplexity, None if row.name == self.grid.baseline else row.change_percent)

    def _run_figure(self, row: ArmRow, seed: int) -> str:
        if seed in row.perplexities:
            return _with_change(
                row.perplexities[seed], None if row.name == self.grid.baseline else row.changes.get(seed)
            )
        return "diverged" if (row.name, seed) in self.results else "-"

    def _seeds(self, row: ArmRow) -> str:
        of = len(self.grid.seeds)
        text = str(of) if row.finished == of else f"{row.finished} of {of}"
        return text + (f", {row.diverged} diverged" if row.diverged else "")


_FURTHER = ["±", "± of change", "seeds", "tokens", "time", "tokens/s"]


def build_table(grid: Sweep, results: Mapping[tuple[str, int], RunResult]) -> SweepTable:
    """Put the results of a sweep's runs together: a row for each arm.

    Args:
        results: of the runs that are over, by (arm name, seed).
    """
    results = {(arm.name, seed): results[arm.name, seed] for arm, seed in grid.order() if (arm.name, seed) in results}
    perplexities = {arm.name: _perplexities(arm.name, grid.seeds, results) for arm in grid.arms}
    baseline = perplexities[grid.baseline]
    rows = []
    for arm in grid.arms:
        own = perplexities[arm.name]
        changes = {seed: 100 * (value / baseline[seed] - 1) for seed, value in own.items() if seed in baseline}
        over = [results[arm.name, seed] for seed in own]
        rows.append(
            ArmRow(
                name=arm.name,
                perplexity=_mean(own.values()),
                perplexity_spread=spread_over_seeds(list(own.values())),
                change_percent=_mean(changes.values()),
                change_percent_spread=spread_over_seeds(list(changes.values())),
                tokens=grid.tokens,
                seconds=_mean(result.seconds for result in over),
                tokens_per_second=_mean(result.tokens_per_second for result in over),
                finished=len(own),
                diverged=sum(
                    results[arm.name, seed].status == "diverged" for seed in grid.seeds if (arm.name, seed) in results
                ),
                perplexities=own,
                changes=changes,
            )
        )
    return SweepTable(grid, tuple(rows), results)


def spread_over_seeds(values: Sequence[float]) -> float | None:
    """Half the range of two values, or the standard deviation (with n - 1) of more; None for fewer than two."""
    if len(values) < 2:
        return None
    return abs(values[0] - values[1]) / 2 if len(values) == 2 else statistics.stdev(values)


def write_table(table: SweepTable, out: Path) -> None:
    """Write table.json and table.md, each whole or not at all."""
    write_json_atomically(out / TABLE_JSON, table.to_json())
    temporary = out / f".{TABLE_MARKDOWN}.tmp"
    temporary.write_text(to_markdown(table), encoding="utf-8")
    temporary.replace(out / TABLE_MARKDOWN)


def to_markdown(table: SweepTable) -> str:
    """The table in Markdown; below it the perplexities by seed and the notes."""
    parts = [
        f"# {table.grid.name}",
        *filter(None, [table.grid.description]),
        markdown_table(table.header(), table.cells()),
    ]
    if len(table.grid.seeds) > 1:
        parts.append(markdown_table(["arm", *(f"seed {seed}" for seed in table.grid.seeds)], table.cells_by_seed()))
    parts += table.notes()
    return "\n\n".join(parts) + "\n"


def render_table(table: SweepTable, console: Console) -> None:
    """Print the table, the perplexities by seed and the notes."""
    console.print(text_table(f"{table.grid.name}: validation perplexity", ["", *table.header()[1:]], table.cells()))
    if len(table.grid.seeds) > 1:
        seeds = [f"seed {seed}" for seed in table.grid.seeds]
        console.print(text_table("By seed", ["", *seeds], table.cells_by_seed()))
    for note in table.notes():
        console.print(as_it_is(note), soft_wrap=True)


def _perplexities(arm: str, seeds: Sequence[int], results: Mapping[tuple[str, int], RunResult]) -> dict[int, float]:
    found = {seed: results[arm, seed].perplexity for seed in seeds if (arm, seed) in results}
    return {seed: value for seed, value in found.items() if value is not None}


def _mean(values: Any) -> float | None:
    found = list(values)
    return statistics.fmean(found) if found else None


def _with_change(perplexity: float, change: float | None) -> str:
    """ "2.757 (+2.53 %)"."""
    shown = f"{perplexity:.3f}" if perplexity < 1000 else f"{perplexity:.4g}"
    return shown if change is None else f"{shown} ({change:+.2f} %)"


def _spread(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
