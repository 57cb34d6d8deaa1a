"""Activation patching: corrupt runs in which activations are set to their values in the clean run, one after the other.

A run may keep all of its nonlinearities, or replace some of them by their tangents at the corrupt run,

    g(x_c) + g'(x_c) (x - x_c),

which say the same as g up to first order. What is linearised can be told apart by three names:

    norm         every LayerNorm: (x - mean) / sigma * gamma + beta
    softmax      attention from queries, keys and values to z: the products q k and pattern v, and the softmax between them
    activation   the MLPs' activation function, GELU in GPT-2

Everything else in the model is linear. With all three linearised, a run is a linear function of what is patched into it.

Patched runs begin at the layer that is patched, from the corrupt residual stream. What is equal in both runs, such as all
positions before the first token that differs, is not run: its effect is 0.

Shape legend: P prompts, T tokens, B patched runs at once, L layers, H heads, K width of a head, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ln_removal.interpret.tasks import PromptBatch

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

Array = npt.NDArray[np.float64]

Nonlinearity = Literal["norm", "softmax", "activation"]
NONLINEARITIES: tuple[Nonlinearity, ...] = get_args(Nonlinearity)

NodeKind = Literal["resid_pre", "attn_out", "mlp_out"]
NODE_KINDS: tuple[NodeKind, ...] = get_args(NodeKind)

HeadKind = Literal["q", "k", "v", "z"]
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)

TOKENS_AT_ONCE = 4096
"""About so many tokens are in a batch of patched runs."""

_CACHED = (
    *(f"hook_{kind}" for kind in (*NODE_KINDS, *HEAD_KINDS, "pattern", "pre", "post", "resid_mid")),
    *(f"{norm}.{end}" for norm in ("ln1", "ln2", "ln_final") for end in ("hook_in", "hook_out")),
)
"""Ends of the names of the hooks that both runs are read at."""

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class Effects:
    """What a patch adds to logit(answer) - logit(wrong answer), in logits.

    Attributes:
        nodes: (P, L, T, 3) of NODE_KINDS, each at one position. Prompts end at the last position; shorter ones have NaN in front.
        heads: (P, L, H, 4) of HEAD_KINDS, each at all positions at once.
    """

    nodes: Array
    heads: Array

    def of(self, kind: str) -> Array:
        """(P, effects of a kind of node or head)."""
        array, kinds = (self.nodes, NODE_KINDS) if kind in NODE_KINDS else (self.heads, HEAD_KINDS)
        return array[..., kinds.index(kind)].reshape(len(array), -1)

    @classmethod
    def empty(cls, prompts: int, layers: int, length: int, heads: int) -> Effects:
        """NaN everywhere, to be filled."""
        return cls(
            np.full((prompts, layers, length, len(NODE_KINDS)), np.nan),
            np.full((prompts, layers, heads, len(HEAD_KINDS)), np.nan),
        )

    def fill(self, places: Sequence[int], part: Effects) -> None:
        """Put the effects of some prompts in their places, the last positions on top of each other."""
        self.nodes[places, :, self.nodes.shape[2] - part.nodes.shape[2] :] = part.nodes
        self.heads[places] = part.heads


@dataclass(frozen=True)
class Pair:
    """The clean and the corrupt run of a batch of prompts: activations by hook name, and the direction of the metric.

    Attributes:
        direction: (P, D) W[:, answer] - W[:, wrong answer].
        behind: (P, T) whether a position is not before the first token that differs.
        clean, corrupt: (P, ...) each.
    """

    direction: Tensor
    behind: Tensor
    clean: dict[str, Tensor]
    corrupt: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """P and T."""
        found = self.corrupt["blocks.0.hook_resid_pre"].shape
        return int(found[0]), int(found[1])

    def difference(self, name: str) -> Tensor:
        """(P, T, ...) clean minus corrupt; 0 before the first token that differs, where there is nothing but rounding."""
        change = self.clean[name] - self.corrupt[name]
        behind = self.behind.reshape(*self.behind.shape, *[1] * (change.ndim - 2))
        return change * behind.to(change.dtype)


def run_pair(bridge: TransformerBridge, batch: PromptBatch) -> Pair:
    """Run the clean and the corrupt prompts of a batch and keep what patching and linearising need."""
    import torch

    assert batch.corrupt is not None
    caches = []
    with torch.no_grad():
        for tokens in (batch.clean, batch.corrupt):
            _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith(_CACHED))
            caches.append({name: cache[name] for name in _names(bridge)})
        columns = bridge.W_U.T
        behind = (batch.clean != batch.corrupt).long().cummax(dim=1).values
        return Pair(columns[batch.answer] - columns[batch.wrong], behind, *caches)


def activation_patching(
    bridge: TransformerBridge,
    batch: PromptBatch,
    *,
    real: Collection[Nonlinearity] = NONLINEARITIES,
    kinds: Collection[str] = (*NODE_KINDS, *HEAD_KINDS),
    pair: Pair | None = None,
) -> Effects:
    """The effect of every patch, each by a run of its own.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, in evaluation mode, weights not processed.
        batch: prompts with corrupt twins, all of one length.
        real: nonlinearities that are kept; the others are replaced by their tangents at the corrupt run.
        kinds: of nodes and heads to patch; the effects of the others are NaN.
        pair: from `run_pair`, if it was run before.
    """
    import torch

    pair = run_pair(bridge, batch) if pair is None else pair
    prompts, length = pair.shape
    layers, heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    found = Effects.empty(prompts, layers, length, heads)
    with torch.no_grad():
        for layer in range(layers):
            for index, node in enumerate(NODE_KINDS):
                if node in kinds:
                    found.nodes[:, layer, :, index] = _patched_nodes(bridge, pair, layer, node, real)
            for index, head in enumerate(HEAD_KINDS):
                if head in kinds:
                    found.heads[:, layer, :, index] = _patched_heads(bridge, pair, layer, head, real)
    return found


def attention_scale(bridge: TransformerBridge, layer: int) -> float:
    """What GPT-2 multiplies q k with before the softmax."""
    scale = float(bridge.cfg.d_head) ** -0.5
    config = bridge.original_model.config
    return scale / (layer + 1) if getattr(config, "scale_attn_by_inverse_layer_idx", False) else scale


def pattern_of(bridge: TransformerBridge, layer: int, queries: Tensor, keys: Tensor) -> Tensor:
    """(P, H, T, T) causal attention of (P, T, H, K) queries to keys."""
    import torch

    scores = torch.einsum("pthk,pshk->phts", queries, keys) * attention_scale(bridge, layer)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(dim=-1)


def _names(bridge: TransformerBridge) -> list[str]:
    """The hooks that are cached: those of _CACHED, by the names that TransformerLens' own documentation uses."""
    in_block = [
        *(f"hook_{kind}" for kind in (*NODE_KINDS, "resid_mid")),
        *(f"attn.hook_{kind}" for kind in (*HEAD_KINDS, "pattern")),
        "mlp.hook_pre",
        "mlp.hook_post",
        *(f"{norm}.{end}" for norm in ("ln1", "ln2") for end in ("hook_in", "hook_out")),
    ]
    blocks = [f"blocks.{layer}.{name}" for layer in range(bridge.cfg.n_layers) for name in in_block]
    return [*blocks, "ln_final.hook_in", "ln_final.hook_out"]


