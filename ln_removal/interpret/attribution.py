"""Direct effects: what each component adds to a logit by itself, attributed and measured by ablation.

A component writes c into the final residual stream x. Its direct effect on the logit that a direction u of the unembedding
reads can be had in two ways:

    attribution   a = ((c - mean c) / sigma(x) * gamma) u     with a final LayerNorm, whose scale is taken as constant
                  a = c u                                     without norms
    ablation      d = logit(x) - logit(x - c)                 with the real final norm, which sees x - c

(The error is that of "Transformers Don't Need
LayerNorm at Inference Time", Baroni et al., arXiv 2507.02559.) Without norms both are the same number. With LayerNorm,
taking c away also changes the scale of everything else, which an attribution cannot see.

    error = 100 mean |a - d| / mean |d|      per cent, over components of a kind, documents and positions

The direction decides how large the error is, so every figure names it:

    correct      W[:, v] of the right next token v
    centred      W[:, v] minus the mean of W over the vocabulary: what a softmax sees
    difference   W[:, v] minus W[:, r], r being the most likely other token (the runner-up)

Shape legend: C components, N documents, T predicted positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.reading import as_read
from ln_removal.interpret.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

Array = npt.NDArray[np.float64]

Direction = Literal["correct", "difference", "centred"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

K = TypeVar("K", bound=str)

Kind = Literal["head", "mlp", "other"]

KIND_TITLES: dict[str, str] = {"head": "heads", "mlp": "MLPs"}
"""The kinds that are summed up, and what tables call them; "other" are the embeddings and the biases of attention."""

VALUES_IN_A_PASS = 1 << 25
"""About so many numbers are held at once for the components of a batch of documents."""


@dataclass(frozen=True)
class Components:
    """What every component writes into the final residual stream, which is their sum.

    Attributes:
        labels: C names as TransformerLens gives them: "L0H2" (a head), "0_mlp_out", "embed", "pos_embed", "bias".
        written: (C, N, T, D).
        residual: (N, T, D), what the final norm or the unembedding reads.
        logits: (N, T, V).
    """

    labels: list[str]
    written: Tensor
    residual: Tensor
    logits: Tensor

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each component."""
        return [kind_of(label) for label in self.labels]


@dataclass(frozen=True)
class DirectEffects:
    """Direct effects of the components of one model on the logits of one direction, in logits.

    Attributes:
        labels: C names, as in `Components`.
        attribution, ablation: (C, N, T).
    """

    labels: list[str]
    attribution: Array
    ablation: Array

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each component."""
        return [kind_of(label) for label in self.labels]

    def only(self, kind: Kind) -> DirectEffects:
        """The components of a kind."""
        kept = [index for index, one in enumerate(self.kinds) if one == kind]
        return DirectEffects([self.labels[index] for index in kept], self.attribution[kept], self.ablation[kept])

    def error(self, *, seed: int = 0) -> Interval:
        """100 mean |a - d| / mean |d|, per cent, with its 95 % interval over documents."""
        off, size = (np.abs(values).sum(axis=(0, 2)) for values in (self.attribution - self.ablation, self.ablation))
        some = size > 0  # a document on which nothing has an effect says nothing
        if not some.any():
            return Interval(np.nan, np.nan, np.nan)
        (found,) = bootstrap_means(100 * off[None, some], size[some], seed=seed)
        return found

    def sign_flips(self, *, seed: int = 0) -> Interval:
        """Per cent of the effects whose attribution has the other sign than their ablation, with its interval."""
        flipped = (np.sign(self.attribution) * np.sign(self.ablation) < 0).sum(axis=(0, 2))
        count = self.ablation.shape[0] * self.ablation.shape[2]
        (found,) = bootstrap_means(100.0 * flipped[None], np.full(len(flipped), count), seed=seed)
        return found

    def rank_correlation(self, *, seed: int = 0) -> Interval:
        """Mean over positions of Spearman's rank correlation between a and d across the components, with its interval."""
        found = _spearman(self.attribution, self.ablation, axis=0)  # (N, T)
        (mean,) = bootstrap_means(found.sum(axis=1)[None], np.full(len(found), found.shape[1]), seed=seed)
        return mean

    @property
    def component_errors(self) -> Array:
        """(C,) the error of each component, per cent."""
        off, size = (np.abs(values).mean(axis=(1, 2)) for values in (self.attribution - self.ablation, self.ablation))
        return np.divide(100 * off, size, out=np.full_like(off, np.nan), where=size > 0)

    @property
    def component_sign_flips(self) -> Array:
        """(C,) per cent of its effects whose sign the attribution gets wrong."""
        return np.asarray(100.0 * (np.sign(self.attribution) * np.sign(self.ablation) < 0).mean(axis=(1, 2)))

    @property
    def component_rank_correlations(self) -> Array:
        """(C,) Spearman's rank correlation of a and d over documents and positions."""
        flat = (self.attribution.reshape(len(self.labels), -1), self.ablation.reshape(len(self.labels), -1))
        return _spearman(*flat, axis=1)

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Sums by kind with intervals, and each component's figures."""
        from ln_removal.interpret.entropies import nullable

        by_kind = {}
        for kind in KIND_TITLES:
            part = self.only(kind)  # type: ignore[arg-type]
            by_kind[kind] = {
                "error_per_cent": interval_json(part.error(seed=seed)),
                "sign_flips_per_cent": interval_json(part.sign_flips(seed=seed)),
                "rank_correlation": interval_json(part.rank_correlation(seed=seed)),
                "mean_ablation_size_logits": float(np.abs(part.ablation).mean()),
            }
        return {
            "by_kind": by_kind,
            "components": {
                "names": self.labels,
                "error_per_cent": nullable(self.component_errors),
                "sign_flips_per_cent": nullable(self.component_sign_flips),
                "rank_correlation": nullable(self.component_rank_correlations),
                "mean_attribution_logits": nullable(self.attribution.mean(axis=(1, 2))),
                "mean_ablation_logits": nullable(self.ablation.mean(axis=(1, 2))),
            },
        }


