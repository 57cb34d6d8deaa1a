"""Entropy neurons of the last block: they write much, but hardly where the unembedding reads, and act through the final norm.

(Stolfo et al. 2024, arXiv 2406.16254; Gurnee et al. 2024, arXiv 2401.12181.) w is what a neuron of the last MLP writes for each
unit of its activation a, and u_v the column of the unembedding as it acts on the residual stream:

    u_v            gamma * W[:, v] minus its mean over d with a final LayerNorm; W[:, v] without norms
    variance       of cos(w, u_v) over v: small if w moves all logits alike
    correlation    of a with the entropy of the prediction, over positions (Pearson's)

Mean ablation sets a to its mean over positions: the residual stream x becomes x + (mean a - a) w. What it does to the entropy H
and the loss is computed twice, with the final norm's sigma of the changed stream (total) and with that of x (frozen):

    share mediated by the norm = 1 - mean |dH, frozen| / mean |dH, total|        means over positions

Both are the same without norms, so the share is 0 there. It is negative where the norm dampens what a neuron does.

Shape legend: N documents, T positions, P positions of an ablation, M neurons of the last MLP, K ablated neurons, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.entropies import nullable
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.passes import Array, ByModel, each_model, passes

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

ABLATED = 128
"""Neurons that are ablated by default."""

POSITIONS = 16
"""Positions of each document at which neurons are ablated, spread evenly."""

LOGITS_AT_ONCE = 1 << 20
"""So many logits are computed at once, which fit into the caches of a CPU."""

NO_EFFECT = 1e-12
"""A mean change of the entropy, in nats, that is rounding: nothing is shared out of it."""


@dataclass(frozen=True)
class NeuronEffects:
    """Neurons of the last MLP of a model.

    Attributes:
        norm: (M,) |w|.
        variance: (M,) of cos(w, u_v) over v.
        correlation: (M,) of activation and entropy; NaN for a neuron that never changes.
        ablated: (K,) the neurons that were ablated.
        entropy_total, entropy_frozen: (K, N, P) change of the entropy by mean ablation, nats.
        loss_total, loss_frozen: (K, N, P) change of the loss of the next token, nats.
    """

    norm: Array
    variance: Array
    correlation: Array
    ablated: npt.NDArray[np.int64]
    entropy_total: Array
    entropy_frozen: Array
    loss_total: Array
    loss_frozen: Array

    @property
    def effect(self) -> Array:
        """(K,) mean |dH, total|, nats."""
        return np.asarray(np.abs(self.entropy_total).mean(axis=(1, 2)))

    @property
    def mediated(self) -> Array:
        """(K,) share of the change of the entropy that the norm mediates; NaN where ablation changes nothing."""
        frozen = np.abs(self.entropy_frozen).mean(axis=(1, 2))
        ratio = np.divide(frozen, self.effect, out=np.full_like(frozen, np.nan), where=self.effect > NO_EFFECT)
        return np.asarray(1 - ratio)

    def mediated_interval(self, index: int, *, seed: int = 0) -> Interval:
        """`mediated` of one of the K neurons, with its 95 % interval over documents."""
        frozen, total = (np.abs(one[index]).sum(axis=1) for one in (self.entropy_frozen, self.entropy_total))
        some = total > NO_EFFECT
        if not some.any():
            return Interval(np.nan, np.nan, np.nan)
        (found,) = bootstrap_means((total - frozen)[None, some], total[some], seed=seed)
        return found

    def overall_mediated(self, *, seed: int = 0) -> Interval:
        """1 - mean |dH, frozen| / mean |dH, total| over all K neurons, with its 95 % interval over documents."""
        frozen, total = (np.abs(one).sum(axis=(0, 2)) for one in (self.entropy_frozen, self.entropy_total))
        if not (total > NO_EFFECT).all():
            return Interval(np.nan, np.nan, np.nan)
        (found,) = bootstrap_means((total - frozen)[None], total, seed=seed)
        return found

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Of all neurons what their weights and activations say, of the ablated ones what ablation changes."""
        changes = {
            "entropy_total": self.entropy_total,
            "entropy_frozen": self.entropy_frozen,
            "loss_total": self.loss_total,
            "loss_frozen": self.loss_frozen,
        }
        return {
            "neurons": {
                "norm": nullable(self.norm),
                "variance_of_cosines": nullable(self.variance),
                "correlation_with_entropy": nullable(self.correlation),
            },
            "ablated": {
                "neurons": self.ablated.tolist(),
                **{f"mean_{name}_nats": nullable(one.mean(axis=(1, 2))) for name, one in changes.items()},
                **{
                    f"mean_size_of_{name}_nats": nullable(np.abs(one).mean(axis=(1, 2)))
                    for name, one in changes.items()
                },
                "share_mediated_by_norm": nullable(self.mediated),
            },
            "share_mediated_by_norm": interval_json(self.overall_mediated(seed=seed)),
        }