def _patched_nodes(
    bridge: TransformerBridge, pair: Pair, layer: int, kind: NodeKind, real: Collection[Nonlinearity]
) -> Array:
    """(P, T) effects of one kind of node of a layer."""
    import torch

    name = f"blocks.{layer}.hook_{kind}"
    change = pair.difference(name)  # (P, T, D)
    places = change.abs().amax(dim=-1).nonzero()  # (runs, 2): prompt and position
    found = torch.zeros(pair.shape, dtype=change.dtype, device=change.device)
    after = layer + (kind == "mlp_out")  # what an MLP writes is in the stream that the next block reads
    for some in _batches(places, pair.shape[1]):
        rows, positions = some.unbind(1)
        runs = torch.arange(len(rows), device=rows.device)
        stream = _stream(bridge, pair, after)[rows]
        patches: list[Hook] = []
        if kind == "attn_out":

            def patch(x: Tensor, hook: Any, runs: Any = runs, rows: Any = rows, positions: Any = positions) -> Tensor:
                x = x.clone()
                x[runs, positions] += change[rows, positions]
                return x

            patches.append((name, patch))
        else:
            stream[runs, positions] += change[rows, positions]
        found[rows, positions] = _effect(bridge, pair, rows, after, stream, real, after_linear=patches)
    return np.asarray(found.double().cpu().numpy())


