"""Installing freezable norms, steering them, and each partial stage against a plain float64 reference."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from command_line import Commands
from numpy.typing import NDArray
from reference_gpt2 import Array, Reference, SiteSetting
from small_model import Adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2LMHeadModel, GPT2Model

from ln_removal.errors import UserError
from ln_removal.models.layout import Site, all_sites, check_supported, parse_site
from ln_removal.norms.freezable import FreezableNorm, NormedProjection
from ln_removal.norms.surgery import NormSites, install

EOT = 100


def reference_of(model: GPT2LMHeadModel) -> Reference:
    weights = {name: value.detach().double().numpy().copy() for name, value in model.state_dict().items()}
    return Reference(weights, n_layer=model.config.n_layer, n_head=model.config.n_head, eot=EOT)


def settings_of(sites: NormSites) -> dict[str, SiteSetting]:
    mixes, constants = sites.mixes(), sites.frozen_constants()
    return {name: SiteSetting(mixes[name], tuple(constants[name])) for name in mixes}  # type: ignore[arg-type]


def relative_error(found: Tensor, expected: Array) -> float:
    return float(np.abs(found.detach().double().numpy() - expected).max() / np.abs(expected).max())


@torch.no_grad()
def logits(model: GPT2LMHeadModel, ids: Tensor, **kwargs: Any) -> Tensor:
    out: Tensor = model(ids, use_cache=False, **kwargs).logits
    return out


def gather_statistics(model: GPT2LMHeadModel, sites: NormSites, ids: Tensor) -> None:
    model.train()
    logits(model, ids)
    sites.update_running(0.9)
    model.eval()


class TestArchitectures:
    def test_sites_in_removal_order(self) -> None:
        assert [str(site) for site in all_sites(2)] == [
            "ln_2.0",
            "ln_2.1",
            "ln_1_qk.0",
            "ln_1_qk.1",
            "ln_1_v.0",
            "ln_1_v.1",
            "ln_f",
        ]
        for site in all_sites(12):
            assert parse_site(str(site)) == site

    @pytest.mark.parametrize(
        "text", ["ln_1.0", "ln_2", "ln_f.0", "ln_1_v.-1", "ln_1_v.x", "ln_1_v.", "", "ln_2. 1", "ln_2.1.2"]
    )
    def test_what_is_not_a_site(self, text: str) -> None:
        with pytest.raises(UserError, match="site"):
            parse_site(text)

    def test_unsupported_models(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        check_supported(tiny_gpt2)
        with pytest.raises(UserError, match="Linear"):
            check_supported(nn.Linear(2, 2))
        with pytest.raises(UserError, match="GPT2Model"):
            check_supported(tiny_gpt2.transformer)
        tiny_gpt2.transformer.h[1].ln_2 = nn.RMSNorm(32)
        with pytest.raises(UserError, match=r"transformer\.h\.1\.ln_2.*RMSNorm"):
            install(tiny_gpt2, eot_token_id=EOT)

    def test_cross_attention_is_refused(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        tiny_gpt2.config.add_cross_attention = True
        with pytest.raises(UserError, match="cross-attention"):
            check_supported(tiny_gpt2)


def wrap(model: GPT2LMHeadModel, path: str, wrapper: Callable[[Any], nn.Module]) -> None:
    model.set_submodule(path, wrapper(model.get_submodule(path)))


class Quantised(nn.Linear):
    """As a quantised layer: a class of its own."""


class TestWhatIsNotPlain:
    """A fold reads weights by name: whatever else a module does would be gone without a word."""

    @pytest.mark.parametrize("at", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"])
    def test_an_adapter_has_to_be_merged(self, tiny_gpt2: GPT2LMHeadModel, at: str) -> None:
        wrap(tiny_gpt2, f"transformer.h.1.{at}", Adapter)
        with pytest.raises(UserError, match=rf"transformer\.h\.1\.{at} .*Adapter.*merge"):
            install(tiny_gpt2, eot_token_id=EOT)
        assert isinstance(tiny_gpt2.transformer.ln_f, nn.LayerNorm), "nothing was replaced"

    @pytest.mark.parametrize(
        ("path", "wrapper"),
        [
            ("lm_head", Adapter),
            ("lm_head", lambda layer: Quantised(layer.in_features, layer.out_features, bias=False)),
            ("lm_head", nn.utils.parametrizations.weight_norm),
            ("transformer.h.0.mlp.c_fc", nn.utils.parametrizations.spectral_norm),
            ("transformer.wte", lambda layer: nn.Sequential(layer)),
            ("transformer.h.2.mlp.act", lambda _: nn.ReLU()),
            ("transformer.h.2.mlp", lambda layer: _with(layer, nn.Linear(2, 2))),
        ],
    )
    def test_other_modules(self, tiny_gpt2: GPT2LMHeadModel, path: str, wrapper: Callable[[Any], nn.Module]) -> None:
        wrap(tiny_gpt2, path, wrapper)
        with pytest.raises(UserError, match=path.replace(".", r"\.")):
            install(tiny_gpt2, eot_token_id=EOT)

    def test_a_model_of_peft(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        wrapped = nn.Sequential(tiny_gpt2)
        wrapped.merge_and_unload = lambda: tiny_gpt2
        with pytest.raises(UserError, match="merge_and_unload"):
            check_supported(wrapped)

    @pytest.mark.parametrize("path", ["transformer.h.0.ln_1", "transformer.h.1.attn.c_attn", "transformer.ln_f"])
    def test_a_hook_of_a_replaced_module(self, tiny_gpt2: GPT2LMHeadModel, path: str) -> None:
        handle = tiny_gpt2.get_submodule(path).register_forward_hook(lambda *_: None)
        with pytest.raises(UserError, match=path.replace(".", r"\.")):
            install(tiny_gpt2, eot_token_id=EOT)
        handle.remove()
        install(tiny_gpt2, eot_token_id=EOT)


def _with(module: nn.Module, added: nn.Module) -> nn.Module:
    module.added = added
    return module


class TestInstall:
    def test_float32_parity_at_mix_0(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        original = logits(tiny_gpt2, token_ids)
        assert original.abs().max() > 1  # else 1e-5 would mean little
        install(tiny_gpt2, eot_token_id=EOT)
        torch.testing.assert_close(logits(tiny_gpt2, token_ids), original, rtol=1e-5, atol=1e-5)

    def test_parity_of_gradients(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        original, installed = copy.deepcopy(tiny_gpt2), tiny_gpt2
        install(installed, eot_token_id=EOT)
        for model in (original, installed):
            model.train()
            model(token_ids, labels=token_ids, use_cache=False).loss.backward()
        moved = {"ln_1.weight": "attn.c_attn.norm.weight", "ln_1.bias": "attn.c_attn.norm.bias"}
        for name, parameter in original.named_parameters():
            for old, new in moved.items():
                name = name.replace(old, new)
            torch.testing.assert_close(installed.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6)

    def test_parameters_are_moved_not_copied_and_stay_tied(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        before = {id(parameter) for parameter in tiny_gpt2.parameters()}
        install(tiny_gpt2, eot_token_id=EOT)
        assert {id(parameter) for parameter in tiny_gpt2.parameters()} == before
        assert tiny_gpt2.lm_head.weight is tiny_gpt2.transformer.wte.weight
        assert not any(isinstance(module, nn.LayerNorm) for module in tiny_gpt2.modules())

    def test_no_forward_is_patched(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        install(tiny_gpt2, eot_token_id=EOT)
        assert not [name for name, module in tiny_gpt2.named_modules() if "forward" in vars(module)]

    def test_twice_is_refused(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        install(tiny_gpt2, eot_token_id=EOT)
        with pytest.raises(UserError, match="already installed"):
            install(tiny_gpt2, eot_token_id=EOT)

    def test_handle_finds_every_norm(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        sites = install(tiny_gpt2, eot_token_id=EOT)
        assert list(sites.norms) == ["ln_1.0", "ln_2.0", "ln_1.1", "ln_2.1", "ln_1.2", "ln_2.2", "ln_f"]
        again = NormSites.of(tiny_gpt2)
        assert all(again.norms[name] is norm for name, norm in sites.norms.items())
        projection = tiny_gpt2.transformer.h[1].attn.c_attn
        assert isinstance(projection, NormedProjection) and projection.norm is sites.norms["ln_1.1"]
        assert len({id(norm.classes) for norm in sites.norms.values()}) == 1

    def test_of_a_model_without_them(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        with pytest.raises(UserError, match="install"):
            NormSites.of(tiny_gpt2)

    def test_a_deep_copy_is_independent(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        sites = install(tiny_gpt2, eot_token_id=EOT)
        gather_statistics(tiny_gpt2, sites, token_ids)
        twin = copy.deepcopy(tiny_gpt2)
        before = logits(twin, token_ids)
        logits(tiny_gpt2, token_ids[:2, :3])  # leaves the original's position classes at another shape
        for site in sites.sites:
            sites.set_mix(site, 1)
        assert torch.equal(logits(twin, token_ids), before)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_each_attention_implementation(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, implementation: str
    ) -> None:
        expected = reference_of(tiny_gpt2).logits(token_ids.numpy())
        tiny_gpt2.set_attn_implementation(implementation)
        install(tiny_gpt2, eot_token_id=EOT)
        assert relative_error(logits(tiny_gpt2, token_ids), expected) < 1e-5


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def staged(
    request: pytest.FixtureRequest, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor
) -> tuple[GPT2LMHeadModel, NormSites, Reference, float]:
    """An installed model with statistics, its reference, and the tolerance of its dtype."""
    reference = reference_of(tiny_gpt2)
    model = tiny_gpt2.to(request.param)
    sites = install(model, eot_token_id=EOT)
    gather_statistics(model, sites, token_ids)
    return model, sites, reference, 1e-5 if request.param == torch.float32 else 1e-12


Staged = tuple[GPT2LMHeadModel, NormSites, Reference, float]


class TestStagesAgainstReference:
    def test_running_stds(self, staged: Staged, token_ids: Tensor) -> None:
        model, sites, reference, tolerance = staged
        reference.logits(token_ids.numpy())
        first = {
            name: np.array([std[reference.classes == k].mean() for k in range(3)])
            for name, std in reference.stds.items()
        }
        for name, found in sites.running_stds().items():
            np.testing.assert_allclose(found, first[name], rtol=10 * tolerance)
        other = token_ids.flip(1)
        gather_statistics(model, sites, other)
        reference.logits(other.numpy())
        for name, found in sites.running_stds().items():
            second = np.array([reference.stds[name][reference.classes == k].mean() for k in range(3)])
            np.testing.assert_allclose(found, 0.9 * first[name] + 0.1 * second, rtol=10 * tolerance)

    def test_real(self, staged: Staged, token_ids: Tensor) -> None:
        model, _, reference, tolerance = staged
        assert relative_error(logits(model, token_ids), reference.logits(token_ids.numpy())) < tolerance

    @pytest.mark.parametrize("site", [str(site) for site in all_sites(3)])
    def test_one_site_alone(self, staged: Staged, token_ids: Tensor, site: str) -> None:
        model, sites, reference, tolerance = staged
        running, ids = sites.running_stds(), token_ids.numpy()
        sites.set_mix(site, 1)
        constants = running[parse_site(site).norm]
        expected = reference.logits(ids, {site: SiteSetting(1.0, (constants[0], constants[1], constants[2]))})
        assert relative_error(logits(model, token_ids), expected) < tolerance
        assert relative_error(logits(model, token_ids), reference.logits(ids)) > 1e-3  # no longer LayerNorm

    def test_site_after_site_tapered_then_the_special_constants(self, staged: Staged, token_ids: Tensor) -> None:
        model, sites, reference, tolerance = staged
        ids = token_ids.numpy()
        for site in sites.sites:
            for mix in (0.25, 0.75, 1.0):
                sites.set_mix(site, mix)
                assert settings_of(sites)[str(site)].mix == mix
                expected = reference.logits(ids, settings_of(sites))
                assert relative_error(logits(model, token_ids), expected) < tolerance, f"{site} at {mix}"
            gather_statistics(model, sites, token_ids)
        assert sites.all_frozen() and not sites.special_dropped()
        own = settings_of(sites)
        for eot, first in ((0.5, 0.0), (1.0, 0.0), (1.0, 0.5), (1.0, 1.0)):
            sites.set_special("eot", eot)
            sites.set_special("first", first)
            settings = {
                name: SiteSetting(
                    1.0,
                    (
                        setting.constants[0],
                        setting.constants[1] ** (1 - eot) * setting.constants[0] ** eot,
                        setting.constants[2] ** (1 - first) * setting.constants[0] ** first,
                    ),
                )
                for name, setting in own.items()
            }
            expected = reference.logits(ids, settings)
            assert relative_error(logits(model, token_ids), expected) < tolerance, (eot, first)
        assert sites.special_dropped()

    def test_explicit_position_ids(self, staged: Staged, token_ids: Tensor) -> None:
        model, sites, reference, tolerance = staged
        for site in sites.sites:
            sites.set_mix(site, 0.5)
        packed = torch.arange(24).remainder(10).expand(4, 24)  # position 0 three times a row
        shifted = torch.arange(5, 29).expand(4, 24)  # no position 0 at all
        for positions in (packed, shifted):
            expected = reference.logits(token_ids.numpy(), settings_of(sites), positions.numpy())
            assert relative_error(logits(model, token_ids, position_ids=positions), expected) < tolerance

    def test_decoding_with_a_cache(self, staged: Staged, token_ids: Tensor) -> None:
        model, sites, reference, tolerance = staged
        for site in sites.sites:
            sites.set_mix(site, 1)
        expected = reference.logits(token_ids.numpy(), settings_of(sites))
        with torch.no_grad():
            out = model(token_ids[:, :5], use_cache=True)
            pieces = [out.logits]
            for t in range(5, 24):
                out = model(token_ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
                pieces.append(out.logits)
        assert relative_error(torch.cat(pieces, dim=1), expected) < tolerance


class TestNormSites:
    def test_freezing_without_statistics(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        sites = install(tiny_gpt2, eot_token_id=EOT)
        with pytest.raises(UserError, match=r"ln_2\.0"):
            sites.set_mix("ln_2.0", 0.5)
        assert sites.mixes()["ln_2.0"] == 0
        sites.set_mix("ln_2.0", 0)  # staying real needs none

    def test_mistakes(self, tiny_gpt2: GPT2LMHeadModel) -> None:
        sites = install(tiny_gpt2, eot_token_id=EOT)
        with pytest.raises(UserError, match="0 to 2"):
            sites.set_mix("ln_2.3", 1)
        with pytest.raises(UserError, match="site"):
            sites.set_mix("ln_3.1", 1)
        for value in (-0.1, 1.1, float("nan")):
            with pytest.raises(UserError, match="from 0 to 1"):
                sites.set_mix(Site("ln_f"), value)
        with pytest.raises(UserError, match="eot, first"):
            sites.set_special("bos", 1)

    def test_frozen_sites_are_not_moved_by_training(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        sites = install(tiny_gpt2, eot_token_id=EOT)
        gather_statistics(tiny_gpt2, sites, token_ids)
        sites.set_mix("ln_2.1", 1)
        sites.set_mix("ln_1_qk.1", 1)  # its sibling ln_1_v.1 stays real
        before, constants = sites.running_stds(), sites.frozen_constants()
        gather_statistics(tiny_gpt2, sites, token_ids.flip(0, 1))
        after = sites.running_stds()
        assert after["ln_2.1"] == before["ln_2.1"]
        assert {name for name in before if before[name] != after[name]} == set(sites.norms) - {"ln_2.1"}
        assert sites.frozen_constants() == constants

    def test_state_dict_round_trip(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        fresh = copy.deepcopy(tiny_gpt2)
        sites = install(tiny_gpt2, eot_token_id=EOT)
        gather_statistics(tiny_gpt2, sites, token_ids)
        for site in sites.sites[:6]:
            sites.set_mix(site, 1)
        sites.set_special("eot", 0.5)
        expected = logits(tiny_gpt2, token_ids)
        others = install(fresh, eot_token_id=EOT)
        fresh.load_state_dict(tiny_gpt2.state_dict(), strict=True)
        assert torch.equal(logits(fresh, token_ids), expected)
        others.set_special("eot", 0)
        sites.set_special("eot", 0)
        assert others.frozen_constants() == sites.frozen_constants()

    def test_a_roll_back_captures_again(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """A handle that froze a site before an older state came back must not keep the constants of that time."""
        sites = install(tiny_gpt2, eot_token_id=EOT)
        gather_statistics(tiny_gpt2, sites, token_ids)
        older = copy.deepcopy(tiny_gpt2.state_dict())
        sites.set_mix("ln_f", 1)
        tiny_gpt2.load_state_dict(older)
        gather_statistics(tiny_gpt2, sites, token_ids.flip(1))
        sites.set_mix("ln_f", 1)
        assert sites.frozen_constants()["ln_f"] == sites.running_stds()["ln_f"]

    def test_bfloat16_autocast(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        expected = reference_of(tiny_gpt2).logits(token_ids.numpy())
        install(tiny_gpt2, eot_token_id=EOT)
        seen: dict[str, set[torch.dtype]] = {"in": set(), "out": set()}

        def record(_: nn.Module, args: tuple[Tensor], output: Tensor | tuple[Tensor, ...]) -> None:
            seen["in"].add(args[0].dtype)
            seen["out"].update(o.dtype for o in (output if isinstance(output, tuple) else (output,)))

        for module in tiny_gpt2.modules():
            if isinstance(module, FreezableNorm):
                module.register_forward_hook(record)
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(tiny_gpt2, token_ids)
        assert seen == {"in": {torch.float32}, "out": {torch.float32}}  # the residual stream stays float32
        assert found.dtype == torch.bfloat16
        assert relative_error(found, expected) < 0.03


class TestCompile:
    @pytest.fixture(autouse=True)
    def _clean(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    def test_the_whole_model_in_one_graph(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        """The hook that finds the position classes is compiled too, and sees each batch afresh."""
        reference = reference_of(tiny_gpt2)
        sites = install(tiny_gpt2, eot_token_id=EOT)
        counter = CompileCounterWithBackend("aot_eager")
        tiny_gpt2.compile(fullgraph=True, dynamic=False, backend=counter)
        gather_statistics(tiny_gpt2, sites, token_ids)
        tiny_gpt2.train()
        for site in sites.sites:
            sites.set_mix(site, 0.5)
        assert counter.frame_count == 1
        seen: dict[str, list[Array]] = {name: [] for name in sites.norms}
        classes: list[NDArray[np.int64]] = []
        for ids in (token_ids, token_ids.flip(1), token_ids.flip(0)):  # end-of-text tokens move about
            expected = reference.logits(ids.numpy(), settings_of(sites))
            assert relative_error(logits(tiny_gpt2, ids), expected) < 1e-5
            classes.append(reference.classes)
            for name in seen:
                seen[name].append(reference.stds[name])
        sites.update_running(0.0)
        members = np.concatenate(classes)
        for name, found in sites.running_stds().items():
            stds = np.concatenate(seen[name])
            np.testing.assert_allclose(found, [stds[members == k].mean() for k in range(3)], rtol=1e-4)
        assert counter.frame_count == 1, "no freeze compiled anything"

    def test_gradients_and_statistics_are_those_of_eager(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        eager = copy.deepcopy(tiny_gpt2)
        counter = CompileCounterWithBackend("aot_eager")
        for block in tiny_gpt2.transformer.h:
            block.compile(fullgraph=True, backend=counter)
        handles = [install(model, eot_token_id=EOT) for model in (tiny_gpt2, eager)]
        for model, sites in zip((tiny_gpt2, eager), handles, strict=True):
            gather_statistics(model, sites, token_ids)
            sites.set_mix("ln_1_v.1", 0.5)
            model.train()
            model(token_ids, labels=token_ids, use_cache=False).loss.backward()
            sites.update_running(0.5)
        assert counter.frame_count > 0
        for (name, mine), theirs in zip(tiny_gpt2.named_parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
        for name, stds in handles[0].running_stds().items():
            np.testing.assert_allclose(stds, handles[1].running_stds()[name], rtol=1e-5)


def test_average_over_ranks_alone_does_nothing(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    sites = install(tiny_gpt2, eot_token_id=EOT)
    gather_statistics(tiny_gpt2, sites, token_ids)
    before = sites.running_stds()
    sites.average_over_ranks()
    assert sites.running_stds() == before


def one_of_two_ranks() -> None:
    """A process of its own: different text on each rank; end-of-text tokens only on rank 1."""
    from transformers import GPT2Config

    rank, folder = int(os.environ["RANK"]), sys.argv[1]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=101,
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=EOT,
        eos_token_id=EOT,
    )
    model = GPT2LMHeadModel(config)
    sites = install(model, eot_token_id=EOT)
    batches = [torch.arange(6 + 4 * r).remainder(50).reshape(1, -1) + 30 * r for r in range(2)]
    batches[1][0, 3] = EOT
    model.train()
    logits(model, batches[rank])
    sites.average_over_ranks()
    sites.update_running(0.9)
    pooled = sites.running_stds()
    # Now let the ranks drift apart, and meet again at a freeze.
    logits(model, batches[rank])
    sites.update_running(0.0)
    apart = sites.running_stds()
    sites.average_over_ranks()
    torch.save((pooled, apart, sites.running_stds()), f"{folder}/rank{rank}.pt")
    if rank == 0:
        # What one process sees that holds both texts.
        torch.manual_seed(0)
        alone = GPT2LMHeadModel(config)
        single = install(alone, eot_token_id=EOT)
        alone.train()
        for batch in batches:
            logits(alone, batch)
        single.update_running(0.9)
        torch.save(single.running_stds(), f"{folder}/single.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_average_over_two_ranks(tmp_path: Path, forked: Commands) -> None:
    forked.run_ranks(2, "test_surgery:one_of_two_ranks", str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    single = torch.load(tmp_path / "single.pt", weights_only=True)
    for pooled, _, _ in results:
        for name, stds in pooled.items():
            np.testing.assert_allclose(stds, single[name], rtol=1e-6)  # weighted by counts: ranks had 6 and 10 tokens
    apart = [result[1] for result in results]
    assert apart[0] != apart[1]
    for _, _, together in results:
        for name, stds in together.items():
            mean = np.mean([apart[0][name], apart[1][name]], axis=0)
            np.testing.assert_allclose(stds, mean, rtol=1e-6)


def test_base_model_is_still_a_gpt2(tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
    install(tiny_gpt2, eot_token_id=EOT)
    assert isinstance(tiny_gpt2.transformer, GPT2Model)
    out = tiny_gpt2.generate(token_ids[:1, :4], max_new_tokens=4, do_sample=False, pad_token_id=EOT)
    assert out.shape[1] > 4