@dataclass(frozen=True)
class _Final:
    """The final norm and the unembedding as one map: logits = constant + (x @ columns) / sigma(x).

    Attributes:
        columns: (D, V) u_v.
        constant: (V,) the bias of the unembedding, and what the bias of the norm adds.
        eps: of the norm; None without one.
    """

    columns: Tensor
    constant: Tensor
    eps: float | None

    def sigma(self, x: Tensor) -> Tensor:
        """(..., D) to (...): what the norm divides by; 1 without one."""
        if self.eps is None:
            return x.new_ones(x.shape[:-1])
        return (x.var(dim=-1, correction=0) + self.eps).sqrt()


def neuron_effects(bridge: TransformerBridge, tokens: Tensor, ablated: Sequence[int]) -> NeuronEffects:
    """The neurons of the last MLP: their weights, their correlation with entropy, and what mean ablation of some changes.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`.
        tokens: (N, T) on the bridge's device; every position but the last predicts.
        ablated: indices below M of the neurons to ablate, one at a time, at POSITIONS of each document.
    """
    final, written = _final(bridge), bridge.W_out[-1].detach()  # (M, D)
    activation, stream, entropy = _activations(bridge, tokens)
    places = _places(tokens)
    change = activation.mean((0, 1)) - activation[:, places]  # (N, P, M)
    changes = _ablations(
        final, stream[:, places].flatten(0, 1), tokens[:, places + 1].flatten(), change.flatten(0, 1), written, ablated
    )
    cosines = _cosine_variances(written, final.columns)
    return NeuronEffects(
        written.norm(dim=-1).double().cpu().numpy(),
        cosines.double().cpu().numpy(),
        _correlations(activation.flatten(0, 1), entropy.flatten()),
        np.asarray(ablated, dtype=np.int64),
        *(changes.reshape(4, len(ablated), len(tokens), len(places))),
    )


def neuron_effects_of_run(
    models: Models, documents: Documents, *, ablated: int = ABLATED, progress: bool = False
) -> ByModel[NeuronEffects]:
    """`neuron_effects` of every model of a run on the same documents, with the same neurons ablated.

    Args:
        models: from `load`.
        documents: from `Models.documents`.
        ablated: how many neurons, from `candidates` of the first model. All if there are no more.

    Raises:
        UserError: no neuron is to be ablated.
    """
    if ablated < 1:
        raise UserError(f"found {ablated} neurons to ablate; ask for at least 1")
    first = models.items()[0][1]
    chosen = candidates(first, documents.inputs(first), ablated, seed=documents.seed)
    return each_model(
        models,
        documents,
        lambda bridge: neuron_effects(bridge, documents.inputs(bridge), chosen),
        "neurons",
        progress=progress,
    )


