"""Path expansion: the logits as a sum over the paths from a source through attention heads to the unembedding.

Between the nonlinear parts a transformer is a sum of products (Elhage et al., "A Mathematical Framework for Transformer
Circuits", 2021). Given its attention patterns A, every head is linear, so what a source s has written splits by the number k of
heads that it has passed:

    S_0     = { token embedding, position embedding }
    S_(l+1)(s, k) = S_l(s, k) + sum over h of A_lh S_l(s, k - 1) W_V W_O
    new sources of order 0: each MLP's output, and the biases of each attention layer, b_O + sum over h of b_V W_O

    sum over s, k of S_L(s, k) W_U + b_U  =  logits

A term (s, k) is a sum over all paths with k heads. Without norms this needs the weights and patterns alone. With LayerNorm
each reading takes the scale of its position from the whole stream of the run (`reading.as_read`). The sum is then still that
of the logits, but a term says nothing about what happens when it is taken away, because then the scales are others; the
error in `PathSums.effects` shows by how much.

MLPs are sources, not passed: they are not linear.

Shape legend: M terms, N documents, T positions, H heads, K width of a head, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.attribution import (
    Array,
    DirectEffects,
    Direction,
    direction_vectors,
    effects_of_parts,
    interval_json,
)
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.reading import as_read, bias_read

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

GROUPS = ("token", "position", "MLPs", "attention biases")
"""The sources in groups, as tables and figures show them."""

TOP = 20
"""Named paths that tables and JSON show."""


@dataclass(frozen=True)
class Term:
    """What a source has written into the final residual stream through `order` heads.

    Attributes:
        source: "embed", "pos_embed", "3_mlp_out" or "3_attn_bias".
        first: the first layer whose heads can read it.
    """

    source: str
    order: int
    first: int

    @property
    def group(self) -> str:
        """Which of GROUPS the source belongs to."""
        if self.source in ("embed", "pos_embed"):
            return GROUPS[self.source == "pos_embed"]
        return GROUPS[2 if self.source.endswith("mlp_out") else 3]

    def paths(self, layers: int, heads: int) -> int:
        """How many paths the term is a sum of: `order` of the layers behind the source, one head in each."""
        return comb(layers - self.first, self.order) * heads**self.order


@dataclass(frozen=True)
class Expansion:
    """The final residual stream as a sum of terms.

    Attributes:
        terms: M of them.
        streams: (M, N, T, D), which sum to `residual`.
        residual: (N, T, D), the final residual stream of the model's own forward pass.
        logits: (N, T, V), of the same.
    """

    terms: list[Term]
    streams: Tensor
    residual: Tensor
    logits: Tensor

    def sum_error(self, bridge: TransformerBridge) -> float:
        """Largest difference between the sum of all terms' logits and the model's own logits, in logits."""
        import torch

        with torch.no_grad():
            read = as_read(bridge.ln_final, self.streams, self.residual).sum(dim=0)
            summed = (read + bias_read(bridge.ln_final, self.residual)) @ bridge.W_U + bridge.b_U
            return float((summed - self.logits).abs().max())


@dataclass(frozen=True)
class NamedPath:
    """One path, such as "embed -> L1H2 -> L4H0".

    Attributes:
        mean, size: mean and mean absolute contribution to the logit over documents and positions, logits.
    """

    name: str
    mean: float
    size: float


@dataclass(frozen=True)
class PathSums:
    """Contributions of the terms of one model to the logit of one direction.

    Attributes:
        terms: M of them.
        effects: attribution and ablation (M, N, T) of each term, logits; ablation takes it out of the final stream.
        sum_error: of `Expansion`, the largest over the documents, logits.
        paths: how many paths the terms are sums of.
        named: the paths with at most two heads, the largest mean absolute contribution first.
    """

    terms: list[Term]
    effects: DirectEffects
    sum_error: float
    paths: int
    named: list[NamedPath]

    @property
    def orders(self) -> list[int]:
        """The numbers of heads that occur."""
        return sorted({term.order for term in self.terms})

    def by_order(self, *, seed: int = 0) -> list[Interval]:
        """Mean contribution of all terms of each order, logits, with its 95 % interval over documents."""
        return self._means([[term.order == order for term in self.terms] for order in self.orders], seed)

    def by_group(self, *, seed: int = 0) -> dict[str, Interval]:
        """Mean contribution of all terms of each group of sources, logits, with its interval."""
        means = self._means([[term.group == group for term in self.terms] for group in GROUPS], seed)
        return dict(zip(GROUPS, means, strict=True))

    def by_group_and_order(self) -> Array:
        """(groups, orders) mean contribution, logits."""
        means = self.effects.attribution.mean(axis=(1, 2))
        table = np.zeros((len(GROUPS), len(self.orders)))
        for term, value in zip(self.terms, means, strict=True):
            table[GROUPS.index(term.group), self.orders.index(term.order)] += value
        return table

    def error_of_order(self, order: int, *, seed: int = 0) -> Interval:
        """100 mean |attribution - ablation| / mean |ablation| over the terms of an order, per cent, with its interval."""
        kept = [index for index, term in enumerate(self.terms) if term.order == order]
        names = [self.effects.labels[index] for index in kept]
        return DirectEffects(names, self.effects.attribution[kept], self.effects.ablation[kept]).error(seed=seed)

    def _means(self, chosen: list[list[bool]], seed: int) -> list[Interval]:
        values = self.effects.attribution
        sums = np.stack([values[np.array(some)].sum(axis=(0, 2)) for some in chosen])
        return bootstrap_means(sums, np.full(values.shape[1], values.shape[2]), seed=seed)

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Sums by order, by source and by term, and the named paths."""
        means = self.effects.attribution.mean(axis=(1, 2))
        return {
            "terms": len(self.terms),
            "paths": self.paths,
            "sum_error_logits": self.sum_error,
            "by_order": [
                {
                    "heads": order,
                    "mean_logits": interval_json(mean),
                    "ablation_error_per_cent": interval_json(self.error_of_order(order, seed=seed)),
                }
                for order, mean in zip(self.orders, self.by_order(seed=seed), strict=True)
            ],
            "by_source_group_logits": {name: interval_json(one) for name, one in self.by_group(seed=seed).items()},
            "by_term": [
                {"source": term.source, "heads": term.order, "mean_logits": float(mean)}
                for term, mean in zip(self.terms, means, strict=True)
            ],
            "named_paths": [
                {"path": one.name, "mean_logits": one.mean, "mean_size_logits": one.size} for one in self.named[:TOP]
            ],
        }


