"""FreezableNorm: one module from a real LayerNorm or RMSNorm (mix 0) to a constant scale (mix 1).

    LayerNorm:  scale = (var(x) + eps)^(-(1 - mix) / 2) * frozen_std[class of the position]^(-mix)
                y     = (x - mean(x)) * scale * gamma + beta
    RMSNorm:    the same with the mean of x^2 in place of the variance, and neither mean(x) nor beta

Mix 0 is LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467), whose root mean square is called std here, too; mix 1 is the
frozen norm of arXiv 2409.13710; between the two the logarithm of the scale moves in a straight line. A weighted mean of both
scales would give a position whose std is 150 times the constant 16 times its real scale at mix 0.1; this gives it 1.65 times. Mix
and constants are buffers, so freezing only writes memory: one compiled graph serves a whole run, and nothing in a forward pass
waits for the device.

Shapes: B batch, T positions, D model width, R readers of a norm, K position classes (3).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ORDINARY, END_OF_TEXT, FIRST = 0, 1, 2
"""Position classes. FIRST, a sequence's position 0, wins over END_OF_TEXT where both hold."""

N_CLASSES = 3

MEDIAN_POSITIONS = 4096
"""About as many stds of a batch are sorted for their median."""
UNOBSERVED = -1
"""Stands in place of a class at positions that no statistics are gathered of, such as padding. Nobody reads what a norm gives
there."""


class PositionClasses(nn.Module):
    """The class of every position of the batch now in the model, shared by all its norms.

    One instance a model. `watch` makes it look at each call of the transformer; norms then read `current`.

    Args:
        eot_token_id: id of the end-of-text token; None for a vocabulary without one, then no position is END_OF_TEXT.
        bos_token_id: id of a token that begins every text, if that is another one: its positions are FIRST, wherever they are.

    Attributes:
        current: (B, T) int64, a class for each position, or UNOBSERVED. (1, 1) ORDINARY before the first call.
    """

    def __init__(self, eot_token_id: int | None, bos_token_id: int | None = None) -> None:
        super().__init__()
        self.eot_token_id = eot_token_id
        self.bos_token_id = bos_token_id if bos_token_id != eot_token_id else None
        self._forward_order: tuple[str, ...] = ()
        # A plain attribute, not a buffer: it belongs to a batch, so it is not state and no wrapper should broadcast it.
        self.current: Tensor = torch.zeros(1, 1, dtype=torch.int64)

    def watch(self, transformer: nn.Module) -> RemovableHandle:
        """Fill `current` before each forward pass of `transformer`, the body of a language model of transformers."""
        self._forward_order = tuple(inspect.signature(transformer.forward).parameters)
        return transformer.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    @torch.no_grad()
    def fill(
        self,
        input_ids: Tensor | None,
        *,
        position_ids: Tensor | None = None,
        cached: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        observed: Tensor | None = None,
    ) -> None:
        """Set `current` from the inputs of a forward pass.

        Args:
            input_ids: (B, T) tokens; None when inputs_embeds is given, then no position is END_OF_TEXT.
            position_ids: (B, T), (1, T) or (T,) explicit positions; they win over what follows from `cached`.
            cached: number of positions already in the key-value cache: column t is position cached + t.
            inputs_embeds: (B, T, D), looked at for its shape and device when there are no tokens.
            observed: (B, S), false (or 0) where a position is no text; None when all are. If there are more than T columns, as
                in an attention mask that begins with the cache, the last T count.
        """
        if input_ids is not None:
            # The model folds leading dimensions into one, so do the same.
            tokens = input_ids.reshape(-1, input_ids.shape[-1])
            shape, device = tokens.shape, tokens.device
        elif inputs_embeds is not None:
            tokens = None
            shape, device = inputs_embeds.shape[:2], inputs_embeds.device
        else:
            return  # The model raises its own error.
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=device) + cached
        classes = torch.full(shape, ORDINARY, dtype=torch.int64, device=device)
        if tokens is not None and self.eot_token_id is not None:
            classes.masked_fill_(tokens == self.eot_token_id, END_OF_TEXT)
        if tokens is not None and self.bos_token_id is not None:
            classes.masked_fill_(tokens == self.bos_token_id, FIRST)
        classes.masked_fill_(position_ids == 0, FIRST)
        self.current = classes if observed is None else classes.masked_fill_(observed[:, -shape[1] :] == 0, UNOBSERVED)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._forward_order, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        observed, mask = given.get("observed"), given.get("attention_mask")
        if observed is None and isinstance(mask, Tensor):
            observed = _attended(mask)
        self.fill(
            given.get("input_ids"),
            position_ids=given.get("position_ids"),
            cached=0 if cache is None else cache.get_seq_length(),
            inputs_embeds=given.get("inputs_embeds"),
            observed=observed,
        )

    def extra_repr(self) -> str:
        return f"eot_token_id={self.eot_token_id}, bos_token_id={self.bos_token_id}"


