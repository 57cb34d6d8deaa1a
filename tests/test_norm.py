"""FreezableNorm, PositionClasses and NormedProjection, each against a formula written out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel, StaticCache

from ln_removal.norms.freezable import (
    END_OF_TEXT,
    FIRST,
    N_CLASSES,
    ORDINARY,
    FreezableNorm,
    NormedProjection,
    PositionClasses,
)
from ln_removal.norms.surgery import install

EOT = 100
WIDTH = 8


def make_norm(
    ids: Tensor, *, readers: int = 1, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> FreezableNorm:
    generator = torch.Generator().manual_seed(2)
    classes = PositionClasses(EOT)
    classes.fill(ids)
    weight = nn.Parameter((1 + 0.3 * torch.randn(width, generator=generator)).to(dtype))
    bias = nn.Parameter((0.3 * torch.randn(width, generator=generator)).to(dtype))
    return FreezableNorm(weight, bias, 1e-5, classes=classes, readers=readers)


def stream(b: int, t: int, *, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> Tensor:
    return (3 * torch.randn(b, t, width, generator=torch.Generator().manual_seed(3)) + 0.7).to(dtype)


def tokens(b: int, t: int) -> Tensor:
    ids = torch.randint(0, EOT, (b, t), generator=torch.Generator().manual_seed(4))
    ids[0, 3] = EOT
    return ids


def by_hand(norm: FreezableNorm, x: Tensor, mix: float, constants: list[float]) -> Tensor:
    """The defining formula, one position at a time, in float64."""
    weight, bias = norm.weight.double(), norm.bias.double()
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            row = x[b, t].double()
            centred = row - row.mean()
            std = (centred.square().mean() + norm.eps).sqrt()
            constant = constants[int(norm.classes.current[b, t])]
            out[b, t] = centred * std ** (mix - 1) * constant**-mix * weight + bias
    return out


class TestPositionClasses:
    def test_position_zero_is_the_first_row_of_time_and_eot_is_a_token(self) -> None:
        ids = torch.tensor([[EOT, 5, EOT, 7], [1, 2, 3, EOT]])
        classes = PositionClasses(EOT)
        classes.fill(ids)
        assert classes.current.tolist() == [
            [FIRST, ORDINARY, END_OF_TEXT, ORDINARY],
            [FIRST, ORDINARY, ORDINARY, END_OF_TEXT],
        ]

    def test_without_an_eot_token_only_position_zero_is_special(self) -> None:
        classes = PositionClasses(None)
        classes.fill(torch.tensor([[EOT, 5, EOT]]))
        assert classes.current.tolist() == [[FIRST, ORDINARY, ORDINARY]]

    @pytest.mark.parametrize("shape", [(2, 4), (1, 4), (4,)])
    def test_explicit_positions_win_over_the_cache(self, shape: tuple[int, ...]) -> None:
        positions = torch.tensor([3, 0, 1, 2]).expand(shape)
        classes = PositionClasses(EOT)
        classes.fill(torch.ones(2, 4, dtype=torch.int64), position_ids=positions, cached=9)
        assert classes.current.tolist() == [[ORDINARY, FIRST, ORDINARY, ORDINARY]] * 2

    @pytest.mark.parametrize("cached", [3, torch.tensor(3)])
    def test_nothing_is_first_after_a_cache(self, cached: int | Tensor) -> None:
        classes = PositionClasses(EOT)
        classes.fill(torch.tensor([[1], [EOT]]), cached=cached)
        assert classes.current.tolist() == [[ORDINARY], [END_OF_TEXT]]

    def test_follows_each_way_of_calling_the_transformer(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor) -> None:
        classes = PositionClasses(EOT)
        classes.watch(tiny_gpt2.transformer)
        tiny_gpt2(token_ids)
        expected = classes.current
        assert expected.shape == token_ids.shape
        assert expected[:, 0].tolist() == [FIRST] * 4 and expected[0, 7] == END_OF_TEXT

        tiny_gpt2.transformer(token_ids[:, :5])  # positional
        assert torch.equal(classes.current, expected[:, :5])
        embeddings = tiny_gpt2.transformer.wte(token_ids)
        tiny_gpt2(inputs_embeds=embeddings)  # no tokens to see end-of-text in
        assert classes.current.tolist() == [[FIRST] + [ORDINARY] * 23] * 4
        packed = torch.arange(24).remainder(8).unsqueeze(0)
        tiny_gpt2(token_ids, position_ids=packed)
        assert (classes.current == FIRST).nonzero()[:, 1].tolist() == [0, 8, 16] * 4

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_decoding_with_a_cache(self, tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, kind: str) -> None:
        classes = PositionClasses(EOT)
        classes.watch(tiny_gpt2.transformer)
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=tiny_gpt2.config, max_cache_len=32)
        with torch.no_grad():
            tiny_gpt2(token_ids[:, :4], past_key_values=cache, use_cache=True)
            assert (classes.current == FIRST).sum() == 4  # an empty cache is no cache
            for t in range(4, 9):
                tiny_gpt2(token_ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                assert classes.current.shape == (4, 1)
                assert classes.current.flatten().tolist() == [
                    END_OF_TEXT if token == EOT else ORDINARY for token in token_ids[:, t].tolist()
                ]


class TestForward:
    def test_mix_0_is_layer_norm(self) -> None:
        norm, x = make_norm(tokens(2, 6)).eval(), stream(2, 6)
        expected = nn.functional.layer_norm(x, (WIDTH,), norm.weight, norm.bias, 1e-5)
        torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    def test_formula(self, mix: float, dtype: torch.dtype, tolerance: float) -> None:
        norm, x = make_norm(tokens(3, 6), dtype=dtype).eval(), stream(3, 6, dtype=dtype)
        norm.frozen_std.copy_(torch.tensor([[2.0, 5.0, 11.0]]))
        norm.mix.fill_(mix)
        out = norm(x)
        assert isinstance(out, Tensor) and out.dtype == dtype
        expected = by_hand(norm, x, float(norm.mix[0]), [2.0, 5.0, 11.0])
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)

    def test_mix_1_is_exactly_the_constants_scale(self) -> None:
        norm, x = make_norm(tokens(3, 6)).eval(), stream(3, 6)
        constants = torch.tensor([2.7, 5.3, 11.1])
        norm.frozen_std.copy_(constants.unsqueeze(0))
        norm.mix.fill_(1)
        centred = (x - torch.var_mean(x, dim=-1, correction=0, keepdim=True)[1]) * norm.weight
        expected = torch.addcmul(norm.bias, centred, constants.reciprocal()[norm.classes.current].unsqueeze(-1))
        assert torch.equal(norm(x), expected)

    def test_an_outlier_keeps_nearly_its_real_scale_early_in_a_taper(self) -> None:
        norm, x = make_norm(tokens(1, 6)).eval(), stream(1, 6)
        x = x / x.std(-1, correction=0, keepdim=True)
        x[0, 2] *= 150
        real = norm(x) - norm.bias
        norm.mix.fill_(0.1)  # all constants are 1
        ratio = (norm(x) - norm.bias) / real
        torch.testing.assert_close(ratio[0, 2], torch.full((WIDTH,), 150**0.1), rtol=1e-4, atol=0)  # 1.65, not 16
        torch.testing.assert_close(ratio[0, 1], torch.ones(WIDTH), rtol=1e-4, atol=0)

    def test_each_reader_has_its_own_mix_and_constants(self) -> None:
        norm, x = make_norm(tokens(2, 6), readers=2, dtype=torch.float64).eval(), stream(2, 6, dtype=torch.float64)
        norm.mix.copy_(torch.tensor([0.25, 1.0]))
        norm.frozen_std.copy_(torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]))
        first, second = norm(x).split(8, dim=-1)
        torch.testing.assert_close(first, by_hand(norm, x, 0.25, [2.0, 3.0, 4.0]))
        torch.testing.assert_close(second, by_hand(norm, x, 1.0, [5.0, 6.0, 7.0]))

    def test_the_first_position_constant_scales_row_0_not_channel_0(self) -> None:
        norm, x = make_norm(tokens(2, 6)).eval(), stream(2, 6)
        norm.mix.fill_(1)
        norm.frozen_std.fill_(2.0)
        before = norm(x) - norm.bias
        norm.frozen_std[:, FIRST] = 4.0
        ratio = (norm(x) - norm.bias) / before
        torch.testing.assert_close(ratio[:, 0], torch.full((2, WIDTH), 0.5))  # every channel of time index 0
        torch.testing.assert_close(ratio[:, 1:], torch.ones(2, 5, WIDTH))  # channel 0 elsewhere included

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_input_is_computed_in_float32(self, dtype: torch.dtype) -> None:
        norm, x = make_norm(tokens(2, 6), dtype=dtype, width=64).eval(), 300 * stream(2, 6, width=64)
        x = x.to(dtype)  # a variance of 8e5 overflows float16
        assert norm.mix.dtype == norm.running_std.dtype == torch.float32
        out = norm(x)
        assert out.dtype == dtype
        torch.testing.assert_close(out, by_hand(norm, x, 0.0, [1.0] * 3).to(dtype), rtol=1e-2, atol=1e-2)
        correctly_rounded = (out == by_hand(norm, x, 0.0, [1.0] * 3).to(dtype)).float().mean()
        assert correctly_rounded > 0.97  # computed in dtype itself, most entries would be off by a bit or more

    def test_autocast_leaves_the_norm_in_float32(self) -> None:
        norm, x = make_norm(tokens(2, 6)), stream(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            out = norm(x)
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, norm(x), rtol=0, atol=0)

    def test_a_frozen_norm_has_the_gradient_of_a_linear_map(self) -> None:
        norm, x = make_norm(tokens(1, 6), dtype=torch.float64), stream(1, 6, dtype=torch.float64).requires_grad_()
        norm.mix.fill_(1)
        norm.frozen_std.copy_(torch.tensor([[2.0, 3.0, 4.0]]))
        upstream = stream(1, 6, dtype=torch.float64).flip(2)
        norm(x).backward(upstream)
        constants = torch.tensor([4.0, 2.0, 2.0, 3.0, 2.0, 2.0], dtype=torch.float64)[None, :, None]
        scaled = upstream * norm.weight.detach() / constants
        assert x.grad is not None
        torch.testing.assert_close(x.grad, scaled - scaled.mean(-1, keepdim=True))


class TestStatistics:
    def stds(self, x: Tensor) -> Tensor:
        return (x.var(-1, correction=0) + 1e-5).sqrt()

    def test_means_of_each_class_and_momentum(self) -> None:
        ids = tokens(2, 6)
        norm = make_norm(ids, dtype=torch.float64)
        first, second, third = (stream(2, 6, dtype=torch.float64) * k for k in (1.0, 2.0, 0.5))
        norm(first)
        norm(second)  # two micro-batches of one step
        norm.update_running(0.9)
        classes = norm.classes.current
        one = torch.stack([torch.cat([self.stds(x)[classes == k] for x in (first, second)]).mean() for k in range(3)])
        torch.testing.assert_close(norm.running_std, one)  # first sight: the mean itself
        norm(third)
        norm.update_running(0.9)
        two = torch.stack([self.stds(third)[classes == k].mean() for k in range(3)])
        torch.testing.assert_close(norm.running_std, 0.9 * one + 0.1 * two)
        assert norm.std_count.tolist() == [0, 0, 0] and norm.std_sum.tolist() == [0, 0, 0]

    def test_an_absent_class_keeps_its_value(self) -> None:
        norm, x = make_norm(torch.ones(2, 6, dtype=torch.int64)), stream(2, 6)
        norm(x)
        norm.update_running(0.5)
        assert norm.running_initialized.tolist() == [True, False, True]
        before = norm.running_std.clone()
        norm.classes.fill(torch.ones(2, 6, dtype=torch.int64), cached=1)  # now position 0 is absent too
        norm(2 * x)
        norm.update_running(0.5)
        assert norm.running_std[ORDINARY] != before[ORDINARY]
        assert norm.running_std[FIRST] == before[FIRST] and norm.running_std[END_OF_TEXT] == before[END_OF_TEXT]
        assert norm.running_initialized.tolist() == [True, False, True]

    def test_evaluation_does_not_move_them(self) -> None:
        norm, x = make_norm(tokens(2, 6)), stream(2, 6)
        norm(x)
        norm.update_running(0.9)
        before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
        norm.eval()
        norm(5 * x)
        norm.update_running(0.9)
        for name, buffer in norm.named_buffers():
            assert torch.equal(buffer, before[name]), name

    def test_they_move_until_the_last_reader_is_frozen(self) -> None:
        norm, x = make_norm(tokens(2, 6), readers=2), stream(2, 6)
        norm(x)
        norm.update_running(0.9)
        start = norm.running_std.clone()
        norm.mix.copy_(torch.tensor([1.0, 0.99]))
        norm(2 * x)
        norm.update_running(0.9)
        moved = norm.running_std.clone()
        assert (moved != start).all()
        norm.mix.fill_(1)
        norm(4 * x)
        assert norm.std_count.tolist() == [0, 0, 0]
        norm.update_running(0.9)
        assert torch.equal(norm.running_std, moved)

    def test_a_non_finite_batch_is_left_out(self) -> None:
        norm, x = make_norm(tokens(2, 6)), stream(2, 6)
        norm(x)
        norm.update_running(0.9)
        before = norm.running_std.clone()
        doubled = 2 * x
        doubled[0, 0, 0] = float("nan")  # position 0 only
        norm(doubled)
        norm.update_running(0.0)
        assert norm.running_std[FIRST] == before[FIRST]
        others = [ORDINARY, END_OF_TEXT]  # these move as ever
        torch.testing.assert_close(norm.running_std[others], 2 * before[others], rtol=1e-4, atol=0)


class TestConstants:
    def seen(self, *stds: float) -> FreezableNorm:
        norm = make_norm(tokens(2, 6), readers=2, dtype=torch.float64)
        norm.running_std.copy_(torch.tensor(stds))
        norm.running_initialized.fill_(True)
        return norm

    def test_captured_when_leaving_mix_0_and_kept_from_then(self) -> None:
        norm = self.seen(2.0, 3.0, 5.0)
        norm.write_mix(1, 0.5)
        assert norm.frozen_std.tolist() == [[1.0] * 3, [2.0, 3.0, 5.0]]
        norm.running_std.mul_(10)
        norm.write_mix(1, 1.0)
        assert norm.frozen_std[1].tolist() == [2.0, 3.0, 5.0]
        norm.write_mix(1, 0.0)
        norm.write_mix(1, 1.0)  # a fresh start takes fresh constants
        assert norm.frozen_std[1].tolist() == [20.0, 30.0, 50.0]
        assert norm.mix.tolist() == [0.0, 1.0]

    def test_a_class_never_seen_takes_the_ordinary_value(self) -> None:
        norm = self.seen(2.0, 9.0, 5.0)
        norm.running_initialized[END_OF_TEXT] = False
        norm.write_mix(0, 1.0)
        assert norm.frozen_std[0].tolist() == [2.0, 2.0, 5.0]

    def test_dropping_is_geometric_and_a_function_of_the_share_alone(self) -> None:
        norm = self.seen(2.0, 3.0, 8.0)
        norm.write_mix(0, 1.0)
        for share, expected in ((0.5, 4.0), (1.0, 2.0), (0.25, 2.0 * 4**0.75), (0.0, 8.0), (0.5, 4.0)):
            norm.write_dropped(FIRST, share)
            torch.testing.assert_close(norm.frozen_std[0], torch.tensor([2.0, 3.0, expected], dtype=torch.float64))
        norm.write_dropped(FIRST, 1.0)
        norm.write_dropped(END_OF_TEXT, 1.0)
        assert norm.frozen_std[0].tolist() == [2.0, 2.0, 2.0]  # exactly, or folding would refuse

    def test_a_share_of_one_is_exact_in_float32(self) -> None:
        norm = make_norm(tokens(2, 6))
        norm.running_std.copy_(torch.tensor([1.7182817, 0.1234567, 3141.5927]))
        norm.running_initialized.fill_(True)
        norm.write_mix(0, 1.0)
        captured = norm.frozen_std.clone()
        norm.write_dropped(FIRST, 1.0)
        assert norm.frozen_std[0, FIRST] == norm.frozen_std[0, ORDINARY]
        norm.write_dropped(FIRST, 0.0)
        assert torch.equal(norm.frozen_std, captured)

    def test_a_site_frozen_after_the_drop_takes_the_ordinary_value(self) -> None:
        norm = self.seen(2.0, 3.0, 8.0)
        norm.write_dropped(FIRST, 1.0)
        norm.write_mix(0, 1.0)
        assert norm.frozen_std[0].tolist() == [2.0, 3.0, 2.0]


def capped_norm(cap: float, *, bias: bool) -> FreezableNorm:
    """Constant 1 for every position, with a cap, in float64."""
    weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
    beta = nn.Parameter(torch.linspace(-1, 1, WIDTH, dtype=torch.float64)) if bias else None
    norm = FreezableNorm(weight, beta, 1e-5, classes=PositionClasses(None), cap=cap)
    norm.mix.fill_(1.0)
    return norm


class TestCap:
    """With a cap, a norm gives at most that many times its usual size."""

    @pytest.mark.parametrize("bias", [True, False], ids=["LayerNorm", "RMSNorm"])
    @pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
    def test_larger_positions_are_normalised_to_it(self, bias: bool, mix: float) -> None:
        norm, x = capped_norm(2.0, bias=bias), stream(2, 6, dtype=torch.float64)
        norm.mix.fill_(mix)
        x = x * torch.tensor([0.1, 0.3, 0.5, 1.0, 3.0, 30.0], dtype=torch.float64)[:, None]
        centred = x - x.mean(-1, keepdim=True) if bias else x
        std = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        scale = torch.minimum(std ** (mix - 1), 2.0 / std)
        assert bool((scale < std ** (mix - 1)).any()) == (mix > 0), "a real norm never gives more than its usual size"
        expected = centred * scale * norm.weight + (norm.bias if bias else 0.0)
        torch.testing.assert_close(norm(x), expected)

    def test_it_counts_where_it_acts_and_gives_way(self) -> None:
        norm = capped_norm(2.0, bias=False)
        x = torch.ones(1, 4, WIDTH, dtype=torch.float64) * torch.tensor([0.5, 1.9, 2.1, 9.0])[:, None]
        norm(x)
        assert norm.over_cap == 2
        norm.cap_lifted.fill_(0.5)  # the cap is 4
        norm(x)
        assert norm.over_cap == 3
        norm.cap_lifted.fill_(1.0)
        torch.testing.assert_close(norm(x), x * norm.weight)
        assert norm.over_cap == 3
        norm.eval()(x)
        assert norm.over_cap == 3, "only training is counted"

    @pytest.mark.parametrize("lifted", [0.0, 0.5, 1.0])
    def test_its_gradient_is_that_of_the_formula_also_when_it_is_lifted(self, lifted: float) -> None:
        norm = capped_norm(2.0, bias=False)
        norm.cap_lifted.fill_(lifted)
        sizes = torch.tensor([0.5, 1.9, 2.1, 9.0], dtype=torch.float64)[:, None]
        x = (stream(1, 4, dtype=torch.float64) * sizes).requires_grad_()
        norm(x).square().sum().backward()
        by_hand = x.detach().clone().requires_grad_()
        std = (by_hand.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        bound = torch.inf if lifted == 1 else 2.0 / (1 - lifted)
        frozen = torch.where(std > bound, by_hand / std * bound if lifted < 1 else by_hand, by_hand)
        (frozen * norm.weight).square().sum().backward()
        torch.testing.assert_close(x.grad, by_hand.grad)

    def test_a_checkpoint_knows_how_far_it_is_lifted(self) -> None:
        norm, other = capped_norm(2.0, bias=True), capped_norm(2.0, bias=True)
        norm.cap_lifted.fill_(0.75)
        other.load_state_dict(norm.state_dict())
        assert other.cap_lifted == 0.75


class TestNormedProjection:
    def projection(self, dtype: torch.dtype = torch.float64) -> NormedProjection:
        norm = make_norm(tokens(2, 6), readers=2, dtype=dtype)
        generator = torch.Generator().manual_seed(5)
        weight = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH, generator=generator).to(dtype))
        bias = nn.Parameter(torch.randn(3 * WIDTH, generator=generator).to(dtype))
        return NormedProjection(norm, weight, bias)

    def test_queries_and_keys_read_reader_0_and_values_reader_1(self) -> None:
        projection, x = self.projection().eval(), stream(2, 6, dtype=torch.float64)
        projection.norm.mix.copy_(torch.tensor([1.0, 0.5]))
        projection.norm.frozen_std.copy_(torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]]))
        for_qk, for_v = projection.norm.readings(x)
        everything_qk = for_qk @ projection.weight + projection.bias
        everything_v = for_v @ projection.weight + projection.bias
        queries, keys, values = projection(x).split(WIDTH, dim=2)
        torch.testing.assert_close(queries, everything_qk[..., :WIDTH])
        torch.testing.assert_close(keys, everything_qk[..., WIDTH : 2 * WIDTH])
        torch.testing.assert_close(values, everything_v[..., 2 * WIDTH :])

    def test_gradients(self) -> None:
        projection = self.projection()
        projection.norm.mix.copy_(torch.tensor([0.3, 0.0]))
        projection.norm.frozen_std.fill_(2.5)
        x = stream(2, 6, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(projection.eval(), (x,))
        projection(x).sum().backward()
        for name, parameter in projection.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name

    def test_autocast_projects_in_bfloat16(self) -> None:
        projection, x = self.projection(torch.float32), stream(2, 6)
        with torch.autocast("cpu", torch.bfloat16):
            assert projection(x).dtype == torch.bfloat16


def test_no_forward_or_update_reads_a_tensor_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each of these would wait for it. Stand-in for a GPU test: the reads themselves are forbidden."""

    def forbidden(*_: object) -> None:
        raise AssertionError("a tensor was read on the host")

    ids, x = tokens(2, 6), stream(2, 6)
    norm = make_norm(ids, readers=2)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, forbidden)
    norm.classes.fill(ids)
    norm(x)
    norm.update_running(0.9)
    norm.write_mix(0, 0.5)
    norm.write_dropped(FIRST, 0.5)
    norm.eval()
    norm(x)


