"""What is tried before the first step: the probe of a micro-batch, and the odd text that training mixes in."""

from __future__ import annotations

import copy
import platform
import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny_training import CONTEXT, EOT, tiny_model
from torch.profiler import ProfilerActivity, profile

from ln_removal.config.recipe import load_recipe
from ln_removal.data.stress_text import stress_sequences
from ln_removal.errors import UserError
from ln_removal.models.attention import EXPLICIT_ATTENTION, FUSED_ATTENTION, EntropyRegulariser
from ln_removal.models.blocked_attention import blocked_attention
from ln_removal.norms.surgery import install
from ln_removal.training import session, setup
from ln_removal.training.loss import Auxiliary, Distillation, EntropyPenalty, Objective, as_teacher


def test_the_probe_leaves_nothing_and_gives_a_teacher_no_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    teacher = as_teacher(copy.deepcopy(model), "float32")
    sites = install(model, eot_token_id=EOT)
    auxiliary, distillation = Auxiliary(0.1, sites="all"), Distillation(teacher, 0.5, 0.3)
    objective = Objective(model, eot_token_id=EOT, auxiliary=auxiliary, distillation=distillation)
    recipe = load_recipe("tiny", {"data.context": CONTEXT, "training.precision": "float32"})
    accelerator = setup.build_accelerator("cpu")
    given: list[int] = []
    original = torch.empty_like

    def noted(tensor: torch.Tensor, **options: Any) -> torch.Tensor:
        given.append(id(tensor))
        return original(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", noted)
    before = copy.deepcopy(model.state_dict())
    assert setup._fits(objective, 2, recipe, accelerator)
    assert all(given.count(id(parameter)) == 2 for parameter in model.parameters())
    assert not set(given) & set(map(id, teacher.parameters()))
    hook = model.transformer.ln_f.register_forward_pre_hook(_out_of_memory)
    assert not setup._fits(objective, 2, recipe, accelerator)
    hook.remove()
    assert not (objective._listening or objective._read)
    assert all(torch.equal(found, before[name]) for name, found in model.state_dict().items()), "nor any statistics"
    assert all(parameter.grad is None for parameter in objective.parameters())
    assert all(norm.training for norm in sites.norms.values()) and not teacher.training


def _out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError


FREED_AND_ASKED_FOR_AGAIN = """
import resource, torch
from ln_removal.training.setup import build_accelerator
build_accelerator("cpu")
def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(25_000_000)  # 100 MB: 24,000 pages, or 48 huge ones
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
page_faults()
print(min(page_faults() for _ in range(3)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_that_a_step_frees_is_not_asked_for_again() -> None:
    # A process of its own, as a training is: what other tests have left in the heap decides where a tensor lies.
    done = subprocess.run([sys.executable, "-c", FREED_AND_ASKED_FOR_AGAIN], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20


def test_the_odd_text_that_is_scored_is_not_trained_on() -> None:
    from ln_removal.models.loading import load_tokenizer

    tokenizer = load_tokenizer("tiny")
    recipe = load_recipe("tiny", {"data.context": 256, "data.odd_text": 0.1})
    mixture = session._odd_text(recipe, tokenizer)
    assert mixture is not None and mixture.sequences.shape == (5 * session.ODD_SEQUENCES, 257)
    trained = {tuple(row) for row in mixture.sequences[:, :256].tolist()}
    scored = stress_sequences(tokenizer, context=256, count=16, seed=0)
    for kind in ("form feeds", "tabs", "white space", "random tokens"):
        assert not trained & {tuple(row) for row in scored[kind].tolist()}, kind


@pytest.mark.parametrize(("context", "explicit"), [(128, True), (129, False), (1024, False)])
def test_short_sequences_on_a_cpu_get_explicit_attention(context: int, explicit: bool) -> None:
    model = tiny_model()
    before = model.config._attn_implementation
    with setup.training_attention(model, context=context):
        assert model.config._attn_implementation == (EXPLICIT_ATTENTION if explicit else FUSED_ATTENTION)
    with setup.training_attention(model, context=context, shown=True):
        assert model.config._attn_implementation == EXPLICIT_ATTENTION
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("length", [40, 256, 700, 2500])
def test_attention_in_blocks_is_attention(length: int) -> None:
    """float64, against PyTorch's own: values and gradients, for one block, several, and a part of one."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, length, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)
    )
    weights = torch.randn(1, 2, length, 8, generator=generator, dtype=torch.float64)
    found = []
    for heads in (
        blocked_attention(query, key, value),
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True),
    ):
        found.append((heads, *torch.autograd.grad((heads * weights).sum(), (query, key, value))))
    # The rows are summed in float32.
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_compiled_step_on_a_cpu_has_attention_in_blocks() -> None:
    """In bfloat16 it is as close to float32 as PyTorch's fused kernel is, which an eager step has."""
    model = tiny_model(positions=300)
    tokens = torch.randint(0, EOT, (2, 301), generator=torch.Generator().manual_seed(0))
    gradients, kernels = {}, {}
    for name, precision, compiled in (("exact", False, False), ("fused", True, False), ("blocked", True, True)):
        torch._dynamo.reset()
        objective = Objective(model, eot_token_id=EOT)
        objective.train()
        if compiled:
            objective.compile(dynamic=False, fullgraph=True, backend="aot_eager")
        with setup.training_attention(model, context=300), profile(activities=[ProfilerActivity.CPU]) as recorded:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision):
                loss = objective(tokens).total
            loss.backward()
        kernels[name] = any("flash_attention" in event.key for event in recorded.key_averages())
        gradients[name] = model.transformer.h[0].attn.c_attn.weight.grad.clone()
        model.zero_grad()
    assert kernels == {"exact": True, "fused": True, "blocked": False}

    def error(name: str) -> float:
        return float((gradients[name] - gradients["exact"]).norm() / gradients["exact"].norm())

    assert error("blocked") < 1.5 * error("fused") < 0.1


def test_a_fault_of_the_compiler_is_one_line() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ImportError("/cache/kernel.so: file too short")

    torch._dynamo.reset()
    compiled = torch.compile(lambda values: values + 1, backend=broken)
    with (
        pytest.raises(UserError, match=r"kernel\.so: file too short.*delete .*, or set training\.compile") as found,
        setup.compiler_faults(),
    ):
        compiled(torch.ones(2))
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="mine"), setup.compiler_faults():
        raise ValueError("mine")


def test_the_entropy_penalty_goes_with_activations_that_are_computed_again() -> None:
    tokens = torch.randint(0, EOT, (3, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    gradients: list[list[torch.Tensor | None]] = []
    for again in (False, True):
        model = tiny_model()
        regulariser = EntropyRegulariser(model.config.n_layer, model.config.n_head, tolerance=0.0)
        objective = Objective(model, eot_token_id=EOT, entropy=EntropyPenalty(1.0, regulariser))
        if again:
            setup.checkpoint_activations(model)
        objective.train()
        with setup.training_attention(model, context=CONTEXT, shown=True):
            objective(tokens).total.backward()
        gradients.append([model.transformer.h[0].attn.c_attn.weight.grad, regulariser.thresholds.grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None and float(plain.abs().sum()) > 0
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)
