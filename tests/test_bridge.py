"""LN-free models in TransformerLens 4: exact sums, hooks, patching; from memory, from a directory, in any import order."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from command_line import forked_code
from disarmed_model import disarm, faithful
from small_model import Adapter, write_tokenizer
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

import ln_removal
from ln_removal import NormFreeGPT2LMHeadModel, UserError, from_disarmed, to_bridge, to_stock
from ln_removal.models.loading import load_model, load_tokenizer
from ln_removal.models.norm_free import from_folded

SUMS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture
def model(tiny_gpt2: GPT2LMHeadModel) -> NormFreeGPT2LMHeadModel:
    """Three layers with all weights and biases random, the logit bias too."""
    return from_disarmed(disarm(tiny_gpt2))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return load_tokenizer(str(directory))


@torch.no_grad()
def logits(model: GPT2LMHeadModel | TransformerBridge, ids: Tensor) -> Tensor:
    output = model(ids)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def direct_contributions(bridge: TransformerBridge, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (B, T, V), and by component its part of them."""
    found, cache = bridge.run_with_cache(ids)
    streams, labels = cache.get_full_resid_decomposition(expand_neurons=False, return_labels=True)
    parts = dict(zip(labels, streams @ bridge.W_U, strict=True))
    return found, parts | {"b_U": bridge.b_U}


