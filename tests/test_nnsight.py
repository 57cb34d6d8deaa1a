"""LN-free models in nnsight (an extra): it loads them, traces them, and edits what it traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from disarmed_model import disarm
from small_model import write_model
from torch import Tensor
from transformers import AutoTokenizer, GPT2LMHeadModel

from ln_removal import NormFreeGPT2LMHeadModel, from_disarmed

nnsight = pytest.importorskip("nnsight")
# 0.8 renames it to TransformersModel; users know it by the old name, which goes on working.
pytestmark = pytest.mark.filterwarnings("ignore:LanguageModel is deprecated")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted published model with its tokenizer."""
    place = write_model(tmp_path_factory.mktemp("model"))
    model = GPT2LMHeadModel.from_pretrained(place)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # each part writes enough to be seen
    from_disarmed(disarm(model)).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def model(directory: Path) -> NormFreeGPT2LMHeadModel:
    return NormFreeGPT2LMHeadModel.from_pretrained(directory).eval()


@pytest.fixture(scope="module", params=["in memory", "directory"])
def traced(request: pytest.FixtureRequest, directory: Path, model: NormFreeGPT2LMHeadModel):  # type: ignore[no-untyped-def]
    if request.param == "directory":
        return nnsight.LanguageModel(str(directory), device_map="cpu", dispatch=True)
    return nnsight.LanguageModel(model, tokenizer=AutoTokenizer.from_pretrained(directory))


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(0))


def test_saved_activations_are_the_hidden_states(traced, model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    with torch.no_grad(), traced.trace(ids):
        first = traced.transformer.h[0].output.save()
        final = traced.transformer.ln_f.output.save()
        logits = traced.lm_head.output.save()
    first = first[0] if isinstance(first, tuple) else first
    assert torch.equal(first, expected.hidden_states[1])
    assert torch.equal(final, expected.hidden_states[-1])
    assert torch.equal(logits, expected.logits)


def test_streams_add_up(traced, model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad(), traced.trace(ids):
        entering = traced.transformer.h[0].ln_1.input.save()
        # in the order in which they are computed, which nnsight asks for
        parts = nnsight.save([x.c_proj.output for block in traced.transformer.h for x in (block.attn, block.mlp)])
        logits = traced.lm_head.output.save()
    with torch.no_grad():
        total = entering + sum(parts)
        found = total @ model.lm_head.weight.T + model.lm_head.bias
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)


def test_patching(traced, model: NormFreeGPT2LMHeadModel, ids: Tensor) -> None:  # type: ignore[no-untyped-def]
    """Leaving out the last MLP changes the logits by exactly what it wrote, since no norm reads it."""
    with torch.no_grad(), traced.trace(ids):
        written = traced.transformer.h[-1].mlp.c_proj.output.save()
        before = traced.lm_head.output.save()
    with torch.no_grad(), traced.trace(ids):
        traced.transformer.h[-1].mlp.c_proj.output[:] = 0
        after = traced.lm_head.output.save()
    with torch.no_grad():
        direct = written @ model.lm_head.weight.T
    assert direct.abs().max() > 1e-3
    torch.testing.assert_close(before - after, direct, rtol=1e-4, atol=1e-5)


def test_text_is_tokenized(traced) -> None:  # type: ignore[no-untyped-def]
    with torch.no_grad(), traced.trace("return total"):
        logits = traced.lm_head.output.save()
    assert logits.shape[-1] == 320 and torch.isfinite(logits).all()
