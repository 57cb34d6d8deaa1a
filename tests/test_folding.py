"""Folding frozen norms into weights: algebra as properties, then whole models."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_gpt2 import Reference, SiteSetting
from small_model import Adapter
from torch import Tensor
from transformers import GPT2LMHeadModel

from ln_removal.errors import UserError
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import NormSites, fold, fold_affine, install

EOT = 100


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frozen_norm(x: Tensor, gamma: Tensor, beta: Tensor, sigma: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / sigma * gamma + beta


sizes = st.tuples(st.integers(1, 12), st.integers(1, 9))
seeds = st.integers(0, 2**31 - 1)
stds = st.floats(1e-3, 1e4)
scales = st.floats(1e-3, 1e3)


class TestFoldAffine:
    @given(size=sizes, seed=seeds, std=stds, scale=scales, has_bias=st.booleans())
    def test_same_map(self, size: tuple[int, int], seed: int, std: float, scale: float, has_bias: bool) -> None:
        width, out = size
        weight, bias = randn(seed, width, out), randn(seed + 1, out) if has_bias else None
        gamma, beta, sigma = randn(seed + 2, width), randn(seed + 3, width), torch.tensor(std, dtype=torch.float64)
        x = scale * randn(seed + 4, 5, width) + scale
        expected = frozen_norm(x, gamma, beta, sigma) @ weight + (0 if bias is None else bias)
        folded_weight, folded_bias = fold_affine(weight, bias, gamma, beta, sigma)
        # x W' is computed from terms of this size, which cancel where x has a large mean
        size_of_terms = float((x.abs() @ folded_weight.abs()).max() + expected.abs().max())
        torch.testing.assert_close(x @ folded_weight + folded_bias, expected, rtol=0, atol=1e-13 * size_of_terms)

    @given(size=sizes, seed=seeds, std=stds)
    def test_columns_have_mean_zero_so_a_shift_of_the_stream_changes_nothing(
        self, size: tuple[int, int], seed: int, std: float
    ) -> None:
        width, out = size
        weight, _ = fold_affine(
            randn(seed, width, out), None, randn(seed + 1, width), randn(seed + 2, width), torch.tensor(std)
        )
        largest = float(weight.abs().max()) + 1 / std
        assert float(weight.mean(0).abs().max()) <= 1e-14 * largest
        shift = torch.full((1, width), 1e3, dtype=torch.float64)
        assert float((shift @ weight).abs().max()) <= 1e3 * width * 1e-14 * largest

    @given(seed=seeds, first=stds, second=stds)
    def test_one_constant_a_column_is_folding_the_columns_apart(self, seed: int, first: float, second: float) -> None:
        weight, bias, gamma, beta = randn(seed, 6, 5), randn(seed + 1, 5), randn(seed + 2, 6), randn(seed + 3, 6)
        sigma = torch.tensor([first] * 3 + [second] * 2, dtype=torch.float64)
        together = fold_affine(weight, bias, gamma, beta, sigma)
        left = fold_affine(weight[:, :3], bias[:3], gamma, beta, sigma[0])
        right = fold_affine(weight[:, 3:], bias[3:], gamma, beta, sigma[4])
        torch.testing.assert_close(together[0], torch.cat((left[0], right[0]), 1))
        torch.testing.assert_close(together[1], torch.cat((left[1], right[1])))

    @given(seed=seeds, std=stds)
    def test_arithmetic_is_float64_whatever_comes_in(self, seed: int, std: float) -> None:
        parts = [randn(seed, 6, 4), randn(seed + 1, 4), randn(seed + 2, 6), randn(seed + 3, 6), torch.tensor(std)]
        narrow = [part.float() for part in parts]
        wide = fold_affine(*[part.double() for part in narrow])
        found = fold_affine(*narrow)
        for a, b in zip(found, wide, strict=True):
            assert a.dtype == torch.float64
            assert torch.equal(a, b)


def frozen(model: GPT2LMHeadModel, ids: Tensor) -> NormSites:
    """Install, gather statistics, freeze everything, drop the special constants."""
    sites = install(model, eot_token_id=EOT)
    model.train()
    with torch.no_grad():
        model(ids, use_cache=False)
    sites.update_running(0.9)
    model.eval()
    for site in sites.sites:
        sites.set_mix(site, 1)
    sites.set_special("eot", 1)
    sites.set_special("first", 1)
    return sites


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    out: Tensor = model(ids, use_cache=False).logits
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


class TestFold:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
    def test_folded_frozen_and_reference_agree(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, dtype: torch.dtype, tolerance: float
    ) -> None:
        weights = {name: value.double().numpy().copy() for name, value in tiny_gpt2.state_dict().items()}
        reference = Reference(weights, n_layer=3, n_head=4, eot=EOT)
        sites = frozen(tiny_gpt2.to(dtype), token_ids)
        constants = sites.frozen_constants()
        assert len({constant[0] for constant in constants.values()}) == 7  # one a norm: none stands for another
        settings = {name: SiteSetting(1.0, (c[0], c[1], c[2])) for name, c in constants.items()}
        expected = torch.from_numpy(reference.logits(token_ids.numpy(), settings))
        folded = from_folded(tiny_gpt2.config, fold(tiny_gpt2))
        assert folded.dtype == dtype
        assert relative_error(logits(folded, token_ids), expected) < tolerance
        assert relative_error(logits(folded, token_ids), logits(tiny_gpt2, token_ids)) < tolerance

    # the fixtures are copied before they are changed
    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(values=st.lists(st.floats(0.05, 30), min_size=10, max_size=10))
    def test_any_constants(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, values: list[float]) -> None:
        model = copy.deepcopy(tiny_gpt2).double()
        sites = frozen(model, token_ids)
        for site, value in zip(sites.sites, values, strict=True):
            sites.norms[site.norm].frozen_std[site.reader] = value
        folded = from_folded(model.config, fold(model))
        assert relative_error(logits(folded, token_ids), logits(model, token_ids)) < 1e-11

    def test_queries_keys_and_values_get_the_constant_of_their_site(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        sites = frozen(tiny_gpt2, token_ids)
        before = fold(tiny_gpt2)["transformer.h.1.attn.c_attn.weight"]
        sites.norms["ln_1.1"].frozen_std[0] *= 2
        sites.norms["ln_1.1"].frozen_std[1] *= 4
        ratio = before / fold(tiny_gpt2)["transformer.h.1.attn.c_attn.weight"]
        expected = torch.tensor([2.0] * 64 + [4.0] * 32).expand(32, 96)
        torch.testing.assert_close(ratio, expected)

    def test_the_model_is_left_alone(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        frozen(tiny_gpt2, token_ids)
        before, expected = copy.deepcopy(tiny_gpt2.state_dict()), logits(tiny_gpt2, token_ids)
        state = fold(tiny_gpt2)
        for value in state.values():
            value.zero_()  # the state shares no memory with the model
        for name, value in tiny_gpt2.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert torch.equal(logits(tiny_gpt2, token_ids), expected)

    def test_unembedding_is_untied_with_a_bias(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        frozen(tiny_gpt2, token_ids)
        state = fold(tiny_gpt2)
        assert state["lm_head.weight"].shape == (101, 32) and state["lm_head.bias"].shape == (101,)
        assert not torch.equal(state["lm_head.weight"], state["transformer.wte.weight"])
        expected = tiny_gpt2.lm_head.weight.double() @ tiny_gpt2.transformer.ln_f.bias.double()
        torch.testing.assert_close(state["lm_head.bias"], expected.detach().float())
        assert not [name for name in state if ".ln_" in name or ".norm" in name]

    def test_a_site_not_frozen_is_named(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        sites = frozen(tiny_gpt2, token_ids)
        sites.set_mix("ln_1_v.2", 0.999)
        with pytest.raises(UserError, match=r"1 of 10 .*ln_1_v\.2"):
            fold(tiny_gpt2)
        for site in sites.sites:
            sites.set_mix(site, 0)
        with pytest.raises(UserError, match=r"10 of 10 .*ln_2\.0"):
            fold(tiny_gpt2)

    @pytest.mark.parametrize("path", ["transformer.h.0.mlp.c_fc", "transformer.h.2.attn.c_proj", "lm_head"])
    def test_an_adapter_added_after_install_has_to_be_merged(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, path: str
    ) -> None:
        frozen(tiny_gpt2, token_ids)
        tiny_gpt2.set_submodule(path, Adapter(tiny_gpt2.get_submodule(path)))
        with pytest.raises(UserError, match=rf"{path} .*merge"):
            fold(tiny_gpt2)

    def test_a_cap_has_to_be_lifted(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        sites = install(tiny_gpt2, eot_token_id=100, cap=3.0)
        sites.update_running(0.9)
        for norm in sites.norms.values():
            norm.running_initialized.fill_(True)
        for site in sites.sites:
            sites.set_mix(site, 1)
        for special in ("eot", "first"):
            sites.set_special(special, 1)
        with pytest.raises(UserError, match="cap"):
            fold(tiny_gpt2)
        sites.lift_cap(0.5)
        lifted = [float(norm.cap_lifted) for norm in sites.norms.values()]
        assert lifted == [1, 1, 1, 0.5, 0, 0, 0], "one norm after the other"
        assert sites.has_cap()
        sites.lift_cap(1)
        assert fold(tiny_gpt2)

    @pytest.mark.parametrize("which", ["eot", "first"])
    def test_special_constants_have_to_be_dropped(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, which: str
    ) -> None:
        sites = frozen(tiny_gpt2, token_ids)
        sites.set_special(which, 0.9)
        with pytest.raises(UserError, match="constant"):
            fold(tiny_gpt2)