class TestSum:
    @pytest.mark.parametrize("dtype", SUMS, ids=str)
    def test_components_sum_to_the_logits(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor, dtype: torch.dtype
    ) -> None:
        model = model.to(dtype)
        found, parts = direct_contributions(to_bridge(model), token_ids)
        heads = {f"L{layer}H{head}" for layer in range(3) for head in range(4)}
        assert set(parts) == heads | {"0_mlp_out", "1_mlp_out", "2_mlp_out", "embed", "pos_embed", "bias", "b_U"}
        assert all(part.abs().max() > 0 for part in parts.values())
        assert found.dtype == dtype
        assert relative_error(torch.stack(torch.broadcast_tensors(*parts.values())).sum(0), found) < SUMS[dtype]
        assert relative_error(found, logits(model, token_ids)) < SUMS[dtype]

    @pytest.mark.parametrize("dtype", SUMS, ids=str)
    def test_by_hooks_of_each_block(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor, dtype: torch.dtype
    ) -> None:
        """The same sum from attention outputs (with their bias), MLP outputs and embeddings, without our helper."""
        bridge = to_bridge(model.to(dtype))
        with torch.no_grad():
            found, cache = bridge.run_with_cache(token_ids)
        names = ["hook_embed", "hook_pos_embed"]
        names += [f"blocks.{i}.hook_{part}_out" for i in range(3) for part in ("attn", "mlp")]
        total = sum(cache[name] for name in names)
        assert relative_error(total @ bridge.W_U + bridge.b_U, found) < SUMS[dtype]
        assert (
            relative_error(total.expand_as(cache["blocks.2.hook_resid_post"]), cache["blocks.2.hook_resid_post"])
            < SUMS[dtype]
        )

    def test_a_published_model(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, tmp_path: Path) -> None:
        """Converted, saved, booted from the directory: its components sum to the logits of the published model."""
        published = disarm(tiny_gpt2)
        from_disarmed(published).save_pretrained(tmp_path)
        write_tokenizer(tmp_path, entries=101 + 219)
        bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
        found, parts = direct_contributions(bridge, token_ids)
        assert relative_error(sum(parts.values()), found) < 1e-5
        assert relative_error(found, logits(faithful(published), token_ids)) < 1e-4

    def test_a_stock_gpt2_does_not_sum(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """What the conversion is for: with its disarmed norms in place the same sum is off by far."""
        bridge = TransformerBridge.boot_transformers(
            "stock", hf_model=to_stock(model), tokenizer=tokenizer, device="cpu"
        )
        found, parts = direct_contributions(bridge, token_ids)
        assert relative_error(sum(parts.values()), found) > 1


class TestBridge:
    def test_the_model_is_left_as_it_was(self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected = logits(model, token_ids)
        bridge = to_bridge(model)
        assert set(model.state_dict()) == set(before)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(logits(model, token_ids), expected)
        assert bridge.W_U.data_ptr() == model.lm_head.weight.data_ptr(), "no second copy of the weights"
        assert bridge.cfg.normalization_type is None and not bridge.training
        to_bridge(model)  # once more

    def test_disarmed_models_are_converted(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        published = disarm(tiny_gpt2)
        assert relative_error(logits(to_bridge(published), token_ids), logits(faithful(published), token_ids)) < 1e-4
        stock = to_stock(from_disarmed(published))
        assert relative_error(logits(to_bridge(stock), token_ids), logits(faithful(published), token_ids)) < 1e-4

    @pytest.mark.parametrize("dtype", SUMS, ids=str)
    @pytest.mark.parametrize("tied", [True, False])
    def test_a_model_with_its_norms(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, dtype: torch.dtype, tied: bool
    ) -> None:
        """The same hooks, the model's own logits, no second copy of the weights; also in float64 with attention upcast."""
        if not tied:
            tiny_gpt2.config.tie_word_embeddings = False
            tiny_gpt2.lm_head.weight = torch.nn.Parameter(tiny_gpt2.lm_head.weight.detach() * 1.5)
        tiny_gpt2.config.reorder_and_upcast_attn = True
        own = tiny_gpt2.to(dtype)
        before = {name: value.clone() for name, value in own.state_dict().items()}
        own.config.reorder_and_upcast_attn = False
        expected = logits(own, token_ids)
        own.config.reorder_and_upcast_attn = True
        bridge = to_bridge(own)
        found, cache = bridge.run_with_cache(token_ids)
        assert found.dtype == dtype and {cache[name].dtype for name in cache if "tokens" not in name} >= {dtype}
        assert relative_error(found, expected) < SUMS[dtype]
        assert bridge.cfg.normalization_type == "LN" and not bridge.training
        assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
        assert bridge.W_U.data_ptr() == own.lm_head.weight.data_ptr()
        assert set(cache.keys()) >= set(to_bridge(from_disarmed(disarm(own))).run_with_cache(token_ids)[1].keys())

    def test_other_models_are_refused(
        self, tiny_gpt2: GPT2LMHeadModel, model: NormFreeGPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        ln_removal.install(tiny_gpt2, eot_token_id=100)
        with pytest.raises(UserError, match="freezable"):
            to_bridge(tiny_gpt2)
        with pytest.raises(UserError, match="Other"):
            to_bridge(type("Other", (GPT2LMHeadModel,), {})(tiny_gpt2.config))
        with pytest.raises(UserError, match="Linear"):
            to_bridge(torch.nn.Linear(2, 2))
        with pytest.raises(UserError, match="TransformerBridge"):
            to_bridge(to_bridge(model))
        TransformerBridge.boot_transformers("mine", hf_model=model, tokenizer=tokenizer, device="cpu")
        with pytest.raises(UserError, match="bridge"):
            to_bridge(model)

    def test_hooks_see_the_residual_stream(self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor) -> None:
        hidden = model.transformer(token_ids, output_hidden_states=True).hidden_states
        _, cache = to_bridge(model).run_with_cache(token_ids)
        for i in range(3):
            torch.testing.assert_close(cache[f"blocks.{i}.hook_resid_pre"], hidden[i])
            # what a norm would change, an identity hands on
            assert torch.equal(cache[f"blocks.{i}.ln1.hook_out"], cache[f"blocks.{i}.hook_resid_pre"])
            assert torch.equal(cache[f"blocks.{i}.ln2.hook_out"], cache[f"blocks.{i}.hook_resid_mid"])
        torch.testing.assert_close(cache["ln_final.hook_out"], hidden[3])

    def test_patching_the_stream_gives_the_other_logits(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        bridge = to_bridge(model)
        clean, corrupted = token_ids[:1], token_ids[2:3]
        expected, cache = bridge.run_with_cache(clean)
        name = "blocks.1.hook_resid_post"

        def patch(activation: Tensor, hook: object) -> Tensor:
            return cache[name]

        assert relative_error(logits(bridge, corrupted), expected) > 0.1
        found = bridge.run_with_hooks(corrupted, fwd_hooks=[(name, patch)])
        torch.testing.assert_close(found, expected)

    def test_ablating_a_head_in_the_last_layer_takes_away_its_direct_contribution(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        """Exact without a norm (and here without an MLP behind it)."""
        model = model.double()
        with torch.no_grad():
            model.transformer.h[2].mlp.c_proj.weight.zero_()
        bridge = to_bridge(model)
        before, parts = direct_contributions(bridge, token_ids)

        def ablate(z: Tensor, hook: object) -> Tensor:
            z = z.clone()
            heads = z.view(*z.shape[:2], 4, 8)
            heads[:, :, 3] = 0
            return z

        after = bridge.run_with_hooks(token_ids, fwd_hooks=[("blocks.2.attn.hook_z", ablate)])
        assert relative_error(before - after, parts["L2H3"]) < 1e-12

    def test_compatibility_mode_keeps_the_probabilities(
        self, model: NormFreeGPT2LMHeadModel, token_ids: Tensor
    ) -> None:
        expected = logits(model, token_ids).log_softmax(-1)
        bridge = to_bridge(model)
        bridge.enable_compatibility_mode(disable_warnings=True)
        torch.testing.assert_close(logits(bridge, token_ids).log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
        found, parts = direct_contributions(bridge, token_ids)
        assert relative_error(sum(parts.values()), found) < 1e-5


class TestWhatTransformerLensDoesNotKnow:
    """It computes attention by itself, and so a setting of the configuration may be passed over."""

    @pytest.mark.parametrize("how", ["from memory", "booted"])
    def test_scores_that_are_not_scaled_are_refused_and_the_way_out_works(
        self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, tokenizer: PreTrainedTokenizerBase, how: str
    ) -> None:
        def bridge_of(model: NormFreeGPT2LMHeadModel) -> TransformerBridge:
            if how == "from memory":
                return to_bridge(model)
            return TransformerBridge.boot_transformers("mine", hf_model=model, tokenizer=tokenizer, device="cpu")

        model = built_with(tiny_gpt2, scale_attn_weights=False)
        expected = logits(model, token_ids)
        with pytest.raises(UserError, match="scale_attn_weights"):
            bridge_of(model)
        width, head = 32, 8
        state = model.state_dict()
        for layer in range(3):
            state[f"transformer.h.{layer}.attn.c_attn.weight"][:, :width] *= head**0.5
            state[f"transformer.h.{layer}.attn.c_attn.bias"][:width] *= head**0.5
        model.config.scale_attn_weights = True
        assert relative_error(logits(bridge_of(from_folded(model.config, state)), token_ids), expected) < 1e-4

    @pytest.mark.parametrize("setting", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
    def test_other_settings_of_attention(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, setting: str) -> None:
        model = built_with(tiny_gpt2, **{setting: True})
        assert relative_error(logits(to_bridge(model), token_ids), logits(model, token_ids)) < 1e-4

    def test_logits_are_compared_once(self, model: NormFreeGPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = TransformerBridge.forward
        monkeypatch.setattr(TransformerBridge, "forward", lambda *args, **options: 1.01 * forward(*args, **options))
        with pytest.raises(UserError, match="logits"):
            to_bridge(model)
        monkeypatch.undo()
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert to_bridge(model.to(dtype)).cfg.dtype == dtype

    def test_an_adapter_has_to_be_merged(self, model: NormFreeGPT2LMHeadModel) -> None:
        model.transformer.h[0].mlp.c_fc = Adapter(model.transformer.h[0].mlp.c_fc)
        for form in (to_bridge, to_stock):
            with pytest.raises(UserError, match="merge"):
                form(model)


def built_with(model: GPT2LMHeadModel, **settings: bool) -> NormFreeGPT2LMHeadModel:
    """An LN-free model with these settings, which a model reads when it is built."""
    disarmed = disarm(model)
    config = copy.deepcopy(disarmed.config)
    config.update(settings)
    return from_folded(config, from_disarmed(disarmed).state_dict())


class TestTokenizer:
    def test_text_in_and_out(self) -> None:
        loaded = load_model("tiny")
        model = _frozen(loaded.model)
        kept = dict(loaded.tokenizer.init_kwargs)
        bridge = to_bridge(model, loaded.tokenizer)
        assert loaded.tokenizer.init_kwargs == kept
        ids = bridge.to_tokens("def add(a, b):", prepend_bos=False)
        assert torch.equal(ids, loaded.tokenizer("def add(a, b):", return_tensors="pt").input_ids)
        expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        found = bridge.generate(ids, max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
        assert torch.equal(found, expected)


def _frozen(model: GPT2LMHeadModel) -> NormFreeGPT2LMHeadModel:
    from massive_activations import freeze_in_order

    ids = torch.randint(0, model.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    return freeze_in_order(model, ids)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LN-free model on disk with its tokenizer, as an export is."""
    place = tmp_path_factory.mktemp("normfree")
    eot = write_tokenizer(place)
    config = ln_removal.NormFreeGPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=320, n_positions=32, bos_token_id=eot, eos_token_id=eot
    )
    NormFreeGPT2LMHeadModel(config).save_pretrained(place)
    return place


class TestBoot:
    @pytest.mark.parametrize("dtype", SUMS, ids=str)
    def test_from_a_directory(self, directory: Path, dtype: torch.dtype) -> None:
        ids = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))
        bridge = TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=dtype)
        found, parts = direct_contributions(bridge, ids)
        assert relative_error(sum(parts.values()), found) < SUMS[dtype]
        model = NormFreeGPT2LMHeadModel.from_pretrained(directory, dtype=dtype).eval()
        assert relative_error(found, logits(model, ids)) < SUMS[dtype]
        assert bridge.tokenizer.decode(bridge.to_tokens("return total", prepend_bos=False)[0]) == "return total"

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "first",
        [
            "from transformer_lens.model_bridge import TransformerBridge\nimport ln_removal",
            "from ln_removal import to_bridge\nfrom transformer_lens.model_bridge import TransformerBridge",
        ],
    )
    def test_in_every_order_of_imports(self, directory: Path, first: str) -> None:
        code = (
            f"{first}\nimport sys\nbridge = TransformerBridge.boot_transformers(sys.argv[1], device='cpu')\n"
            "print(bridge.cfg.architecture, bridge.cfg.normalization_type)"
        )
        assert forked_code(code, str(directory)).splitlines()[-1] == "NormFreeGPT2LMHeadModel None"
