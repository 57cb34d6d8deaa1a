"""The table of a sweep: the perplexity of every arm and its change against the baseline, with the spread over seeds.

Perplexity is exp(cross-entropy) on the whole validation split, with the cross-entropy in nats per token. The perplexity of
an arm is the mean over its finished seeds. The change is

    100 (perplexity of the arm / perplexity of the baseline - 1)      [%]

averaged over the seeds that both the arm and the baseline have finished. It is paired by seed, so an effect that a seed has
on both of them cancels. The spread of either is the standard error of the mean, s / sqrt(n) with the standard deviation s (with
n - 1) of n seeds; for two seeds that is half their range. A run that diverged has no perplexity and is in neither mean.

What was seen while a run trained comes from its metrics: the perplexity of the last evaluation and of the best one, which is what a
checkpoint selected by validation loss would have (both on the tokens that the recipe evaluates while it trains), the mean attention
entropy and the share of heads in the overload band at the last observation, and the largest norm that the residual stream had in
any observation.
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
from ln_removal.files.metrics_log import METRICS_FILE, last_logged, metrics_rows, rows_of_run
from ln_removal.report.tables import as_it_is, markdown_table, text_table

if TYPE_CHECKING:
    from rich.console import Console

RESULT_FILE = "result.json"
"""In the directory of every run of the sweep that is finished or has diverged."""

LARGEST_CROSS_ENTROPY = 700.0
"""In nats per token. Above it exp() is larger than any float."""

TABLE_JSON = "table.json"
TABLE_MARKDOWN = "table.md"


class SeenInTraining(BaseModel):
    """What the metrics of a run hold about its training; None where it was not evaluated or not observed.

    Attributes:
        last, best: cross-entropy of the last evaluation and of the lowest, nats per token, on the same tokens.
        best_step: the number of steps before the best one.
        entropy: of the attention at the last observation, nats, mean over the heads; None where a layer has only NaN.
        overloaded: share of heads whose attention entropy was in the overload band then.
        largest_norm: of the residual stream, the mean over positions of its L2 norm at the place and step where it is largest.
        tokens_per_second: of the last session, without its first step, which may compile, and without evaluations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    last: float | None = None
    best: float | None = None
    best_step: int | None = None
    entropy: float | None = None
    overloaded: float | None = None
    largest_norm: float | None = None
    tokens_per_second: float | None = None


def seen_in_training(run: Path) -> SeenInTraining:
    """Read what the metrics of a run say; a run that diverged has the observations that it took back."""
    from ln_removal.interpret.entropies import observed
    from ln_removal.interpret.observations import read_observations

    evaluations = [
        (row["cross_entropy"], row["step"])
        for row in metrics_rows(run / METRICS_FILE)
        if row["kind"] == "evaluation" and row.get("cross_entropy") is not None
    ]
    best, best_step = min(evaluations, default=(None, None))
    entropy = overloaded = largest_norm = None
    if rows_of_run(run):
        (observations,) = read_observations([run])
        heads = observed(observations, None)
        overloaded = float(heads.overloaded.mean())
        entropy = heads.mean if math.isfinite(heads.mean) else None
        largest_norm = max(filter(math.isfinite, observations.residual_norm.ravel().tolist()), default=None)
    return SeenInTraining(
        last=evaluations[-1][0] if evaluations else None,
        best=best,
        best_step=best_step,
        entropy=entropy,
        overloaded=overloaded,
        largest_norm=largest_norm,
        tokens_per_second=last_logged(run / METRICS_FILE).get("tokens_per_second"),
    )