def _attended(mask: Tensor) -> Tensor | None:
    """(B, S) which positions are text by an attention mask; None when the mask does not say.

    Args:
        mask: (B, S), true (or not 0) for text, as a tokenizer makes it; or (B, 1, T, S), true (or 0, added to the scores) where a
            query sees a key. There a position is text if it sees itself: what masks padding hides its keys from every query.
    """
    if mask.ndim == 2:
        return mask
    if mask.ndim != 4 or mask.shape[-1] < mask.shape[-2]:
        return None
    own = mask[:, 0].diagonal(mask.shape[-1] - mask.shape[-2], dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0


class FreezableNorm(nn.Module):
    """A LayerNorm or RMSNorm over the last dimension whose scale can be frozen, one reader at a time.

    Args:
        weight: (D,) gamma; taken over as a parameter, not copied.
        bias: (D,) beta; likewise. None makes it an RMSNorm: no bias, no mean, the mean square in place of the variance.
        eps: added to the variance or the mean square.
        classes: the model's shared position classes.
        readers: R, how many readers with a mix of their own the norm has.
        cap: what the norm gives has at most this std (before gamma), until `cap_lifted` is 1: a position whose std is more than
            cap times the constant is still normalised. None: without a cap.
        median: the statistic of a batch's ordinary positions is the median of their stds, not the mean. A few positions with
            massive activations then do not move the constant.

    Buffers (float32, or float64 for float64 weights):
        mix: (R,) 0 real, 1 frozen.
        frozen_std: (R, K) the constants in use, units of the residual stream.
        captured_std: (R, K) what they were when the reader left mix 0, before any special value was dropped.
        dropped: (K,) how far each special class has moved from its own constant (0) to the ordinary one (1).
        running_std: (K,) running mean over steps of the batch's mean (or median) std of each class, a std being sqrt(var + eps).
        running_initialized: (K,) bool, whether a class was ever seen.
        std_sum, std_count: (K,) sum and number of the stds since the last `update_running`.
        cap_lifted: scalar v, of a norm with a cap: the cap is now cap / (1 - v), none at 1.
        over_cap: scalar, of a norm with a cap: at how many positions and readers it acted since this was last set to 0.
    """

    mix: Tensor
    frozen_std: Tensor
    captured_std: Tensor
    dropped: Tensor
    running_std: Tensor
    running_initialized: Tensor
    std_sum: Tensor
    std_count: Tensor
    cap_lifted: Tensor
    over_cap: Tensor

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        eps: float,
        *,
        classes: PositionClasses,
        readers: int = 1,
        median: bool = False,
        cap: float | None = None,
    ) -> None:
        super().__init__()
        assert weight.ndim == 1 and (bias is None or weight.shape == bias.shape), weight.shape
        assert readers >= 1, readers
        self.weight = weight
        self.bias = bias
        self.eps = eps
        self.readers = readers
        self.median = median
        self.cap = cap
        self.classes = classes
        dtype = torch.promote_types(weight.dtype, torch.float32)

        def buffer(name: str, initial: Tensor) -> None:
            self.register_buffer(name, initial.to(device=weight.device))

        buffer("mix", torch.zeros(readers, dtype=dtype))
        # Ones, not zeros: their logarithm is taken while mix is still 0 and has to stay finite.
        buffer("frozen_std", torch.ones(readers, N_CLASSES, dtype=dtype))
        buffer("captured_std", torch.ones(readers, N_CLASSES, dtype=dtype))
        buffer("dropped", torch.zeros(N_CLASSES, dtype=dtype))
        buffer("running_std", torch.ones(N_CLASSES, dtype=dtype))
        buffer("running_initialized", torch.zeros(N_CLASSES, dtype=torch.bool))
        buffer("std_sum", torch.zeros(N_CLASSES, dtype=dtype))
        buffer("std_count", torch.zeros(N_CLASSES, dtype=dtype))
        if cap is not None:
            buffer("cap_lifted", torch.zeros((), dtype=dtype))
            buffer("over_cap", torch.zeros((), dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FreezableNorm:
        """Keep the buffers exact when `.to(dtype)`, `.half()` or `.bfloat16()` makes the weights narrower than float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            converted = self._buffers[name]
            assert buffer is not None and converted is not None, name
            wide = torch.promote_types(converted.dtype, torch.float32)
            if converted.is_floating_point() and converted.dtype != wide:
                self._buffers[name] = buffer.to(device=converted.device, dtype=wide)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` (B, T, D) once for each reader.

        Computes in float32 (float64 for float64 input) and returns x's dtype: a (B, T, D) tensor when R == 1,
        otherwise all R side by side, (B, T, R D).
        """
        outputs = self.readings(x)
        return outputs[0] if self.readers == 1 else torch.cat(outputs, dim=-1)

    def readings(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each of the R readers gets for `x` (B, T, D): always a tuple, else the same as `forward`."""
        classes = self.classes.current
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.bias is None:
            variance, centred = wide.square().mean(dim=-1, keepdim=True), wide * self.weight
        else:
            variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
            centred = (wide - mean) * self.weight
        variance = variance + self.eps
        if self.training:
            self._observe(variance, classes)
        log_variance = variance.log()
        scales = (self._scale(r, log_variance, classes) for r in range(self.readers))
        if self.bias is None:
            return tuple((centred * scale).to(x.dtype) for scale in scales)
        return tuple(torch.addcmul(self.bias, centred, scale).to(x.dtype) for scale in scales)

    def _scale(self, reader: int, log_variance: Tensor, classes: Tensor) -> Tensor:
        """The scale of one reader, (B, T, 1), by the module's formula. At mix 1 it is exactly 1 / constant, whatever the variance is.

        As one exponential, because compilers for a CPU compute that once for a position, and a power once for each channel.
        """
        mix, constants = self.mix[reader], self.frozen_std[reader]
        frozen = (mix * constants.log())[classes].unsqueeze(-1)
        between = torch.exp((mix - 1) / 2 * log_variance - frozen)
        scale = torch.where(mix == 1, constants.reciprocal()[classes].unsqueeze(-1), between)
        if self.cap is None:
            return scale
        # Finite also where the cap is lifted: there an infinite bound, which is not chosen, would give a gradient that is not a number.
        most = self.cap / (1 - self.cap_lifted).clamp(min=1e-6) * torch.exp(-log_variance / 2)
        acts = (self.cap_lifted < 1) & (scale > most)
        if self.training:
            self.over_cap.add_(acts.sum())
        return torch.where(acts, most, scale)

    @torch.no_grad()
    def _observe(self, variance: Tensor, classes: Tensor) -> None:
        """Add sqrt(variance) (B, T, 1) of each class to the sums, unless all readers are frozen."""
        members = classes.expand(variance.shape[:-1]).unsqueeze(-1) == torch.arange(N_CLASSES, device=variance.device)
        counted = members * (self.mix < 1).any()  # (B, T, K); false everywhere once nothing is real: no branch, no sync
        std, count = variance.sqrt(), counted.sum((0, 1))
        # where, not a product: a non-finite std of one class must not reach the others
        sums = torch.where(counted, std, 0.0).sum((0, 1))
        if self.median:
            ordinary = torch.where(counted, std, torch.nan)[..., ORDINARY].flatten()
            # A few thousand positions are enough and quickly sorted. The stride is odd, so it meets all places of a sequence.
            middle = ordinary[:: ordinary.numel() // MEDIAN_POSITIONS | 1].nanmedian().nan_to_num()
            sums = torch.cat(((middle * count[ORDINARY]).unsqueeze(0), sums[1:]))
        self.std_sum.add_(sums)
        self.std_count.add_(count)

    @torch.no_grad()
    def update_running(self, momentum: float, discard: Tensor | None = None) -> None:
        """Fold the sums since the last call into `running_std` and zero them. Does not wait for the device.

        running = momentum * running + (1 - momentum) * mean, for each class. A class seen for the first time takes the
        mean itself; a class that was absent, or whose mean is not finite, keeps its value.

        Args:
            momentum: weight of the old value, in [0, 1].
            discard: scalar; not 0 drops the sums instead, as of a step whose update was not made.
        """
        assert 0 <= momentum <= 1, momentum
        mean = self.std_sum / torch.where(self.std_count > 0, self.std_count, 1.0)
        seen = (self.std_count > 0) & torch.isfinite(mean)
        if discard is not None:
            seen = seen & (discard == 0)
        moved = torch.where(self.running_initialized, torch.lerp(mean, self.running_std, momentum), mean)
        self.running_std.copy_(torch.where(seen, moved, self.running_std))
        self.running_initialized.logical_or_(seen)
        self.std_sum.zero_()
        self.std_count.zero_()

    @torch.no_grad()
    def write_mix(self, reader: int, value: float) -> None:
        """Set the mix of one reader; if it was 0, capture the running stds as its constants. No sync.

        A class that was never seen takes the ordinary value.
        """
        running = torch.where(self.running_initialized, self.running_std, self.running_std[ORDINARY])
        was_real = self.mix[reader] == 0
        self.captured_std[reader] = torch.where(was_real, running, self.captured_std[reader])
        self.mix[reader].fill_(value)  # an assignment would wait for the device
        self._refresh_frozen()

    @torch.no_grad()
    def write_dropped(self, position_class: int, value: float) -> None:
        """Move the constants of a special class to `value` of the way to the ordinary constant. No sync."""
        assert position_class in (END_OF_TEXT, FIRST), position_class
        self.dropped[position_class].fill_(value)
        self._refresh_frozen()

    def _refresh_frozen(self) -> None:
        """Set frozen_std from captured_std and dropped: exp((1 - d) log special + d log ordinary)."""
        ordinary = self.captured_std[:, :1]
        between = self.captured_std * (ordinary / self.captured_std) ** self.dropped
        # At d = 1 take the ordinary value itself, not one a rounding away: folding needs a single constant.
        self.frozen_std.copy_(torch.where(self.dropped == 1, ordinary, between))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, readers={self.readers}"


class NormedProjection(nn.Module):
    """The attention's joint input projection of GPT-2 or GPT-NeoX together with the norm in front of it.

    Takes the place of c_attn or query_key_value, with an identity in the norm's: queries and keys are projected from the norm's
    reader 0 (ln_1_qk), values from its reader 1 (ln_1_v).

    Args:
        norm: ln_1 with R = 2 readers.
        weight: taken over, not copied. Of GPT-2 (D, 3D), input-first, columns q, k, v. Of GPT-NeoX (3D, D), output-first, head
            by head its rows q, k, v.
        bias: (3D,) likewise.
        heads: of a GPT-NeoX; None for a GPT-2.
    """

    def __init__(
        self, norm: FreezableNorm, weight: nn.Parameter, bias: nn.Parameter, *, heads: int | None = None
    ) -> None:
        super().__init__()
        width = norm.weight.shape[0]
        assert norm.readers == 2, norm.readers
        assert weight.shape == ((width, 3 * width) if heads is None else (3 * width, width)), weight.shape
        self.norm = norm
        self.weight = weight
        self.bias = bias
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Project the residual stream `x` (B, T, D) to queries, keys and values (B, T, 3D)."""
        for_qk, for_v = self.norm.readings(x)
        width = x.shape[-1]
        if self.heads is None:
            # split, not two slices: its backward joins the two gradients instead of padding each with zeros and adding
            weight_qk, weight_v = self.weight.split((2 * width, width), dim=1)
            bias_qk, bias_v = self.bias.split((2 * width, width))
            return torch.cat((_affine(for_qk, weight_qk, bias_qk), _affine(for_v, weight_v, bias_v)), dim=-1)
        sizes = (2 * width // self.heads, width // self.heads)
        rows_qk, rows_v = self.weight.view(self.heads, -1, width).split(sizes, dim=1)
        bias_qk, bias_v = self.bias.view(self.heads, -1).split(sizes, dim=1)
        qk = nn.functional.linear(for_qk, rows_qk.reshape(2 * width, width), bias_qk.reshape(-1))
        v = nn.functional.linear(for_v, rows_v.reshape(width, width), bias_v.reshape(-1))
        shape = (*x.shape[:-1], self.heads)
        return torch.cat((qk.view(*shape, sizes[0]), v.view(*shape, sizes[1])), dim=-1).view(*x.shape[:-1], 3 * width)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, heads={self.heads}"


class ReadingProjection(nn.Module):
    """A linear map of queries, keys or values behind a norm of R readers that stays where it was (Llama's q_proj).

    The norm gives what all readers get side by side; this map reads its own part.

    Args:
        weight: (out, D), output-first; taken over, not copied.
        bias: (out,) likewise, or None.
        reader: which part, from 0.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, reader: int) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.reader = reader

    def forward(self, parts: Tensor) -> Tensor:
        """Project one part of `parts` (B, T, R D) to (B, T, out)."""
        width = self.weight.shape[1]
        return nn.functional.linear(parts.narrow(-1, self.reader * width, width), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, reader={self.reader}"


def std_of(x: Tensor, *, centred: bool) -> Tensor:
    """The std of each position of `x` (..., D) without epsilon, (...): of a LayerNorm if `centred`, else the root mean square.

    Neither has an infinite gradient where it is 0, as the root of a variance has.
    """
    return x.std(dim=-1, correction=0) if centred else torch.linalg.vector_norm(x, dim=-1) / x.shape[-1] ** 0.5


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (..., in) times weight (in, out) plus bias (out,)."""
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[1])
