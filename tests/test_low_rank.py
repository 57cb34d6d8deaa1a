"""Low-rank changes: what is trained, what is merged, and that the norms of an adapted model freeze and fold."""

from __future__ import annotations

import pytest
import torch
from small_families import EOT, small_model, small_tokens

from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import fold, install
from ln_removal.training.low_rank import adapt, merge

VARIANTS = pytest.mark.parametrize("variant", ["gpt2", "neox", "llama-grouped-tied", "qwen2"])


def train_a_little(model: torch.nn.Module) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for seed in range(3):
        tokens = small_tokens(seed=seed)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@VARIANTS
def test_an_adapted_model_trains_and_merges_into_the_same_function(variant: str) -> None:
    model, tokens = small_model(variant), small_tokens(seed=9)
    names = [name for name, _ in model.named_parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(tokens).logits
    sites = install(model, eot_token_id=EOT)
    adapt(model, 2)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    train_a_little(model)
    sites.update_running(0.9)
    for site in sites.sites:
        sites.set_mix(site, 1)
    for special in ("eot", "first"):
        sites.set_special(special, 1)
    trained = model(tokens).logits
    merge(model)
    torch.testing.assert_close(model(tokens).logits, trained, rtol=1e-5, atol=1e-5)
    folded = from_folded(model.config, fold(model))
    torch.testing.assert_close(folded(tokens).logits, trained, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in model.parameters())
    merged = dict(model.named_parameters())
    for name in names:  # a joint projection owns its norm
        if name not in merged:
            continue
        change = merged[name].detach() - before[name]
        if merged[name].ndim == 1:
            assert change.abs().max() > 0, name
        elif ".layers." in name or ".h." in name:
            rank = int(torch.linalg.matrix_rank(change, rtol=1e-3))
            assert 0 < rank <= 2, (name, rank)
        else:
            assert change.abs().max() == 0, name


@VARIANTS
def test_only_the_changes_and_vectors_need_memory(variant: str) -> None:
    model = small_model(variant)
    matrices = [name for name, parameter in model.named_parameters() if parameter.ndim == 2]
    adapt(model, 2)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(parameter.ndim == 1 or ".parametrizations.weight.0." in name for name, parameter in trained)
    inside = [name for name in matrices if ".layers." in name or ".h." in name]
    assert len([name for name, parameter in trained if parameter.ndim == 2]) == 2 * len(inside)


def test_a_model_without_changes_is_left_as_it_is() -> None:
    model = small_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