@pytest.mark.parametrize("narrow", [nn.Module.bfloat16, nn.Module.half, lambda model: model.to(torch.bfloat16)])
def test_constants_stay_exact_in_a_narrow_model(
    tiny_gpt2: GPT2LMHeadModel, token_ids: Tensor, narrow: Callable[[nn.Module], nn.Module]
) -> None:
    sites = install(tiny_gpt2, eot_token_id=100)
    tiny_gpt2.train()
    tiny_gpt2(token_ids)
    sites.update_running(0.9)
    sites.set_mix("ln_2.0", 1.0)
    before = sites.frozen_constants(), sites.running_stds()
    narrow(tiny_gpt2)
    assert (sites.frozen_constants(), sites.running_stds()) == before
    assert {norm.weight.dtype for norm in sites.norms.values()} == {tiny_gpt2.dtype} != {torch.float32}
    assert tiny_gpt2(token_ids).logits.dtype == tiny_gpt2.dtype
    tiny_gpt2.double()
    assert sites.norms["ln_f"].running_std.dtype == torch.float64
    assert (sites.frozen_constants(), sites.running_stds()) == before


def test_no_buffer_is_lost_in_a_state_dict() -> None:
    norm = make_norm(tokens(2, 6), readers=2)
    norm(stream(2, 6))
    norm.update_running(0.9)
    norm.write_mix(1, 0.7)
    norm.write_dropped(FIRST, 0.5)
    other = make_norm(tokens(2, 6), readers=2)
    other.load_state_dict(norm.state_dict(), strict=True)
    x = stream(2, 6) + 1
    for mine, theirs in zip(norm.eval()(x), other.eval()(x), strict=True):
        assert torch.equal(mine, theirs)
    assert norm.running_std.shape == (N_CLASSES,)


def test_the_constant_is_the_mean_of_the_stds() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8) * torch.rand(4, 6, 1) * 5
    norm = FreezableNorm(nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), 0.0, classes=PositionClasses(None))
    norm.train()(x)
    norm.update_running(0.9)
    assert norm.running_std[ORDINARY].item() == pytest.approx(x.std(-1, correction=0).mean().item(), rel=1e-5)


def test_a_median_is_not_moved_by_a_few_outliers() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 65, 8) * (1 + torch.rand(4, 65, 1))
    stds = x[:, 1:].std(-1, correction=0)
    x[:, 7] *= 1e4
    norm = FreezableNorm(
        nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8)), 0.0, classes=PositionClasses(None), median=True
    )
    norm.classes.fill(torch.ones(4, 65, dtype=torch.int64))
    norm.train()(x)
    norm.update_running(0.9)
    median = x[:, 1:].std(-1, correction=0).median()
    torch.testing.assert_close(norm.running_std[ORDINARY], median, rtol=1e-6, atol=0)
    assert abs(norm.running_std[ORDINARY] / stds.median() - 1) < 0.05
    torch.testing.assert_close(norm.running_std[FIRST], x[:, 0].std(-1, correction=0).mean())  # the others have means
