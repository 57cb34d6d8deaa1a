"""Attribution patching: gradients in the place of patched runs, and how far these estimates are off.

The metric m is logit(answer) - logit(wrong answer) behind the prompt. An estimate of the effect of setting an activation a of
the corrupt run to its clean value needs no patched run:

    atp        (a_clean - a_corrupt) dm/da at the corrupt run (Nanda 2023; `transformer_lens.tools.analysis.attribution_patch`)
    atp-star   the same, but queries and keys change the pattern A exactly: (A(q_clean, k) - A(q, k)) dm/dA, and so for keys
               (the QK fix of AtP*, Kramar et al. 2024, arXiv 2403.00745; without its GradDrop)
    eap-ig     (a_clean - a_corrupt) times the mean of dm/da over n runs, whose embeddings are e_corrupt + i/n (e_clean - e_corrupt)
               for i = 0 ... n-1 (Hanna et al. 2024, arXiv 2403.17806). n = 1 is atp.

The exact effects are those of `interventions.activation_patching`.

    error        100 mean |estimate - exact| / mean |exact|, per cent, over layers, positions or heads, and prompts
    correlation  Pearson's, of estimate and exact within a prompt; mean over prompts
    published    mean and standard deviation of (estimate - exact) / (clean - corrupt) over prompts whose |clean - corrupt| > 0.2
                 (Baroni et al., arXiv 2507.02559)

The error budget is the same error of atp against runs in which one nonlinearity alone is real and the others are linearised.
The estimate is the same in all of them, because tangents have the same gradient at the corrupt run.

Shape legend: P prompts, L layers, T tokens, H heads, D model width, K width of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import Interval, bootstrap_means
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.gradients import IG_STEPS, edge_effects, mean_gradients
from ln_removal.interpret.interventions import (
    HEAD_KINDS,
    NODE_KINDS,
    NONLINEARITIES,
    Array,
    Effects,
    Nonlinearity,
    Pair,
    activation_patching,
    pattern_of,
    run_pair,
)
from ln_removal.interpret.models import Models
from ln_removal.interpret.tasks import PromptBatch, Task, logit_differences

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

Method = Literal["atp", "atp-star", "eap-ig"]
METHODS: tuple[Method, ...] = get_args(Method)

SMALLEST_GAP = 0.2
"""Prompts with a smaller |clean - corrupt|, in logits, are left out of the published statistic."""

BUDGET: dict[str, tuple[Nonlinearity, ...]] = {
    "none": (),
    **{name: (name,) for name in NONLINEARITIES},
    "all": NONLINEARITIES,
}
"""Name of each row of the error budget, and what is real in it."""


@dataclass(frozen=True)
class Published:
    """Mean and standard deviation of (estimate - exact) / (clean - corrupt), and the number of prompts."""

    mean: float
    deviation: float
    prompts: int


@dataclass(frozen=True)
class Patching:
    """Effects of patches in one model, exact and estimated, in logits.

    Attributes:
        clean, corrupt: (P,) logit differences of the runs.
        exact: by runs of their own.
        estimates: by method.
        budget: exact effects on `resid_pre` by row of BUDGET; empty if it was not asked for.
        edges: the largest edges of eap-ig as (writer, reader, logits); empty without it.
    """

    clean: Array
    corrupt: Array
    exact: Effects
    estimates: dict[Method, Effects]
    budget: dict[str, Effects]
    edges: list[tuple[str, str, float]]

    def error(self, method: Method, kind: str, *, seed: int = 0) -> Interval:
        """The error of a method on a kind of node or head, per cent, with its 95 % interval over prompts."""
        return error_of(self.estimates[method].of(kind), self.exact.of(kind), seed=seed)

    def correlation(self, method: Method, kind: str, *, seed: int = 0) -> Interval:
        """Pearson's correlation of estimate and exact effects within a prompt, with its interval over prompts."""
        pairs = zip(self.estimates[method].of(kind), self.exact.of(kind), self._reached(kind), strict=True)
        found = np.array([_pearson(estimate[some], exact[some]) for estimate, exact, some in pairs])
        found = found[np.isfinite(found)]
        if not len(found):
            return Interval(np.nan, np.nan, np.nan)
        (mean,) = bootstrap_means(found[None], np.ones(len(found)), seed=seed)
        return mean

    def published(self, method: Method, kind: str) -> Published:
        """(estimate - exact) / (clean - corrupt) over the effects of a kind, from the first token that differs on."""
        gap = self.clean - self.corrupt
        some = np.abs(gap) > SMALLEST_GAP
        estimate, exact = (one.of(kind)[some] for one in (self.estimates[method], self.exact))
        off = ((estimate - exact) / gap[some, None])[self._reached(kind)[some]]
        if not off.size:
            return Published(np.nan, np.nan, 0)
        return Published(float(off.mean()), float(off.std()), int(some.sum()))

    def _reached(self, kind: str) -> npt.NDArray[np.bool_]:
        """(P, effects of a kind) which of them are not at a position before the first token that differs, where all are 0."""
        reached = np.nan_to_num(self.exact.nodes).any(axis=(1, 3), keepdims=True)  # (P, 1, T, 1)
        of_nodes = np.broadcast_to(reached, self.exact.nodes.shape)
        return Effects(of_nodes, np.isfinite(self.exact.heads)).of(kind).astype(bool)  # type: ignore[arg-type]

    def budget_error(self, row: str, *, seed: int = 0) -> Interval:
        """The error of atp on `resid_pre` if only what the row names is real, per cent."""
        return error_of(self.estimates["atp"].of("resid_pre"), self.budget[row].of("resid_pre"), seed=seed)

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Mean effects, and errors with intervals."""
        from ln_removal.interpret.entropies import nullable

        ones = np.ones(len(self.clean))
        clean, corrupt = bootstrap_means(np.stack([self.clean, self.corrupt]), ones, seed=seed)

        def means(effects: Effects) -> dict[str, Any]:
            nodes = {kind: nullable(mean_of(effects.nodes[..., i])) for i, kind in enumerate(NODE_KINDS)}
            heads = {kind: nullable(mean_of(effects.heads[..., i])) for i, kind in enumerate(HEAD_KINDS)}
            return {"nodes_logits": nodes, "heads_logits": heads}

        estimates: dict[str, Any] = {}
        for method in self.estimates:
            by_kind = {}
            for kind in (*NODE_KINDS, *HEAD_KINDS):
                published = self.published(method, kind)
                by_kind[kind] = {
                    "error_per_cent": interval_json(self.error(method, kind, seed=seed)),
                    "correlation": interval_json(self.correlation(method, kind, seed=seed)),
                    "published": {
                        "mean": _finite(published.mean),
                        "standard_deviation": _finite(published.deviation),
                        "prompts": published.prompts,
                    },
                }
            estimates[method] = {**means(self.estimates[method]), "by_kind": by_kind}
        return {
            "clean_logit_difference": interval_json(clean),
            "corrupt_logit_difference": interval_json(corrupt),
            "exact": means(self.exact),
            "estimates": estimates,
            "error_budget_per_cent": {row: interval_json(self.budget_error(row, seed=seed)) for row in self.budget},
            "largest_edges": [{"from": one, "to": two, "logits": score} for one, two, score in self.edges],
        }


@dataclass(frozen=True)
class PatchingByModel:
    """Patching of the same prompts in every model of a run.

    Attributes:
        found: by role.
        ig_steps: runs of integrated gradients.
    """

    found: dict[str, Patching]
    task: Task
    methods: tuple[Method, ...]
    ig_steps: int
    names: dict[str, str]
    seed: int

    def to_json(self) -> dict[str, Any]:
        """By model, with what was read and the units in the names."""
        return {
            "task": self.task.to_json(),
            "ig_steps": self.ig_steps,
            "models": {
                role: {"name": self.names.get(role), **one.to_json(seed=self.seed)} for role, one in self.found.items()
            },
        }


def error_of(estimate: Array, exact: Array, *, seed: int = 0) -> Interval:
    """100 mean |estimate - exact| / mean |exact| of (P, effects), per cent, with its 95 % interval over prompts."""
    off, size = (np.nansum(np.abs(values), axis=1) for values in (estimate - exact, exact))
    some = size > 0  # a prompt on which nothing has an effect says nothing
    if not some.any():
        return Interval(np.nan, np.nan, np.nan)
    (found,) = bootstrap_means(100 * off[None, some], size[some], seed=seed)
    return found


def mean_of(values: Array) -> Array:
    """Mean over prompts of (P, ...), of those prompts that have the position."""
    count = np.isfinite(values).sum(axis=0)
    return np.asarray(np.divide(np.nansum(values, axis=0), count, out=np.full(count.shape, np.nan), where=count > 0))


def estimated_effects(
    bridge: TransformerBridge,
    batch: PromptBatch,
    methods: Collection[Method] = METHODS,
    *,
    ig_steps: int = IG_STEPS,
    pair: Pair | None = None,
) -> dict[Method, Effects]:
    """The estimates of each method.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, in evaluation mode, weights not processed.
        batch: prompts with corrupt twins, all of one length.
        ig_steps: runs of eap-ig; at least 1.
        pair: from `run_pair`, if it was run before.
    """
    pair = run_pair(bridge, batch) if pair is None else pair
    layers = range(int(bridge.cfg.n_layers))
    names = [f"blocks.{layer}.hook_{kind}" for layer in layers for kind in NODE_KINDS]
    names += [f"blocks.{layer}.attn.hook_{kind}" for layer in layers for kind in (*HEAD_KINDS, "pattern")]
    found: dict[Method, Effects] = {}
    for method in methods:
        steps = ig_steps if method == "eap-ig" else 1
        slopes = mean_gradients(bridge, batch, names, steps)
        found[method] = _first_order(bridge, pair, slopes)
        if method == "atp-star":
            _fix_queries_and_keys(bridge, pair, slopes, found[method])
    return found


def patching_of_run(
    models: Models,
    task: Task,
    methods: Sequence[Method] = METHODS,
    *,
    ig_steps: int = IG_STEPS,
    budget: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> PatchingByModel:
    """Exact effects, estimates and the error budget in every model of a run, on the same prompts.

    Args:
        models: from `load`.
        task: from `tasks.make_task` or `tasks.read_task`; its prompts need corrupt twins.
        methods: of estimation; none measures exact effects only.
        budget: run the error budget, too, which takes about three times as many patched runs of the residual stream.
        seed: of the bootstrap.
        progress: show a progress bar over prompts and models.

    Raises:
        UserError: the prompts have no corrupt twins, or are longer than the models' context.
    """
    from tqdm.auto import tqdm

    if not task.paired:
        raise UserError(
            f"the prompts of {task.name} have no corrupt twins to patch into; choose another task, or give a jsonl file with "
            "clean, corrupt, answer, wrong"
        )
    found: dict[str, Patching] = {}
    with tqdm(
        total=len(models.items()) * len(task.prompts), desc="patching", unit="prompt", disable=not progress
    ) as bar:
        for role, bridge in models.items():
            found[role] = _patching(bridge, task, methods, ig_steps, bar, budget=budget)
    return PatchingByModel(found, task, tuple(methods), ig_steps, dict(models.names), seed)


def _patching(
    bridge: TransformerBridge, task: Task, methods: Sequence[Method], ig_steps: int, bar: Any, *, budget: bool
) -> Patching:
    clean, corrupt = logit_differences(bridge, task)
    assert corrupt is not None
    sizes = len(task.prompts), int(bridge.cfg.n_layers), task.length, int(bridge.cfg.n_heads)
    exact = Effects.empty(*sizes)
    needed = dict.fromkeys([*methods, *(["atp"] if budget else [])])  # the budget is that of atp
    estimates: dict[Method, Effects] = {method: Effects.empty(*sizes) for method in needed}  # type: ignore[misc]
    shares = {row: Effects.empty(*sizes) for row in BUDGET} if budget else {}
    for batch in task.batches(bridge, size=16):
        pair = run_pair(bridge, batch)
        whole = activation_patching(bridge, batch, pair=pair)
        exact.fill(batch.places, whole)
        for method, part in estimated_effects(bridge, batch, list(estimates), ig_steps=ig_steps, pair=pair).items():
            estimates[method].fill(batch.places, part)
        for row, share in shares.items():
            real = BUDGET[row]
            measured = (
                whole
                if row == "all"
                else activation_patching(bridge, batch, real=real, kinds=("resid_pre",), pair=pair)
            )
            share.fill(batch.places, measured)
        bar.update(len(batch.places))
    edges = edge_effects(bridge, task, steps=ig_steps) if "eap-ig" in methods else {}
    largest = sorted(edges.items(), key=lambda item: -abs(item[1]))[:20]
    return Patching(clean, corrupt, exact, estimates, shares, [(*edge, score) for edge, score in largest])


def _first_order(bridge: TransformerBridge, pair: Pair, slopes: dict[str, Tensor]) -> Effects:
    """(a_clean - a_corrupt) dm/da of all nodes and heads."""
    prompts, length = pair.shape
    found = Effects.empty(prompts, int(bridge.cfg.n_layers), length, int(bridge.cfg.n_heads))
    for layer in range(int(bridge.cfg.n_layers)):
        for index, node in enumerate(NODE_KINDS):
            name = f"blocks.{layer}.hook_{node}"
            found.nodes[:, layer, :, index] = _numpy((pair.difference(name) * slopes[name]).sum(dim=-1))
        for index, head in enumerate(HEAD_KINDS):
            name = f"blocks.{layer}.attn.hook_{head}"
            found.heads[:, layer, :, index] = _numpy((pair.difference(name) * slopes[name]).sum(dim=(1, 3)))
    return found


def _fix_queries_and_keys(bridge: TransformerBridge, pair: Pair, slopes: dict[str, Tensor], found: Effects) -> None:
    """Put the effects of queries and keys through the real softmax: sum over the pattern of its change times dm/dA."""
    for layer in range(int(bridge.cfg.n_layers)):
        name = f"blocks.{layer}.attn.hook_"
        queries, keys = (pair.corrupt[f"{name}{kind}"] for kind in "qk")
        before = pair.corrupt[f"{name}pattern"]
        for kind, both in (("q", (pair.clean[f"{name}q"], keys)), ("k", (queries, pair.clean[f"{name}k"]))):
            moved = pattern_of(bridge, layer, *both) - before  # (P, H, T, T)
            effects = (moved * slopes[f"{name}pattern"]).sum(dim=(2, 3))
            found.heads[:, layer, :, HEAD_KINDS.index(kind)] = _numpy(effects)


def _pearson(first: Array, second: Array) -> float:
    """Pearson's correlation; NaN for fewer than two values, or without variation."""
    if len(first) < 2 or not first.std() or not second.std():
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _numpy(values: Tensor) -> Array:
    return np.asarray(values.double().cpu().numpy())


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