def candidates(bridge: TransformerBridge, tokens: Tensor, count: int, *, seed: int = 0) -> list[int]:
    """`count` neurons of the last MLP, sorted: half those that seem to act most through the norm, half of the others at random.

    The first half have the largest mean |dH, total| - mean |dH, frozen| to first order in their ablation, which needs no run. In a
    model without norms these are the ones with the largest mean |dH|.
    """
    activation, stream, _ = _activations(bridge, tokens)
    places = _places(tokens)
    change = (activation.mean((0, 1)) - activation[:, places]).flatten(0, 1)
    total, frozen = _first_order(_final(bridge), stream[:, places].flatten(0, 1), change, bridge.W_out[-1].detach())
    order = np.argsort(-(total - frozen if (total != frozen).any() else total))
    first = order[: -(-count // 2)]
    others = np.random.default_rng(seed).permutation(order[len(first) :])[: max(0, count - len(first))]
    return sorted(np.concatenate([first, others]).tolist())


def entropy_and_loss(logits: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """(...) entropy of the prediction and loss of the target, nats, of logits (..., V) and targets (...)."""
    log_total = logits.logsumexp(-1)
    probability = (logits - log_total[..., None]).exp_()
    entropy = log_total - (probability * logits.clamp(min=-1e30)).sum(-1)
    loss = None if targets is None else log_total - logits.gather(-1, targets[..., None])[..., 0]
    return entropy, loss


def _final(bridge: TransformerBridge) -> _Final:
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    norm, weights, bias = bridge.ln_final, bridge.W_U.detach(), bridge.b_U.detach()
    if not isinstance(norm, NormalizationBridge):
        return _Final(weights, bias, None)
    own: Any = norm.original_component
    scaled = own.weight.detach()[:, None] * weights
    return _Final(scaled - scaled.mean(dim=0, keepdim=True), bias + own.bias.detach() @ weights, float(own.eps))


def _activations(bridge: TransformerBridge, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Activations of the last MLP (N, T, M), final residual stream (N, T, D) and entropy (N, T), without the last position."""
    import torch

    activations: list[Tensor] = []
    streams: list[Tensor] = []
    entropies: list[Tensor] = []
    readers = {
        f"blocks.{int(bridge.cfg.n_layers) - 1}.mlp.hook_post": lambda _, one: activations.append(one[:, :-1].detach()),
        "ln_final.hook_in": lambda _, one: streams.append(one[:, :-1].detach()),
    }
    for _, logits in passes(bridge, tokens, readers, numbers=tokens.shape[1] * int(bridge.cfg.d_vocab)):
        entropies.append(entropy_and_loss(logits[:, :-1])[0])
    return torch.cat(activations), torch.cat(streams), torch.cat(entropies)


def _places(tokens: Tensor) -> Tensor:
    """(P,) the positions of (N, T) tokens at which neurons are ablated."""
    import torch

    last = tokens.shape[1] - 2
    return torch.linspace(0, last, min(POSITIONS, last + 1), device=tokens.device).round().long()


def _first_order(final: _Final, stream: Tensor, change: Tensor, written: Tensor) -> tuple[Array, Array]:
    """(M,) mean |dH, total| and (M,) mean |dH, frozen|, nats, to first order in the change of each neuron.

    dH = change * sum over v of dH/dlogit_v * (w u_v / sigma - (x u_v / sigma^2) dsigma), with dsigma = cov(x, w) / sigma and
    dH/dlogit_v = -p_v (log p_v + H). Frozen is the first term alone.

    Args:
        stream: (Q, D) final residual stream.
        change: (Q, M) of the activations.
        written: (M, D).
    """
    sums = np.zeros((2, len(written)))
    rows = max(1, LOGITS_AT_ONCE // final.columns.shape[1])
    centred = written - written.mean(dim=-1, keepdim=True)
    for start in range(0, len(stream), rows):
        x, step = stream[start : start + rows], change[start : start + rows]
        read, sigma = x @ final.columns, final.sigma(x)[:, None]
        log_probs = (final.constant + read / sigma).log_softmax(-1)
        slope = -log_probs.exp() * (log_probs - (log_probs.exp() * log_probs).sum(-1, keepdim=True))
        frozen = step * (slope @ final.columns.T @ written.T) / sigma
        total = frozen
        if final.eps is not None:
            covariance = (x - x.mean(dim=-1, keepdim=True)) @ centred.T / x.shape[1]
            total = frozen - step * covariance * (slope * read).sum(-1, keepdim=True) / sigma**3
        for row, one in enumerate((total, frozen)):
            sums[row] += one.abs().sum(0).double().cpu().numpy()
    return sums[0] / len(stream), sums[1] / len(stream)


def _ablations(
    final: _Final, stream: Tensor, targets: Tensor, change: Tensor, written: Tensor, ablated: Sequence[int]
) -> Array:
    """(4, K, Q) change of the entropy, total and frozen, and of the loss, total and frozen, at Q positions.

    Args:
        stream: (Q, D) final residual stream.
        targets: (Q,) next tokens.
        change: (Q, M) of the activations.
        written: (M, D).
    """
    import torch

    moved = (
        written[list(ablated)] @ final.columns
    )  # (K, V) what a unit of each neuron adds to the logits before scaling
    found = np.empty((4, len(ablated), len(stream)))
    rows = max(1, LOGITS_AT_ONCE // moved.shape[1])
    with torch.no_grad():
        for start in range(0, len(stream), rows):
            some = slice(start, start + rows)
            read, sigma, right = stream[some] @ final.columns, final.sigma(stream[some])[:, None], targets[some]
            before = entropy_and_loss(final.constant + read / sigma, right)
            for number, neuron in enumerate(ablated):
                step = change[some, neuron, None]
                after_read = torch.addcmul(read, step, moved[number])
                own_sigma = final.sigma(stream[some] + step * written[neuron])[:, None]
                total = entropy_and_loss(final.constant + after_read / own_sigma, right)
                frozen = total if final.eps is None else entropy_and_loss(final.constant + after_read / sigma, right)
                for row, which, kind in ((0, total, 0), (1, frozen, 0), (2, total, 1), (3, frozen, 1)):
                    found[row, number, some] = (which[kind] - before[kind]).double().cpu().numpy()  # type: ignore[operator]
    return found


def _cosine_variances(written: Tensor, columns: Tensor) -> Tensor:
    """(M,) variance over v of the cosine of (M, D) written and (D, V) columns; 0 for a neuron that writes nothing."""
    units = written / written.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return (units @ (columns / columns.norm(dim=0).clamp(min=1e-30))).var(dim=-1, correction=0)


def _correlations(activation: Tensor, entropy: Tensor) -> Array:
    """(M,) Pearson's correlation of (Q, M) activations with (Q,) entropies."""
    a, h = activation.double() - activation.double().mean(0), entropy.double() - entropy.double().mean()
    size = a.norm(dim=0) * h.norm()
    return np.asarray(((a * h[:, None]).sum(0) / size).cpu().numpy())
