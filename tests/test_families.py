"""What a removal does to a model of each family: the same function before, in between and after, by transformers or by hand."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from small_families import EOT, VARIANTS, kept, small_model, small_tokens
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.export.verify import norm_modules, verify_export
from ln_removal.models.families import FAMILIES, family_of
from ln_removal.models.layout import check_supported
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.freezable import END_OF_TEXT, FIRST, ORDINARY, PositionClasses
from ln_removal.norms.surgery import NormSites, fold, install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens, use_cache=False).logits
    return found


def installed(
    model: PreTrainedModel, tokens: Tensor, *, median: bool = False, embedding_cap: float | None = None
) -> NormSites:
    """Freezable norms whose statistics have seen `tokens`."""
    sites = install(model, eot_token_id=EOT, median=median, embedding_cap=embedding_cap, keep=kept(model))
    model.train()
    logits(model, tokens)
    sites.update_running(0.9)
    model.eval()
    return sites


def all_frozen(
    variant: str, *, dtype: torch.dtype = torch.float32, embedding_cap: float | None = None
) -> tuple[PreTrainedModel, NormSites]:
    model = small_model(variant).to(dtype)
    sites = installed(model, small_tokens(seed=1), embedding_cap=embedding_cap)
    for number, site in enumerate(sites.sites):
        sites.norms[site.norm].running_std.mul_(1 + 0.01 * number)  # every site has constants of its own
        sites.set_mix(site, 1)
    for special in ("eot", "first"):
        sites.set_special(special, 1)
    return model, sites


@every_variant
def test_installing_changes_no_logit(variant: str) -> None:
    model, tokens = small_model(variant), small_tokens()
    expected = logits(model, tokens)
    installed(model, tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


class _ByHand(nn.Module):
    """The frozen or half frozen norm of one family, written out, with one mix and one constant for all readers."""

    def __init__(self, norm: nn.Module, mix: float, constant: float) -> None:
        super().__init__()
        self.norm, self.mix, self.constant = norm, mix, constant

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            centred = x - x.mean(-1, keepdim=True)
            real = (centred.square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
            return centred / (real ** (1 - self.mix) * self.constant**self.mix) * self.norm.weight + self.norm.bias
        real = (x.square().mean(-1, keepdim=True) + self.norm.variance_epsilon).sqrt()
        scaled: Tensor = x / (real ** (1 - self.mix) * self.constant**self.mix) * self.norm.weight
        return scaled


@every_variant
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_between_real_and_constant_it_is_the_formula(variant: str, mix: float) -> None:
    """transformers' own model, with the norm of the formula in the place of each of its norms."""
    model, tokens = small_model(variant).double(), small_tokens()
    reference = copy.deepcopy(model)
    sites = installed(model, tokens)
    for norm in sites.norms.values():
        norm.running_std.fill_(float(norm.running_std[ORDINARY]))  # one constant for all classes
    for site in sites.sites:
        sites.set_mix(site, mix)
    family = family_of(reference.config)
    for name, path in family.norms(2).items():
        constant = float(sites.norms[name].frozen_std[0, ORDINARY])
        reference.set_submodule(path, _ByHand(reference.get_submodule(path), mix, constant))
    torch.testing.assert_close(logits(model, tokens), logits(reference, tokens), rtol=1e-10, atol=1e-10)


@every_variant
def test_each_site_is_read_by_the_maps_that_it_names(variant: str) -> None:
    """Freezing a site changes what its maps give and nothing that the norm's other readers get."""
    model, tokens = small_model(variant).double(), small_tokens()
    sites = installed(model, tokens)
    family, seen = family_of(model.config), {}
    attention = model.get_submodule(f"{family.block(0)}.{family.attention}")

    def keep(query: Tensor, key: Tensor, value: Tensor) -> None:
        seen.update(q=query, k=key, v=value)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> object:
        if module is attention:
            keep(query, key, value)
        out = query.new_zeros(query.shape).transpose(1, 2)
        return out, None

    transformers_attention = __import__("transformers").AttentionInterface
    transformers_attention.register("keeping", attend)
    model.set_attn_implementation("keeping")
    logits(model, tokens)
    before = dict(seen)
    sites.set_mix("ln_1_qk.0", 1)
    logits(model, tokens)
    assert not torch.allclose(seen["q"], before["q"]) and not torch.allclose(seen["k"], before["k"])
    torch.testing.assert_close(seen["v"], before["v"])
    sites.set_mix("ln_1_qk.0", 0)
    sites.set_mix("ln_1_v.0", 1)
    logits(model, tokens)
    torch.testing.assert_close((seen["q"], seen["k"]), (before["q"], before["k"]))
    assert not torch.allclose(seen["v"], before["v"])


