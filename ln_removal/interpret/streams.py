"""The residual stream from block to block: its length, its outlying dimensions, its direction and its rank.

    L2               mean over positions of |x|
    max / median     mean over positions of (max over d of |x_d|) / (median over d of |x_d|); massive activations make it large
                     (Sun et al., arXiv 2402.17762)
    cosine           mean over positions of the cosine of x and the mean of x over these positions; 1 if all point in one
                     direction (Ethayarajh, arXiv 1909.00512, calls this anisotropy)
    effective rank   exp of the entropy of the singular values, divided by their sum, of the x minus their mean (Roy and Vetterli
                     2007). It is at most the number of positions less one

Each is taken over the positions of one class: position 0, end-of-text tokens elsewhere, and ordinary positions, because models
without norms treated these differently while they were trained. A text here is two documents with an end-of-text token between
them, as in a training stream.

Shape legend: N texts, T positions, S sites, K position classes, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.entropies import nullable
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.passes import Array, ByModel, each_model, passes

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

    from ln_removal.data.tokens import Tokens

CLASSES = ("ordinary", "end of text", "position 0")
"""Position classes, in the order of `norms.freezable`. Position 0 wins where both apply."""

MEANS = ("l2", "max_over_median", "cosine_to_mean")
"""Quantities that are means over positions and have intervals."""

NO_SPREAD = 1e-10
"""Variance, as a share of the mean square, below which positions are all the same and have no effective rank."""


@dataclass(frozen=True)
class ResidualShape:
    """Of one model.

    Attributes:
        sites: S names as TransformerLens gives them: "0_pre", "0_mid", "1_pre", ..., "final_post".
        sums: of each of MEANS, (S, K, N) over the positions of a class in a text; the cosine's mean is that of all texts.
        counts: (K, N) positions of a class in a text.
        effective_rank: (S, K); NaN where a class has fewer than two positions or they are all the same.
    """

    sites: list[str]
    sums: dict[str, Array]
    counts: Array
    effective_rank: Array

    def mean(self, name: str) -> Array:
        """(S, K) mean of one of MEANS over positions; NaN for a class without any."""
        counts = self.counts.sum(axis=-1)
        return np.divide(
            self.sums[name].sum(axis=-1), counts, out=np.full(self.sums[name].shape[:2], np.nan), where=counts > 0
        )

    def intervals(self, name: str, *, seed: int = 0) -> list[list[Interval]]:
        """[S][K] the same with 95 % intervals over texts."""
        nothing = Interval(np.nan, np.nan, np.nan)
        by_class = []
        for place in range(len(CLASSES)):
            some = self.counts[place] > 0
            sums = self.sums[name][:, place, some]
            by_class.append(
                bootstrap_means(sums, self.counts[place, some], seed=seed)
                if some.any()
                else [nothing] * len(self.sites)
            )
        return [list(row) for row in zip(*by_class, strict=True)]

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """By position class, each quantity along the sites."""
        found: dict[str, Any] = {
            "sites": self.sites,
            "positions": dict(zip(CLASSES, self.counts.sum(-1).tolist(), strict=True)),
        }
        intervals = {name: self.intervals(name, seed=seed) for name in MEANS}
        for place, title in enumerate(CLASSES):
            found[title.replace(" ", "_")] = {
                name: [interval_json(row[place]) for row in rows] for name, rows in intervals.items()
            } | {"effective_rank": nullable(self.effective_rank[:, place])}
        return found


def residual_shape(bridge: TransformerBridge, tokens: Tensor, end_of_text: int) -> ResidualShape:
    """The shape of the residual stream before each block, between attention and MLP, and behind the last block.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`.
        tokens: (N, T) on the bridge's device.
        end_of_text: the id of the end-of-text token; it decides the class of a position.
    """
    import torch

    layers, width = int(bridge.cfg.n_layers), int(bridge.cfg.d_model)
    hooks = {
        f"{layer}_{place}": f"blocks.{layer}.hook_resid_{place}" for layer in range(layers) for place in ("pre", "mid")
    }
    hooks["final_post"] = f"blocks.{layers - 1}.hook_resid_post"
    classes = torch.where(tokens == end_of_text, 1, 0)
    classes[:, 0] = 2
    members = torch.stack([classes == place for place in range(len(CLASSES))]).double()  # (K, N, T)
    shape = (len(hooks), len(CLASSES), len(tokens))
    # On the model's device: first and second moments, and the sum of unit vectors, whose product with the mean is the cosine's.
    total, units = (torch.zeros(*shape, width, dtype=torch.float64, device=tokens.device) for _ in range(2))
    squares = torch.zeros(*shape[:2], width, width, dtype=torch.float64, device=tokens.device)
    sums = {name: torch.zeros(shape, dtype=torch.float64, device=tokens.device) for name in MEANS}

    def read(site: int, rows: slice, stream: Tensor) -> None:
        x, member = stream.double(), members[:, rows]
        size, magnitudes = x.norm(dim=-1), x.abs().sort(dim=-1).values
        median = (magnitudes[..., (width - 1) // 2] + magnitudes[..., width // 2]) / 2
        sums["l2"][site, :, rows] = torch.einsum("knt,nt->kn", member, size)
        sums["max_over_median"][site, :, rows] = torch.einsum("knt,nt->kn", member, magnitudes[..., -1] / median)
        total[site, :, rows] = torch.einsum("knt,ntd->knd", member, x)
        units[site, :, rows] = torch.einsum("knt,ntd->knd", member, x / size.clamp(min=1e-300)[..., None])
        for place, one in enumerate(member):
            some = x[one > 0]
            squares[site, place] += some.T @ some

    readers = {
        name: lambda rows, stream, site=site: read(site, rows, stream) for site, name in enumerate(hooks.values())
    }
    numbers = tokens.shape[1] * max(width, int(bridge.cfg.d_vocab))
    for _ in passes(bridge, tokens, readers, numbers=numbers):
        pass
    counts = members.sum(-1)  # (K, N)
    mean = total.sum(2) / counts.sum(-1)[:, None]  # (S, K, D)
    direction = mean / mean.norm(dim=-1, keepdim=True)
    sums["cosine_to_mean"] = torch.einsum("sknd,skd->skn", units, direction).nan_to_num(0.0)
    ranks = _effective_ranks(squares, mean, counts.sum(-1))
    return ResidualShape(
        list(hooks), {name: one.cpu().numpy() for name, one in sums.items()}, counts.cpu().numpy(), ranks
    )


def residual_shape_of_run(models: Models, documents: Documents, *, progress: bool = False) -> ByModel[ResidualShape]:
    """`residual_shape` of every model of a run on pairs of documents.

    Args:
        models: from `load` of a run.
        documents: from `Models.documents`, at least two; a text holds two of them, which must fit into the context.

    Raises:
        UserError: there are too few documents, or they are too long.
    """
    import torch

    if models.data is None:
        raise UserError("it is not known which token ends a text; load the models of a run, or pass tokens to load")
    end_of_text = models.data.eot_token_id
    texts = joined(documents, end_of_text)
    if texts.shape[1] > int(models.any.cfg.n_ctx):
        raise UserError(
            f"two documents are {texts.shape[1]} tokens, the models read {int(models.any.cfg.n_ctx)}; ask for shorter ones"
        )

    def look(bridge: TransformerBridge) -> ResidualShape:
        device = next(bridge.parameters()).device
        return residual_shape(bridge, torch.from_numpy(texts).to(device), end_of_text)

    return each_model(models, documents, look, "residual stream", progress=progress)


def joined(documents: Documents, end_of_text: int) -> Tokens:
    """Two documents and the end-of-text token between them in each row; a BOS is that token already. An odd one is left out.

    Raises:
        UserError: there is only one document.
    """
    pairs = len(documents.tokens) // 2
    if not pairs:
        raise UserError("found one document; ask for at least two, because a text is made of two of them")
    first, second = documents.tokens[0 : 2 * pairs : 2], documents.tokens[1 : 2 * pairs : 2]
    between = np.full((pairs, 0 if documents.prepend_bos else 1), end_of_text)
    return np.concatenate([first, between, second], axis=1)


def _effective_ranks(squares: Tensor, mean: Tensor, counts: Tensor) -> Array:
    """(S, K) from sums of outer products (S, K, D, D), means (S, K, D) and the number of positions (K,)."""
    import torch

    found = np.full(mean.shape[:2], np.nan)
    for site, place in np.ndindex(*found.shape):
        if counts[place] < 2:
            continue
        second = squares[site, place] / counts[place]
        covariance = second - torch.outer(mean[site, place], mean[site, place])
        if covariance.trace() <= NO_SPREAD * second.trace():
            continue
        values = torch.linalg.eigvalsh(covariance)
        # Rounding leaves about 1e-16 of the largest, whose root would count.
        values = values[values > len(values) * torch.finfo(values.dtype).eps * values[-1]].sqrt()
        share = values / values.sum()
        found[site, place] = float((-(share * share.log()).sum()).exp())
    return found
