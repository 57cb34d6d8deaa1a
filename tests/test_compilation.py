"""A compiled removal: one graph for the whole run, whatever freezes, with attention that flash kernels take."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import LAYERS, STEPS, TinyRun, tiny_schedule, tiny_spec
from torch._dynamo.utils import counters

TERMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "published": {"auxiliary_weight": 0.1},
    "everything": {
        "auxiliary_weight": 0.1,
        "auxiliary_target": "constants",
        "auxiliary_sites": "all",
        "distillation": 0.9,
        "distillation_end": 0.1,
    },
}


def train_counting(run: TinyRun) -> list[int]:
    """Train; returns how many graphs there were after each step."""
    graphs: list[int] = []

    def evaluate() -> dict[str, float]:
        graphs.append(counters["stats"]["unique_graphs"])
        return {}

    run.train(evaluate=evaluate)
    return graphs


def losses(run: TinyRun) -> list[float]:
    return [row["loss"] for row in run.metrics()]


@pytest.mark.parametrize("terms", TERMS)
def test_one_graph_serves_the_whole_removal(tmp_path: Path, terms: str) -> None:
    from torch._dynamo.backends.registry import lookup_backend

    masks: list[Any] = []

    # Capturing and differentiating is what could recompile; code generation is PyTorch's business.
    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        attention = [node for node in module.graph.nodes if "scaled_dot_product" in str(node.target)]
        masks.extend(node.kwargs["attn_mask"] for node in attention)
        return lookup_backend("aot_eager")(module, inputs)

    spec = tiny_spec(evaluate_every=1, **TERMS[terms])
    eager = TinyRun(tmp_path / "eager", spec=spec)
    eager.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = TinyRun(tmp_path / "compiled", spec=spec)
    compiled.objective.compile(dynamic=False, fullgraph=True, backend=backend)
    graphs = train_counting(compiled)
    assert graphs == [1] * STEPS, "no graph is added after the first step"
    assert tiny_schedule().complete_at < STEPS and compiled.sites is not None and compiled.sites.all_frozen()
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-4)
    teacher_too = 2 if "distillation" in TERMS[terms] else 1
    assert masks == [None] * LAYERS * teacher_too, "flash attention takes no mask"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_generated_code_trains_as_eager_does(tmp_path: Path) -> None:
    spec = tiny_spec(evaluate_every=1, **TERMS["published"])
    eager = TinyRun(tmp_path / "eager", spec=spec)
    eager.train()
    torch._dynamo.reset()
    counters.clear()
    compiled = TinyRun(tmp_path / "compiled", spec=spec)
    compiled.objective.compile(dynamic=False)
    assert train_counting(compiled) == [1] * STEPS
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-3)
