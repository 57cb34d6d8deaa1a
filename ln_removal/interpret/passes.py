"""What looking into several models shares: documents in batches that fit into memory, and one result for each model.

Shape legend: N documents, T tokens in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.models import Documents, Models

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

Array = npt.NDArray[np.float64]

VALUES_IN_A_PASS = 1 << 25
"""About so many numbers of the largest activation are held at once."""

Reader = Callable[[slice, "Tensor"], None]
"""Is called with the rows of a batch and the activation that they have at a hook."""


class Result(Protocol):
    """What an analysis finds in one model."""

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Plain values by name; the seed is that of the intervals."""
        ...


R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class ByModel(Generic[R]):
    """What an analysis finds in every model of a run on the same text.

    Attributes:
        results: by role.
        documents: the text.
        names: what each model was loaded from, by role.
    """

    results: dict[str, R]
    documents: Documents
    names: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """By model, with what was read."""
        return {
            "text": self.documents.to_json(),
            "models": {
                role: {"name": self.names.get(role), **one.to_json(seed=self.documents.seed)}
                for role, one in self.results.items()
            },
        }


def each_model(
    models: Models, documents: Documents, look: Callable[[TransformerBridge], R], what: str, *, progress: bool
) -> ByModel[R]:
    """Look into one model after the other.

    Args:
        look: from a model to its result.
        what: the label of the progress bar.
        progress: show one.
    """
    from tqdm.auto import tqdm

    results = {}
    with tqdm(total=len(models.items()), desc=what, unit="model", disable=not progress) as bar:
        for role, bridge in models.items():
            results[role] = look(bridge)
            bar.update()
    return ByModel(results, documents, dict(models.names))


def passes(
    bridge: TransformerBridge, tokens: Tensor, readers: Mapping[str, Reader], *, numbers: int
) -> Iterator[tuple[slice, Tensor]]:
    """Run a model on a few documents at a time, with its activations shown to `readers`; nothing is kept.

    Args:
        tokens: (N, T) on the model's device.
        readers: by the name of a hook.
        numbers: that the largest activation has for one document; decides how many documents are run at once.

    Yields:
        The rows of a batch and their logits (rows, T, V).
    """
    import torch

    size = max(1, VALUES_IN_A_PASS // numbers)
    for start in range(0, len(tokens), size):
        rows = slice(start, min(start + size, len(tokens)))
        hooks: list[tuple[str | Callable[..., Any], Callable[..., Any]]] = [
            (name, _hook(reader, rows)) for name, reader in readers.items()
        ]
        with torch.no_grad():
            logits = bridge.run_with_hooks(tokens[rows], fwd_hooks=hooks)
        yield rows, logits


def mean_interval(values: Array, *, seed: int) -> Interval:
    """The mean of (N,) values of documents or prompts, which count alike, with its 95 % interval."""
    known = values[np.isfinite(values)]
    if not len(known):
        return Interval(np.nan, np.nan, np.nan)
    (found,) = bootstrap_means(known[None], np.ones(len(known)), seed=seed)
    return found


def _hook(reader: Reader, rows: slice) -> Callable[..., None]:
    def read(activation: Tensor, hook: object) -> None:
        reader(rows, activation)

    return read