@dataclass(frozen=True)
class DirectEffectsByModel:
    """Direct effects of every model of a run on the same documents, in every direction asked for.

    Attributes:
        effects: by role and direction.
        documents: what was read.
        layers, heads: of the models.
    """

    effects: dict[str, dict[Direction, DirectEffects]]
    documents: Documents
    layers: int
    heads: int
    names: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """By model and direction, with what was read and the units in the names."""
        seed = self.documents.seed
        return {
            "text": self.documents.to_json(),
            "models": {
                role: {
                    "name": self.names.get(role),
                    "directions": {name: one.to_json(seed=seed) for name, one in found.items()},
                }
                for role, found in self.effects.items()
            },
        }


def components(bridge: TransformerBridge, tokens: Tensor) -> Components:
    """What every head, MLP, embedding and the attention biases write into the final residual stream (TransformerLens).

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, in evaluation mode, weights not processed.
        tokens: (N, T) token ids on the bridge's device.
    """
    import torch

    wanted = (
        "hook_embed",
        "hook_pos_embed",
        "hook_z",
        "hook_mlp_out",
        "ln_final.hook_in",
        "o.hook_in",
        "hook_resid_post",
    )
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith(wanted))
        written, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    written = torch.stack(torch.broadcast_tensors(*written)) if isinstance(written, (list, tuple)) else written
    return Components(list(labels), written, cache["ln_final.hook_in"], logits)