@dataclass(frozen=True)
class PathsByModel:
    """Path sums of every model of a run on the same documents, by role."""

    sums: dict[str, PathSums]
    direction: Direction
    documents: Documents
    names: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """By model, with what was read and the direction."""
        models = {
            role: {"name": self.names.get(role)} | one.to_json(seed=self.documents.seed)
            for role, one in self.sums.items()
        }
        return {"text": self.documents.to_json(), "direction": self.direction, "models": models}


def expand(bridge: TransformerBridge, tokens: Tensor) -> Expansion:
    """Split the final residual stream by source and number of heads passed.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, weights not processed.
        tokens: (N, T) token ids on the bridge's device.
    """
    import torch

    terms: list[Term] = []
    streams: list[Tensor] = []
    with torch.no_grad():
        logits, cache = _run(bridge, tokens)
        for layer in range(bridge.cfg.n_layers + 1):
            for source, first, written in _sources(bridge, cache, layer):
                terms.append(Term(source, 0, first))
                streams.append(written)
            if layer < bridge.cfg.n_layers:
                terms, streams = _through_heads(bridge, cache, layer, terms, streams)
    return Expansion(terms, torch.stack(streams), cache["ln_final.hook_in"], logits)


def path_sums(
    bridge: TransformerBridge, tokens: Tensor, direction: Direction = "centred", *, named: bool = True
) -> PathSums:
    """Contributions of all terms to the logit of a direction, at every position that has a next token.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`.
        tokens: (N, T + 1) token ids on the bridge's device; the last ones are only predicted.
        direction: of the unembedding, as in `attribution.direct_effects`.
        named: also name the largest single paths.
    """
    parts: list[DirectEffects] = []
    errors: list[float] = []
    found: dict[str, list[Array]] = {}
    terms: list[Term] = []
    for row in tokens.split(1):
        expansion = expand(bridge, row)
        terms = expansion.terms
        errors.append(expansion.sum_error(bridge))
        labels = [f"{term.source}, {term.order} heads" for term in terms]
        parts.append(
            effects_of_parts(
                bridge, labels, expansion.streams, expansion.residual, expansion.logits, row, (direction,)
            )[direction]
        )
        for name, values in named_paths(bridge, row, direction) if named else ():
            found.setdefault(name, []).append(values)
    return PathSums(
        terms,
        DirectEffects(
            parts[0].labels,
            np.concatenate([part.attribution for part in parts], axis=1),
            np.concatenate([part.ablation for part in parts], axis=1),
        ),
        max(errors),
        sum(term.paths(bridge.cfg.n_layers, bridge.cfg.n_heads) for term in terms),
        _largest(found),
    )


