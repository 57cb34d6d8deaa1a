"""The attention entropy of every head of a model, from the observations of its training or measured on some text.

`runs_of` and `heads_of` go from what the user names to runs with their observations, or to models that are measured.

Shape legend: B sequences, T positions, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.interpret.observations import (
    Array,
    Observations,
    find_runs,
    is_run,
    layer_means,
    read_observations,
    runs_below,
)
from ln_removal.models.attention import OVERLOAD_SHARE, largest_entropy

if TYPE_CHECKING:
    import numpy.typing as npt

    from ln_removal.data.tokens import Tokens, TokenSplit

SEQUENCES = 32
"""At most so many sequences are measured."""

LARGEST_CONTEXT = 1024
"""Without --context, the context is that of the models, but at most this."""

TOKENS_IN_A_PASS = 4096


@dataclass(frozen=True)
class HeadEntropies:
    """Attention entropy of each head, mean over sequences and queries.

    Attributes:
        name: of the run or model.
        step: of the run's observation; None for a model that was measured.
        queries: positions in a sequence, T.
        entropy: (L, H), nats; NaN where a head's attention was NaN.
    """

    name: str
    step: int | None
    queries: int
    entropy: Array

    @property
    def title(self) -> str:
        """The name, and below it the step of an observation."""
        return self.name if self.step is None else f"{self.name}\nstep {self.step:,}"

    @property
    def largest(self) -> float:
        """The entropy of a causal head that attends uniformly to all of its keys, nats."""
        return largest_entropy(self.queries)

    @property
    def overloaded(self) -> npt.NDArray[np.bool_]:
        """(L, H): whether the head's entropy is above 0.9 of the largest possible."""
        return np.asarray(self.entropy > OVERLOAD_SHARE * self.largest)

    @property
    def mean(self) -> float:
        """Mean over the layers of the mean over their heads that have a number, nats; NaN where a layer has none."""
        return float(layer_means(self.entropy[None]).mean())

    @property
    def overload_shares(self) -> Array:
        """(L,): share of each layer's heads in the overload band; a NaN head is not in it."""
        return np.asarray(self.overloaded.mean(axis=1), dtype=np.float64)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values in which NaN is null."""
        return {
            "name": self.name,
            "step": self.step,
            "queries": self.queries,
            "largest_entropy": self.largest,
            "entropy": nullable(self.entropy),
            "overload_share": self.overload_shares.tolist(),
            "heads_in_overload_band": int(self.overloaded.sum()),
            "heads": int(self.entropy.size),
        }


def observed(run: Observations, step: int | None) -> HeadEntropies:
    """What a run observed at `step`, or at its last observation.

    Raises:
        UserError: the run was not observed at that step.
    """
    index = run.at(step)
    return HeadEntropies(run.name, int(run.steps[index]), run.queries, run.entropy[index])


def measure(
    models: Sequence[str | Path],
    names: Sequence[str],
    *,
    tokens: str | Path | None,
    text: str | Path | None,
    context: int | None = None,
    sequences: int = SEQUENCES,
    device: str = "cpu",
) -> list[HeadEntropies]:
    """Load each model in turn and measure its heads, all on sequences of the same length.

    Args:
        models: `tiny`, directories or Hub ids.
        names: what the results call them.
        tokens: a directory of prepared tokens, whose validation split is read, or None.
        text: a text file, which each model's own tokenizer encodes, or None.
        context: positions in a sequence. Default: the smallest of the models' contexts, at most LARGEST_CONTEXT.
        sequences: read at most so many, spread evenly over the tokens.

    Raises:
        UserError: a model or the text does not load, the text is too short for one sequence, or another tokenizer made the
            tokens.
    """
    from ln_removal.data.tokens import TokenDataset
    from ln_removal.evaluation.scoring import check_same_tokenizer
    from ln_removal.models.loading import load_config, load_model, load_tokenizer, positions_of

    assert (tokens is None) != (text is None), "either tokens or text"
    positions = {name: positions_of(load_config(name)) for name in models}
    shortest = min(positions, key=lambda name: positions[name])
    if context is not None and context > positions[shortest]:
        raise UserError(
            f"--context {context} is longer than the {positions[shortest]} positions of {shortest}; ask for at most that"
        )
    length = context or min(LARGEST_CONTEXT, positions[shortest])
    data = None if tokens is None else TokenDataset.open(tokens)
    if data is not None:
        for model in models:
            check_same_tokenizer(load_tokenizer(model), str(model), data)
    measured = []
    for model, name in zip(models, names, strict=True):
        loaded = load_model(model, device=device)
        if data is not None:
            batch = _spread(data.split("validation"), length, sequences)
        else:
            assert text is not None
            batch = _encode(loaded.tokenizer, text, length, sequences)
        measured.append(HeadEntropies(name, None, length, _mean_entropy(loaded.model, batch)))
    return measured


def nullable(values: Array) -> Any:
    """Nested lists of an array, with None for values that are not finite, because JSON has no NaN."""
    if values.ndim == 0:
        return float(values) if np.isfinite(values) else None
    return [nullable(row) for row in values]


def _mean_entropy(model: Any, tokens: Tokens) -> Array:
    """(L, H) over all of `tokens` (B, T), a few sequences at a time."""
    import torch

    from ln_removal.models.attention import head_entropy, record_attention

    sequences, length = tokens.shape
    in_a_pass = max(1, TOKENS_IN_A_PASS // length)
    total: Array | None = None
    for start in range(0, sequences, in_a_pass):
        part = torch.from_numpy(tokens[start : start + in_a_pass]).to(model.device)
        with torch.no_grad(), record_attention(model, head_entropy) as heads:
            model.base_model(input_ids=part, use_cache=False)
        entropy: Array = torch.stack(heads).double().cpu().numpy() * len(part)
        total = entropy if total is None else total + entropy
    assert total is not None
    return total / sequences


def _spread(split: TokenSplit, length: int, sequences: int) -> Tokens:
    """At most `sequences` windows of a split, (B, T), spread evenly over it."""
    starts = [(shard, at) for shard, data in enumerate(split.maps) for at in range(0, len(data) - length + 1, length)]
    if not starts:
        raise UserError(
            f"the {split.name} split has {split.tokens} tokens, too few for a sequence of {length}; prepare more text, or ask "
            "for a shorter --context"
        )
    return np.stack([split.read(*starts[index], length) for index in _evenly(len(starts), sequences)])


def _encode(tokenizer: Any, path: str | Path, length: int, sequences: int) -> Tokens:
    """At most `sequences` windows of a text file, (B, T)."""
    from ln_removal.models.loading import quiet_transformers

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot read the text in {path}: {reason}; give a text file in UTF-8") from error
    with quiet_transformers():  # they warn when a text is longer than the context
        ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    count = len(ids) // length
    if not count:
        raise UserError(
            f"{path} has {len(ids)} tokens, too few for a sequence of {length}; give a longer text, or a shorter --context"
        )
    return ids[: count * length].reshape(count, length)[_evenly(count, sequences)]


def _evenly(available: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `available`, or all of them."""
    if available <= wanted:
        return list(range(available))
    return [available * index // wanted for index in range(wanted)]


@dataclass(frozen=True)
class Found:
    """Heads of each model, and the runs that they come from; no runs where models were measured."""

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
        UserError: a source is neither a run nor a model, or a model is given without text; else as `measure` and
            `read_observations`.
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
    """The directory of the figures: --out, else RUN/analysis for a single run, else ./analysis."""
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