class RunResult(BaseModel):
    """What is kept of a run that is finished or has diverged.

    Attributes:
        cross_entropy: on the validation split, nats per token; None for a run that diverged.
        seconds: of training, without evaluations and checkpoints.
        tokens_sha256: of the tokens that it was trained and scored on, see `sweep.fingerprint`.
        message: why it diverged.
        seen: what was seen while it trained; empty in results of older versions.
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
    seen: SeenInTraining = SeenInTraining()

    @property
    def perplexity(self) -> float | None:
        """None for a run that diverged."""
        return None if self.cross_entropy is None else math.exp(self.cross_entropy)

    @property
    def tokens_per_second(self) -> float:
        """Speed of the training, without compiling where the metrics say so; 0 where nothing was timed."""
        if self.seen.tokens_per_second is not None:
            return self.seen.tokens_per_second
        return self.tokens / self.seconds if self.seconds else 0.0


def read_result(directory: Path) -> RunResult | None:
    """The result of a run, or None while it is not over. What an older version did not write is read from the metrics.

    Raises:
        UserError: the file does not hold a result.
    """
    path = directory / RESULT_FILE
    if not path.is_file():
        return None
    try:
        found = RunResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is damaged; remove it, and --resume measures that run again") from error
    whole = "entropy" in found.seen.model_fields_set
    return found if whole else found.model_copy(update={"seen": seen_in_training(directory)})


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
        last_evaluation, best_evaluation: perplexities on the tokens that are evaluated while a run trains.
        entropy, overloaded: of the attention at the end: its mean in nats, and the share of heads in the overload band.
        largest_norm: of the residual stream, over all seeds.
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
    last_evaluation: float | None
    best_evaluation: float | None
    entropy: float | None
    overloaded: float | None
    largest_norm: float | None


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
            "spread": "standard error of the mean over seeds; half the range for two seeds",
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

    def cells_while_training(self) -> list[list[str]]:
        """What was seen while the runs trained, a row for each arm; no rows where nothing was."""
        rows = []
        for row in self.rows:
            figures = (row.last_evaluation, row.best_evaluation, row.entropy, row.overloaded, row.largest_norm)
            if any(figure is not None for figure in figures):
                last, best, entropy, overloaded, norm = figures
                share = None if overloaded is None else 100 * overloaded
                steps = sorted({str(step) for step in self._best_steps(row.name)}, key=int)
                at = f" (step {' / '.join(steps)})" if steps else ""
                rows.append(
                    [
                        row.name,
                        _number(last, ".3f"),
                        _number(best, ".3f") + at,
                        _number(entropy, ".2f"),
                        _number(share, ".0f", " %"),
                        _number(norm, ".4g"),
                    ]
                )
        return rows

    def _best_steps(self, arm: str) -> list[int]:
        found = [self.results[arm, seed].seen.best_step for seed in self.grid.seeds if (arm, seed) in self.results]
        return [step for step in found if step is not None]

    def notes(self) -> list[str]:
        """What a reader of the table has to know, one line for each note."""
        several = len(self.grid.seeds) > 1
        paired = ", paired by seed" if several else ""
        found = [f"In brackets: change against {self.grid.baseline}{paired}."]
        if several:
            two = " (for two seeds, half the range)" if len(self.grid.seeds) == 2 else ""
            found.append(f"±: standard error of the mean over seeds{two}.")
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

_WHILE_TRAINING = [
    "last evaluation",
    "best evaluation",
    "attention entropy (nats)",
    "heads overloaded",
    "largest stream norm",
]


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
        seen = [results[arm.name, seed].seen for seed in grid.seeds if (arm.name, seed) in results]
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
                last_evaluation=_mean(
                    math.exp(one.last) for one in seen if one.last is not None and one.last < LARGEST_CROSS_ENTROPY
                ),
                best_evaluation=_mean(
                    math.exp(one.best) for one in seen if one.best is not None and one.best < LARGEST_CROSS_ENTROPY
                ),
                entropy=_mean(one.entropy for one in seen if one.entropy is not None),
                overloaded=_mean(one.overloaded for one in seen if one.overloaded is not None),
                largest_norm=max((one.largest_norm for one in seen if one.largest_norm is not None), default=None),
            )
        )
    return SweepTable(grid, tuple(rows), results)


def spread_over_seeds(values: Sequence[float]) -> float | None:
    """The standard error of the mean, s / sqrt(n); half the range of two values, None for fewer than two."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


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
    if rows := table.cells_while_training():
        parts.append(markdown_table(["while training", *_WHILE_TRAINING], rows))
    parts += table.notes()
    return "\n\n".join(parts) + "\n"


def render_table(table: SweepTable, console: Console) -> None:
    """Print the table, the perplexities by seed and the notes."""
    console.print(text_table(f"{table.grid.name}: validation perplexity", ["", *table.header()[1:]], table.cells()))
    if len(table.grid.seeds) > 1:
        seeds = [f"seed {seed}" for seed in table.grid.seeds]
        console.print(text_table("By seed", ["", *seeds], table.cells_by_seed()))
    if rows := table.cells_while_training():
        console.print(text_table("While training", ["", *_WHILE_TRAINING], rows))
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


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _spread(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
