"""What `ln-analyze` was asked to look at: runs with their observations, or models that it measures itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ln_removal.analysis.head_entropies import HeadEntropies, measure, observed
from ln_removal.analysis.observations import Observations, find_runs, is_run, read_observations, runs_below
from ln_removal.errors import UserError


@dataclass(frozen=True)
class Found:
    """Heads of each model, and the runs that they come from (none for models that were measured)."""

    heads: list[HeadEntropies]
    runs: list[Observations] = field(default_factory=list)


def heads_of(
    sources: Sequence[str],
    *,
    step: int | None,
    tokens: Path | None,
    text: Path | None,
    context: int | None,
    device: str,
) -> Found:
    """Observed heads of runs, or with `tokens` or `text` measured heads of models and of runs' finished models.

    Raises:
        UserError: a source is neither, a model comes without text to measure it on, or as `measure` and `read_observations`.
    """
    if tokens is not None and text is not None:
        raise UserError("--tokens and --text both say what to measure on; give one of them")
    if tokens is None and text is None:
        if context is not None:
            raise UserError(
                "--context goes with --tokens or --text; a run's observations have the context of its training"
            )
        runs = runs_of(sources)
        return Found([observed(run, step) for run in runs], runs)
    if step is not None:
        raise UserError(
            "--step chooses an observation of a run; leave it out where --tokens or --text measures a model"
        )
    return Found(
        measure(
            [_model_of(source) for source in sources],
            sources,
            tokens=None if tokens is None else str(tokens),
            text=None if text is None else str(text),
            context=context,
            device=device,
        )
    )


def runs_of(sources: Sequence[str]) -> list[Observations]:
    """The observations of runs, or of all runs inside a directory.

    Raises:
        UserError: a source is a model or nothing at all, or a run was not observed.
    """
    for source in sources:
        path = Path(source)
        if not path.is_dir() or ((path / "config.json").is_file() and not is_run(path)):
            found = "is a model, not a run" if path.is_dir() else "is not the directory of a run"
            raise UserError(
                f"{source} {found}; give a run's directory, or measure a model with `ln-analyze entropy {source}` and "
                "--tokens DIR or --text FILE"
            )
    return read_observations(find_runs([Path(source) for source in sources]))


def output_directory(out: Path | None, sources: Sequence[str]) -> Path:
    """Where figures go: --out, or RUN/analysis for a single run, or ./analysis."""
    if out is not None:
        return out
    if len(sources) == 1 and is_run(Path(sources[0])):
        return Path(sources[0]) / "analysis"
    return Path("analysis")


def _model_of(source: str) -> str:
    """The model of a run, or the model that is named."""
    path = Path(source)
    if not path.is_dir() or (path / "config.json").is_file():
        return source
    if is_run(path):
        if not (path / "model").is_dir():
            raise UserError(
                f"{source} is a run without a model yet; leave --tokens and --text out to see its observations"
            )
        return str(path / "model")
    inside = runs_below(path)
    hint = f"; runs inside it: {', '.join(map(str, inside[:4]))}" if inside else ""
    raise UserError(f"{source} is neither a model nor a run (no config.json, no metrics.jsonl){hint}; name one of them")