@every_variant
def test_the_fold_computes_what_the_frozen_model_does(variant: str) -> None:
    model, _ = all_frozen(variant)
    tokens = small_tokens(seed=2)
    folded = from_folded(model.config, fold(model), model.generation_config)
    verify_export(model, folded, tokens)
    expected = logits(model, tokens)
    torch.testing.assert_close(logits(folded, tokens), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not norm_modules(folded)
    assert type(folded).__name__.startswith("NormFree") and folded.config.model_type.startswith("normfree_")


@every_variant
def test_the_fold_is_exact_in_float64(variant: str) -> None:
    model, _ = all_frozen(variant, dtype=torch.float64)
    tokens = small_tokens(seed=2)
    torch.testing.assert_close(
        logits(from_folded(model.config, fold(model)), tokens), logits(model, tokens), rtol=1e-11, atol=1e-11
    )


@every_variant
def test_a_resumed_model_is_the_same(variant: str) -> None:
    """All state is in buffers: a fresh model with a state dict computes the same, statistics included."""
    model, sites = all_frozen(variant)
    sites.set_mix("ln_1_v.1", 0.4)
    again = small_model(variant, seed=5)
    found = install(again, eot_token_id=EOT, keep=kept(again))
    again.load_state_dict(model.state_dict())
    tokens = small_tokens(seed=3)
    torch.testing.assert_close(logits(again, tokens), logits(model, tokens), rtol=0, atol=0)
    assert found.mixes() == sites.mixes() and found.running_stds() == sites.running_stds()


@every_variant
def test_gradients_reach_every_parameter(variant: str) -> None:
    model, _ = all_frozen(variant)
    model(small_tokens(), labels=small_tokens()).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


def test_every_family_is_among_the_variants() -> None:
    assert {small_model(variant).config.model_type for variant in VARIANTS} == set(FAMILIES)


def test_norms_that_would_stay_have_to_be_named() -> None:
    model = small_model("qwen3")
    with pytest.raises(UserError, match="keep qk-norms"):
        install(model, eot_token_id=EOT)
    install(model, eot_token_id=EOT, keep=["qk-norms"])
    with pytest.raises(UserError, match="qk-norms"):
        install(small_model("llama"), eot_token_id=EOT, keep=["qk-norms"])


def test_a_model_of_another_family_is_named() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8)
    with pytest.raises(UserError, match="OPTForCausalLM"):
        check_supported(OPTForCausalLM(config))


def test_a_beginning_of_text_shares_the_class_of_position_0() -> None:
    classes = PositionClasses(eot_token_id=5, bos_token_id=4)
    classes.fill(torch.tensor([[4, 1, 5, 4, 2]]))
    assert classes.current.tolist() == [[FIRST, ORDINARY, END_OF_TEXT, FIRST, ORDINARY]]
    same = PositionClasses(eot_token_id=5, bos_token_id=5)
    same.fill(torch.tensor([[5, 1, 5]]))
    assert same.current.tolist() == [[FIRST, ORDINARY, END_OF_TEXT]]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("gpt2")])
def test_an_embedding_with_a_cap_is_one_with_smaller_rows_and_folds(variant: str) -> None:
    tokens = small_tokens()
    untouched = small_model(variant).double()
    plain, plain_sites = all_frozen(variant, dtype=torch.float64)
    model, sites = all_frozen(variant, dtype=torch.float64, embedding_cap=1.05)
    assert sites.embedding is not None and NormSites.of(model).embedding is sites.embedding
    family = family_of(model.config)
    path = f"{family.body}.{family.embeddings[0]}.weight"
    rows = plain.get_parameter(path).detach().clone()
    torch.testing.assert_close(model.get_parameter(path), untouched.get_parameter(path), rtol=0, atol=0)
    limit = 1.05 * sites.norms["ln_1.0"].captured_std[0, ORDINARY]
    std = rows.std(-1, correction=0, keepdim=True) if family.centred else rows.square().mean(-1, keepdim=True).sqrt()
    assert 0 < int((std > limit).sum()) < len(rows)
    # By hand: the frozen model without the cap, whose embedding alone has smaller rows.
    plain.get_submodule(path.rpartition(".")[0]).weight = nn.Parameter(rows * (limit / std).clamp(max=1))
    for name, norm in plain_sites.norms.items():
        norm.load_state_dict(sites.norms[name].state_dict())
    torch.testing.assert_close(logits(model, tokens), logits(plain, tokens), rtol=1e-10, atol=1e-10)
    folded = from_folded(model.config, fold(model))
    torch.testing.assert_close(logits(folded, tokens), logits(model, tokens), rtol=1e-9, atol=1e-9)
    verify_export(model, folded, tokens)
    assert not any(name.endswith("limit") for name, _ in folded.named_buffers())


def test_the_cap_of_an_embedding_begins_with_the_first_site_and_trains() -> None:
    model, tokens = small_model("llama"), small_tokens()
    expected = logits(model, tokens)
    sites = installed(model, tokens, embedding_cap=1.05)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    for mix in (0.0, 0.01, 0.0):
        sites.set_mix("ln_1_qk.0", mix)
        changed = not torch.allclose(logits(model, tokens), expected, rtol=1e-3, atol=1e-3)
        assert changed == (mix > 0)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in model.parameters())  # type: ignore[arg-type]


def test_a_model_with_position_embeddings_has_no_cap_of_its_embedding() -> None:
    with pytest.raises(UserError, match="position"):
        install(small_model("gpt2"), eot_token_id=EOT, embedding_cap=1.2)