def named_paths(
    bridge: TransformerBridge, tokens: Tensor, direction: Direction = "centred"
) -> Iterator[tuple[str, Array]]:
    """Every path with at most two heads: its name, such as "embed -> L1H2 -> L4H0", and its contributions (N, T), logits.

    Args:
        bridge, tokens, direction: as for `path_sums`.
    """
    import torch

    with torch.no_grad():
        logits, cache = _run(bridge, tokens)
        target = direction_vectors(bridge, direction, logits[:, :-1], tokens[:, 1:])
        target = torch.nn.functional.pad(target, (0, 0, 0, 1))  # of the last position, which predicts nothing
        target = _as_written(bridge, target, cache["ln_final.hook_in"])
        for layer in range(bridge.cfg.n_layers + 1):
            for source, first, written in _sources(bridge, cache, layer):
                yield from _paths_from(bridge, cache, source, first, written, target)


def paths_of_run(
    models: Models, documents: Documents, direction: Direction = "centred", *, progress: bool = False
) -> PathsByModel:
    """`path_sums` of every model of a run on the same documents."""
    from tqdm.auto import tqdm

    sums = {
        role: path_sums(bridge, documents.inputs(bridge), direction)
        for role, bridge in tqdm(models.items(), desc="paths", unit="model", disable=not progress)
    }
    return PathsByModel(sums, direction, documents, dict(models.names))


def _run(bridge: TransformerBridge, tokens: Tensor) -> tuple[Tensor, Any]:
    """Logits, and the cache of what an expansion needs."""
    wanted = ("hook_embed", "hook_pos_embed", "hook_pattern", "hook_mlp_out", "hook_resid_pre", "ln_final.hook_in")
    found: tuple[Tensor, Any] = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith(wanted))
    return found


def _sources(bridge: TransformerBridge, cache: Any, layer: int) -> Iterator[tuple[str, int, Tensor]]:
    """Name, first layer that reads it and stream (N, T, D) of what was written between the heads of layer - 1 and of `layer`."""
    if layer == 0:
        embed = cache["hook_embed"]
        yield "embed", 0, embed
        yield "pos_embed", 0, cache["hook_pos_embed"].expand_as(embed)
        return
    block = bridge.blocks[layer - 1]
    values = block.attn.b_V + bias_read(block.ln1, block.attn.b_O) @ block.attn.W_V  # (H, K); (H, D, K)
    bias = block.attn.b_O + (values[:, None] @ block.attn.W_O).sum(dim=(0, 1))
    mlp = cache[f"blocks.{layer - 1}.hook_mlp_out"]
    yield f"{layer - 1}_attn_bias", layer, bias.expand_as(mlp)
    yield f"{layer - 1}_mlp_out", layer, mlp


