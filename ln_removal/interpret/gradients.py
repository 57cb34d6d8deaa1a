"""Gradients of a task's metric by the activations of corrupt runs, and what they say of the edges between components.

The metric m is logit(answer) - logit(wrong answer) behind the prompt. Gradients come from TransformerLens.

Shape legend: P prompts, T tokens, H heads, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ln_removal.interpret.tasks import PromptBatch, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

IG_STEPS = 5
"""Runs of integrated gradients by default."""


def mean_gradients(bridge: TransformerBridge, batch: PromptBatch, names: list[str], steps: int) -> dict[str, Tensor]:
    """dm/da by hook name, mean over `steps` runs from the corrupt embeddings towards the clean ones (TransformerLens)."""
    import torch
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    assert batch.corrupt is not None
    with torch.no_grad():
        _, clean = bridge.run_with_cache(batch.clean, names_filter=["hook_embed"])

    def metric(logits: Tensor) -> Tensor:
        answers = torch.stack([batch.answer, batch.wrong], dim=1)
        right, wrong = logits[:, -1].gather(1, answers).unbind(1)
        return (right - wrong).sum()  # prompts do not see each other, so each gets its own gradient

    found: dict[str, Tensor] = {}
    for step in range(steps):

        def towards(x: Tensor, hook: Any, share: float = step / steps) -> Tensor:
            return x + share * (clean["hook_embed"] - x)

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if step:
                stack.enter_context(bridge.hooks(fwd_hooks=[("hook_embed", towards)]))
            slopes = cache_activation_and_gradient(bridge, batch.corrupt, metric, names_filter=names).gradients
        for name in names:
            slope = slopes[name]
            assert slope is not None, name
            found[name] = found[name] + slope / steps if step else slope / steps
    return found


def edge_effects(bridge: TransformerBridge, task: Task, *, steps: int = IG_STEPS) -> dict[tuple[str, str], float]:
    """Estimated effect of every edge from what a component writes to what a later one reads, in logits (EAP-IG).

    The effect is (written_clean - written_corrupt) dm/d(read), summed over positions, mean over prompts. With `steps=1` it is that
    of TransformerLens' attribution_patch at edge granularity. The edges that leave a component sum to its node's effect.

    Args:
        steps: runs of integrated gradients.

    Returns:
        By writer ("embed", "L0H2", "0_mlp_out") and reader ("L1H0 q", "L1H0 k", "L1H0 v", "1_mlp_in", "logits").
    """
    import torch

    layers, heads = range(int(bridge.cfg.n_layers)), int(bridge.cfg.n_heads)
    writers = ["hook_embed"]
    writers += [f"blocks.{i}.{name}" for i in layers for name in ("attn.hook_result", "hook_mlp_out")]
    readers = [
        f"blocks.{i}.{name}" for i in layers for name in (*(f"attn.hook_{k}_input" for k in "qkv"), "hook_mlp_in")
    ]
    readers.append(f"blocks.{layers[-1]}.hook_resid_post")
    totals: dict[tuple[str, str], float] = {}
    with _edge_hooks(bridge):
        for batch in task.batches(bridge, size=4):
            assert batch.corrupt is not None
            with torch.no_grad():
                _, clean = bridge.run_with_cache(batch.clean, names_filter=writers)
                _, corrupt = bridge.run_with_cache(batch.corrupt, names_filter=writers)
            slopes = mean_gradients(bridge, batch, readers, steps)
            for writer in writers:
                change = _by_head(clean[writer] - corrupt[writer])  # (P, T, 1 or H, D)
                for reader in readers:
                    if _order(writer) >= _order(reader):
                        continue
                    scores = torch.einsum("ptwd,ptrd->wr", change, _by_head(slopes[reader])).double().tolist()
                    for place, row in enumerate(scores):
                        for other, score in enumerate(row):
                            edge = _label(writer, place, heads), _label(reader, other, heads)
                            totals[edge] = totals.get(edge, 0.0) + score / len(task.prompts)
    return totals


@contextmanager
def _edge_hooks(bridge: TransformerBridge) -> Iterator[None]:
    """Let TransformerLens compute what each head writes, and what each head and MLP reads, by itself."""
    cfg = bridge.cfg
    before = bool(cfg.use_attn_result), bool(cfg.use_split_qkv_input), bool(cfg.use_hook_mlp_in)

    def use(result: bool, split: bool, mlp: bool) -> None:
        bridge.set_use_attn_result(result)
        bridge.set_use_split_qkv_input(split)
        bridge.set_use_hook_mlp_in(mlp)

    try:
        use(True, True, True)
        yield
    finally:
        use(*before)


def _by_head(values: Tensor) -> Tensor:
    """(P, T, H, D), with one head for what has none."""
    return values if values.ndim == 4 else values[:, :, None]


def _order(hook: str) -> float:
    """When a hook's activation is written or read: the attention of a layer before its MLP, writing after reading."""
    if hook == "hook_embed":
        return -1
    layer = int(hook.split(".")[1])
    part = ("_input", "hook_result", "hook_mlp_in", "hook_mlp_out", "hook_resid_post")
    return layer + next(index for index, end in enumerate(part) if hook.endswith(end)) / len(part)


def _label(hook: str, place: int, heads: int) -> str:
    """The name of a writer or reader, as in TransformerLens' labels of components."""
    if hook == "hook_embed":
        return "embed"
    if hook.endswith("hook_resid_post"):
        return "logits"
    layer = hook.split(".")[1]
    if ".attn." in hook:
        head = f"L{layer}H{place}"
        return head if hook.endswith("result") else f"{head} {hook.removesuffix('_input')[-1]}"
    return f"{layer}_{hook.rpartition('hook_')[2]}"