def _patched_heads(
    bridge: TransformerBridge, pair: Pair, layer: int, kind: HeadKind, real: Collection[Nonlinearity]
) -> Array:
    """(P, H) effects of one kind of activation of the heads of a layer, at all positions at once."""
    import torch

    name = f"blocks.{layer}.attn.hook_{kind}"
    change = pair.difference(name)  # (P, T, H, K)
    places = change.abs().amax(dim=(1, 3)).nonzero()  # (runs, 2): prompt and head
    found = torch.zeros(change.shape[0], change.shape[2], dtype=change.dtype, device=change.device)
    for some in _batches(places, pair.shape[1]):
        rows, heads = some.unbind(1)
        runs = torch.arange(len(rows), device=rows.device)

        def patch(x: Tensor, hook: Any, runs: Any = runs, rows: Any = rows, heads: Any = heads) -> Tensor:
            x = x.clone()
            x[runs, :, heads] += change[rows, :, heads]
            return x

        stream = _stream(bridge, pair, layer)[rows]
        where = "after_linear" if kind == "z" else "before_linear"
        found[rows, heads] = _effect(bridge, pair, rows, layer, stream, real, **{where: [(name, patch)]})
    return np.asarray(found.double().cpu().numpy())


def _batches(places: Tensor, length: int) -> Iterator[Tensor]:
    at_once = max(1, TOKENS_AT_ONCE // length)
    yield from (places[start : start + at_once] for start in range(0, len(places), at_once))


def _stream(bridge: TransformerBridge, pair: Pair, layer: int) -> Tensor:
    """(P, T, D) the corrupt residual stream in front of a layer, or behind the last."""
    last = layer == bridge.cfg.n_layers
    return pair.corrupt["ln_final.hook_in" if last else f"blocks.{layer}.hook_resid_pre"]


def _effect(
    bridge: TransformerBridge,
    pair: Pair,
    rows: Tensor,
    layer: int,
    stream: Tensor,
    real: Collection[Nonlinearity],
    *,
    before_linear: Sequence[Hook] = (),
    after_linear: Sequence[Hook] = (),
) -> Tensor:
    """(B,) change of the metric, in logits, if a run goes on from a (B, T, D) stream in front of a layer.

    Hooks run in the order in which they are given: those `before_linear` are seen by what is linearised.
    """
    hooks = [*before_linear, *_tangents(bridge, pair, rows, layer, real), *after_linear]
    with bridge.hooks(fwd_hooks=hooks):
        for block in list(bridge.blocks)[layer:]:
            stream = block(stream)[0]
        read = bridge.ln_final(stream[:, -1:])[:, 0]  # (B, D)
    return ((read - pair.corrupt["ln_final.hook_out"][rows, -1]) * pair.direction[rows]).sum(dim=-1)


def _tangents(
    bridge: TransformerBridge, pair: Pair, rows: Tensor, layer: int, real: Collection[Nonlinearity]
) -> list[Hook]:
    """Hooks that put the tangent at the corrupt run in the place of each nonlinearity from a layer on that is not real."""
    hooks: list[Hook] = []
    for number in range(layer, int(bridge.cfg.n_layers)):
        block, prefix = bridge.blocks[number], f"blocks.{number}."
        if "norm" not in real:
            hooks += _norm_tangent(pair, rows, block.ln1, f"{prefix}ln1")
            hooks += _norm_tangent(pair, rows, block.ln2, f"{prefix}ln2")
        if "softmax" not in real:
            hooks += _attention_tangent(pair, rows, attention_scale(bridge, number), f"{prefix}attn")
        if "activation" not in real:
            hooks += _activation_tangent(pair, rows, block.mlp.original_component.act, f"{prefix}mlp")
    if "norm" not in real:
        hooks += _norm_tangent(pair, rows, bridge.ln_final, "ln_final", last=True)
    return hooks


def _replaced(inputs: Sequence[str], output: str, tangent: Callable[..., Tensor]) -> list[Hook]:
    """Hooks that replace what stands at `output` by a function of what stood at `inputs`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(x: Tensor, hook: Any) -> None:
            seen[name] = x

        return hook

    def replace(x: Tensor, hook: Any) -> Tensor:
        return tangent(*(seen.pop(name) for name in inputs))

    return [*((name, keep(name)) for name in inputs), (output, replace)]


def _norm_tangent(pair: Pair, rows: Tensor, norm: Any, name: str, *, last: bool = False) -> list[Hook]:
    """dy = gamma (dx - n mean(n dx)) / sigma for centred dx, n = (x - mean x) / sigma and sigma^2 = var x + eps.

    A model without norms has nothing to linearise there. With `last`, only the last position is read.
    """
    from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge

    if not isinstance(norm, NormalizationBridge):
        return []
    own: Any = norm.original_component
    positions = slice(-1, None) if last else slice(None)

    def tangent(now: Tensor) -> Tensor:
        x, y = (pair.corrupt[f"{name}.{end}"][rows, positions] for end in ("hook_in", "hook_out"))
        sigma = (x.var(dim=-1, correction=0, keepdim=True) + own.eps).sqrt()
        normed = (x - x.mean(dim=-1, keepdim=True)) / sigma
        dx = now - x
        dx = dx - dx.mean(dim=-1, keepdim=True)
        return y + own.weight * (dx - normed * (normed * dx).mean(dim=-1, keepdim=True)) / sigma

    return _replaced([f"{name}.hook_in"], f"{name}.hook_out", tangent)


def _attention_tangent(pair: Pair, rows: Tensor, scale: float, name: str) -> list[Hook]:
    """dz = dA v + A dv, with dA = A (dS - sum over keys of A dS) and dS = (dq k + q dk) scale."""
    import torch

    def tangent(*now: Tensor) -> Tensor:
        q, k, v, z, pattern = (pair.corrupt[f"{name}.hook_{kind}"][rows] for kind in (*"qkvz", "pattern"))
        dq, dk, dv = (one - corrupt for one, corrupt in zip(now, (q, k, v), strict=True))
        scores = torch.einsum("bthk,bshk->bhts", dq, k) + torch.einsum("bthk,bshk->bhts", q, dk)
        moved = pattern * scores * scale
        moved = moved - pattern * moved.sum(dim=-1, keepdim=True)
        return z + torch.einsum("bhts,bshk->bthk", moved, v) + torch.einsum("bhts,bshk->bthk", pattern, dv)

    return _replaced([f"{name}.hook_{kind}" for kind in "qkv"], f"{name}.hook_z", tangent)


def _activation_tangent(pair: Pair, rows: Tensor, function: Any, name: str) -> list[Hook]:
    """Element by element, with the derivative from automatic differentiation."""
    import torch

    def tangent(now: Tensor) -> Tensor:
        before = pair.corrupt[f"{name}.hook_pre"][rows]
        after, change, *_ = torch.func.jvp(function, (before,), (now - before,))
        return after + change

    return _replaced([f"{name}.hook_pre"], f"{name}.hook_post", tangent)