def direct_effects(
    bridge: TransformerBridge, tokens: Tensor, directions: Sequence[Direction] = DIRECTIONS, *, batch: int | None = None
) -> dict[Direction, DirectEffects]:
    """Attribution and ablation of every component at every position that has a next token, in each direction.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`.
        tokens: (N, T + 1) token ids on the bridge's device; the last ones are only predicted.
        directions: of the unembedding; see the top of the module.
        batch: documents at once; by default as many as fit into a few hundred megabytes.
    """
    if batch is None:
        cfg = bridge.cfg
        numbers = tokens.shape[1] * cfg.d_model * (cfg.n_layers * (cfg.n_heads + 1) + 3)
        batch = max(1, VALUES_IN_A_PASS // numbers)
    parts: list[dict[Direction, DirectEffects]] = []
    for some in tokens.split(batch):
        found = components(bridge, some)
        parts.append(
            effects_of_parts(bridge, found.labels, found.written, found.residual, found.logits, some, directions)
        )
    return {
        name: DirectEffects(
            parts[0][name].labels,
            np.concatenate([part[name].attribution for part in parts], axis=1),
            np.concatenate([part[name].ablation for part in parts], axis=1),
        )
        for name in directions
    }


def answer_effects(bridge: TransformerBridge, task: Task) -> DirectEffects:
    """Direct effects of every component on logit(answer) - logit(wrong answer) behind the clean prompts of a task.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, weights not processed.
        task: from `tasks.make_task` or `tasks.read_task`.

    Returns:
        Attribution and ablation (C, P, 1), in logits: N are the prompts, in the order of the task, T is their last position.

    Raises:
        UserError: a prompt is longer than the context of the model.
    """
    parts: list[tuple[list[int], DirectEffects]] = []
    for batch in task.batches(bridge, size=16):
        found = components(bridge, batch.clean)
        columns = bridge.W_U.detach().T  # (V, D)
        vector = (columns[batch.answer] - columns[batch.wrong])[:, None]
        last = found.written[:, :, -1:], found.residual[:, -1:]
        parts.append((batch.places, _along(bridge, found.labels, *last, {"": vector})[""]))
    order = np.argsort([place for places, _ in parts for place in places])
    attribution, ablation = (
        np.concatenate([getattr(one, name) for _, one in parts], axis=1)[:, order]
        for name in ("attribution", "ablation")
    )
    return DirectEffects(parts[0][1].labels, attribution, ablation)


def direct_effects_of_run(
    models: Models, documents: Documents, directions: Sequence[Direction] = DIRECTIONS, *, progress: bool = False
) -> DirectEffectsByModel:
    """`direct_effects` of every model of a run on the same documents.

    Args:
        models: from `load`.
        documents: from `Models.documents`.
        progress: show a progress bar over documents and models.
    """
    from tqdm.auto import tqdm

    found: dict[str, dict[Direction, DirectEffects]] = {}
    with tqdm(total=len(models.items()), desc="direct effects", unit="model", disable=not progress) as bar:
        for role, bridge in models.items():
            found[role] = direct_effects(bridge, documents.inputs(bridge), directions)
            bar.update()
    cfg = models.any.cfg
    return DirectEffectsByModel(found, documents, int(cfg.n_layers), int(cfg.n_heads), dict(models.names))


def kind_of(label: str) -> Kind:
    """The kind of a component by its TransformerLens name."""
    if label.startswith("L") and "H" in label:
        return "head"
    return "mlp" if label.endswith("_mlp_out") else "other"


def interval_json(found: Interval) -> dict[str, float | None]:
    """Value, low and high end of an interval; None where a number is not finite."""
    values = {"value": found.value, "low": found.low, "high": found.high}
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def effects_of_parts(
    bridge: TransformerBridge,
    labels: list[str],
    written: Tensor,
    residual: Tensor,
    logits: Tensor,
    tokens: Tensor,
    directions: Sequence[Direction],
) -> dict[Direction, DirectEffects]:
    """Attribution and ablation of any parts of the final residual stream, at every position that has a next token.

    Args:
        labels: C names.
        written: (C, N, T, D) the parts.
        residual: (N, T, D) the whole stream.
        logits: (N, T, V) of the model, which tell the runner-up.
        tokens: (N, T).
        directions: of the unembedding.
    """
    vectors = {name: direction_vectors(bridge, name, logits[:, :-1], tokens[:, 1:]) for name in directions}
    return _along(bridge, labels, written[:, :, :-1], residual[:, :-1], vectors)


def _along(
    bridge: TransformerBridge, labels: list[str], written: Tensor, residual: Tensor, vectors: Mapping[K, Tensor]
) -> dict[K, DirectEffects]:
    """Attribution and ablation of (C, N, T, D) parts of the (N, T, D) stream, on what the (N, T, D) vectors read, by name."""
    import torch

    effects: dict[K, DirectEffects] = {}
    with torch.no_grad():
        whole, scaled = bridge.ln_final(residual), as_read(bridge.ln_final, written, residual)
        ablated = torch.stack([bridge.ln_final(residual - one) for one in written])
        for name, vector in vectors.items():
            attribution, after = (torch.einsum("cntd,ntd->cnt", one, vector) for one in (scaled, ablated))
            ablation = torch.einsum("ntd,ntd->nt", whole, vector) - after  # the logit biases cancel
            arrays = (one.double().cpu().numpy() for one in (attribution, ablation))
            effects[name] = DirectEffects(labels, *arrays)
    return effects


def direction_vectors(bridge: TransformerBridge, name: Direction, logits: Tensor, right: Tensor) -> Tensor:
    """(N, T, D) the direction of the unembedding at each position.

    Args:
        logits: (N, T, V), which tell the runner-up.
        right: (N, T) the right next tokens.
    """
    import torch

    columns = bridge.W_U.T  # (V, D)
    correct = columns[right]
    if name == "correct":
        return correct
    if name == "centred":
        return correct - columns.mean(dim=0)
    others = logits.scatter(-1, right[..., None], -torch.inf)
    return correct - columns[others.argmax(dim=-1)]


def _spearman(first: Array, second: Array, *, axis: int) -> Array:
    """Spearman's rank correlation along an axis; 0 where one of the two has no variation."""
    from scipy.stats import rankdata

    ranks = [rankdata(values, axis=axis) for values in (first, second)]
    centred = [one - one.mean(axis=axis, keepdims=True) for one in ranks]
    size = np.sqrt((centred[0] ** 2).sum(axis=axis) * (centred[1] ** 2).sum(axis=axis))
    product = (centred[0] * centred[1]).sum(axis=axis)
    return np.asarray(np.divide(product, size, out=np.zeros_like(product), where=size > 0), dtype=np.float64)
