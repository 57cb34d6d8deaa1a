"""What was observed during a training: the "observation" rows of a run's metrics.jsonl as arrays.

Shape legend: S observations, L layers, H heads, N slopes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError
from ln_removal.files.metrics_log import METRICS_FILE, rows_of_run

Array = npt.NDArray[np.float64]

_DEPTH = 3
"""How many levels below a named directory a run may be, such as TABLE/ARM/seed-0."""


@dataclass(frozen=True)
class Observations:
    """A run's observations, in the order of their steps. A number that was not finite is NaN.

    Attributes:
        name: as much of the run's path as tells it from the other runs.
        directory: of the run.
        queries: positions in the probe sequences; the largest possible entropy follows from it.
        attention_entries: entries of the attention matrices of one layer.
        steps: (S,) optimizer steps, counted from 0; the model was observed before the update of the step.
        entropy: (S, L, H) attention entropy, nats.
        nan_counts: (S, L) entries of a layer's attention that are NaN.
        nonfinite_residual, residual_norm: (S, L + 1), at the input of each block and after the last.
        gradient_norm: (S, L), of the parameters of each block.
        slopes: (S, N); N is 0 for an activation without a learnable slope.
    """

    name: str
    directory: Path
    queries: int
    attention_entries: int
    steps: npt.NDArray[np.int64]
    entropy: Array
    nan_counts: Array
    nonfinite_residual: Array
    residual_norm: Array
    gradient_norm: Array
    slopes: Array

    @property
    def counted(self) -> str:
        """The number of observations, such as "3 observations"."""
        return f"{len(self.steps)} observation{'s' if len(self.steps) > 1 else ''}"

    def at(self, step: int | None) -> int:
        """Index of the observation at `step`, or of the last one.

        Raises:
            UserError: the run was not observed at that step.
        """
        if step is None:
            return len(self.steps) - 1
        found = np.flatnonzero(self.steps == step)
        if not len(found):
            steps = shortened(self.steps.tolist())
            raise UserError(f"{self.name} was not observed at step {step}; choose one of the steps {steps}")
        return int(found[0])


def find_runs(directories: Sequence[Path]) -> list[Path]:
    """The runs among and below `directories`, in their order. A directory that is no run stands for the runs inside it.

    Raises:
        UserError: a directory does not exist, or is no run and holds none.
    """
    runs: list[Path] = []
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}; give runs of ln-pretrain or ln-remove")
        if is_run(directory):
            runs.append(directory)
            continue
        below = runs_below(directory)
        if not below:
            raise UserError(
                f"{directory} is not a run and holds none (there is no {METRICS_FILE}); give a directory that "
                "ln-pretrain --out or ln-remove --out named"
            )
        runs += below
    return list(dict.fromkeys(runs))


def is_run(directory: Path) -> bool:
    """Whether a training wrote its metrics into the directory."""
    return (directory / METRICS_FILE).is_file()


def runs_below(directory: Path, depth: int = _DEPTH) -> list[Path]:
    """The runs inside a directory that is no run itself, sorted. The control inside a run is not listed."""
    if depth == 0:
        return []
    found: list[Path] = []
    for child in sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found += [child] if is_run(child) else runs_below(child, depth - 1)
    return found


def read_observations(runs: Sequence[Path]) -> list[Observations]:
    """Read several runs. Each is named by as much of the end of its path as tells it from the others.

    Raises:
        UserError: a run has no observations, or they cannot be read.
    """
    return [_read(run, name) for run, name in zip(runs, distinct_names(runs), strict=True)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The end of each path, with as many parts as are needed to tell all paths apart."""
    parts = [path.resolve().parts for path in paths]
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(part[-length:]) for part in parts]
    return names


def shortened(numbers: Sequence[int]) -> str:
    """A list of numbers as text; the middle of a long list is left out."""
    if len(numbers) <= 8:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:5]))} ... {numbers[-1]} ({len(numbers)} in all)"


def _read(run: Path, name: str) -> Observations:
    path = run / METRICS_FILE
    rows = rows_of_run(run)
    if not rows:
        raise UserError(
            f"{run} has no observations; train with --set observation.every=100, or measure its finished model with "
            "`ln-analyze entropy` and --tokens or --text"
        )
    try:
        entropy = _array(rows, "entropy", 3)
        return Observations(
            name=name,
            directory=run,
            queries=int(rows[0]["queries"]),
            attention_entries=int(rows[0]["attention_entries"]),
            steps=np.array([row["step"] for row in rows], dtype=np.int64),
            entropy=entropy,
            nan_counts=_array(rows, "nan_counts", 2),
            nonfinite_residual=_array(rows, "nonfinite_residual", 2),
            residual_norm=_array(rows, "residual_norm", 2),
            gradient_norm=_array(rows, "gradient_norm", 2),
            slopes=_array(rows, "slopes", 2),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: its observations cannot be read ({type(error).__name__}: {error}); they are of another version, or damaged: "
            "train the run again"
        ) from error


def _array(rows: Sequence[dict[str, Any]], key: str, dimensions: int) -> Array:
    found = np.array([row[key] for row in rows], dtype=np.float64)  # null becomes NaN
    if found.ndim != dimensions:
        raise ValueError(f"{key} has {found.ndim - 1} dimensions in a row, not {dimensions - 1}")
    return found


def layer_means(entropy: Array) -> Array:
    """(S, L, H) to (S, L): mean over the heads that have a number; NaN where none has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean over no head is NaN, as it should be
        return np.asarray(np.nanmean(entropy, axis=2), dtype=np.float64)