def _through_heads(
    bridge: TransformerBridge, cache: Any, layer: int, terms: list[Term], streams: list[Tensor]
) -> tuple[list[Term], list[Tensor]]:
    """The terms behind the heads of a layer."""
    summed = {(term.source, term.order): stream for term, stream in zip(terms, streams, strict=True)}
    firsts = {term.source: term.first for term in terms}
    for term, stream in zip(terms, streams, strict=True):
        heads = _head_outputs(bridge, cache, layer, stream).sum(dim=0)
        key = (term.source, term.order + 1)
        summed[key] = summed[key] + heads if key in summed else heads
    return [Term(source, order, firsts[source]) for source, order in summed], list(summed.values())


def _head_outputs(bridge: TransformerBridge, cache: Any, layer: int, stream: Tensor) -> Tensor:
    """(H, N, T, D) what each head of a layer writes for a part of the residual stream (N, T, D)."""
    import torch

    return torch.einsum("hntk,hkd->hntd", _mixed(bridge, cache, layer, stream), bridge.blocks[layer].attn.W_O)


def _mixed(bridge: TransformerBridge, cache: Any, layer: int, stream: Tensor) -> Tensor:
    """(H, ..., N, T, K) the values of a part of the stream (..., N, T, D), mixed by the patterns of a layer's heads."""
    import torch

    block = bridge.blocks[layer]
    read = as_read(block.ln1, stream, cache[f"blocks.{layer}.hook_resid_pre"])
    values = torch.einsum("...sd,hdk->h...sk", read, block.attn.W_V)
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"].transpose(0, 1)  # (H, N, T, S)
    while pattern.ndim < values.ndim:
        pattern = pattern.unsqueeze(1)
    return pattern @ values


def _paths_from(
    bridge: TransformerBridge, cache: Any, source: str, first: int, written: Tensor, target: Tensor
) -> Iterator[tuple[str, Array]]:
    """The paths from one source with at most two heads."""
    import torch

    def contributions(values: Tensor, layer: int) -> Tensor:
        """(H, ..., N, T) of mixed values (H, ..., N, T, K) to the logit; `target` is read through W_O, so no D is summed twice."""
        through = torch.einsum("ntd,hkd->hntk", target, bridge.blocks[layer].attn.W_O)
        while through.ndim < values.ndim:
            through = through.unsqueeze(1)
        return (values * through).sum(dim=-1)

    yield source, _array((written * target).sum(dim=-1))
    outputs: list[Tensor] = []  # (N, T, D) of the heads passed so far
    names: list[str] = []
    for layer in range(first, bridge.cfg.n_layers):
        if outputs:
            second = contributions(_mixed(bridge, cache, layer, torch.stack(outputs)), layer)
            for head, of_head in enumerate(second):
                for name, values in zip(names, of_head, strict=True):
                    yield f"{name} -> L{layer}H{head}", _array(values)
        mixed = _mixed(bridge, cache, layer, written)
        for head, values in enumerate(contributions(mixed, layer)):
            yield f"{source} -> L{layer}H{head}", _array(values)
        outputs += [value @ bridge.blocks[layer].attn.W_O[head] for head, value in enumerate(mixed)]
        names += [f"{source} -> L{layer}H{head}" for head in range(bridge.cfg.n_heads)]


def _as_written(bridge: TransformerBridge, target: Tensor, residual: Tensor) -> Tensor:
    """(N, T, D) the direction in front of the final norm: its product with a part of the stream is the part's contribution."""
    from ln_removal.interpret.reading import own_norm

    norm = own_norm(bridge.ln_final)
    if norm is None:
        return target
    sigma = (residual.var(dim=-1, correction=0, keepdim=True) + norm.eps).sqrt()
    scaled = target * norm.weight / sigma
    return scaled - scaled.mean(dim=-1, keepdim=True)


def _array(values: Tensor) -> Array:
    """Without the last position, which predicts nothing."""
    return np.asarray(values[..., :-1].double().cpu().numpy())


def _largest(found: dict[str, list[Array]]) -> list[NamedPath]:
    means = {name: (float(np.mean(values)), float(np.abs(values).mean())) for name, values in found.items()}
    ranked = sorted(means, key=lambda name: -means[name][1])
    return [NamedPath(name, *means[name]) for name in ranked]
