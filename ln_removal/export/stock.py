"""The LN-free model as a stock GPT2LMHeadModel, for tools that know no other class.

Its LayerNorms are still there but disarmed. With eps = 2^40 a norm computes, for any residual stream whose variance is
small against 2^40, about 10^12,

    (x - mean(x)) / sqrt(var(x) + 2^40) * 2^14  =  (x - mean(x)) * 2^-6,

a constant scale that the next matrix undoes by a factor 2^6. Powers of two make both steps exact, and 2^14 fits
float16, where weights of 10^6 (the usual choice with eps = 10^12) overflow. Subtracting the mean changes nothing: the
columns of folded weights have mean zero.

GPT-2's unembedding has no bias, so the logit bias b travels as a constant: ln_f's bias is t for every channel, and
every channel of row v of the unembedding gets b_v / (t D) added. The D channels of the constant give
t D b_v / (t D) = b_v; what varies from token to token has mean zero over the channels, so the added constant does not
see it.

Shapes: D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.layout import check_plain
from ln_removal.models.norm_free import from_folded, without_identity

if TYPE_CHECKING:
    from transformers import GPT2Config, GPT2LMHeadModel

    from ln_removal.models.normfree_gpt2 import NormFreeGPT2LMHeadModel

EPSILON = 2.0**40
"""layer_norm_epsilon of the stock form; its square root is 2^20."""

NORM_WEIGHT = 2.0**14
"""Weight of every disarmed LayerNorm."""

READER_SCALE = 2.0**6
"""Factor on the weights behind each norm: sqrt(EPSILON) / NORM_WEIGHT."""

LARGEST_MEAN = 0.005
"""Mean of a folded weight's columns relative to the weights that rounding, to bfloat16 at most, can leave."""

# Both ends, and b / (t D) with them, are far from the limits of float16.
_SMALLEST_CARRIER, _LARGEST_CARRIER = 2.0**-10, 2.0**4

_READERS = ("attn.c_attn", "mlp.c_fc")


def stock_config(config: GPT2Config) -> GPT2Config:
    """The configuration of the stock form of an LN-free model with configuration `config`.

    It has n_ctx, which transformers no longer writes and HookedTransformer reads.
    """
    from transformers import GPT2Config

    changes = {"layer_norm_epsilon": EPSILON, "tie_word_embeddings": False, "n_ctx": config.n_positions}
    return GPT2Config(**without_identity(config) | changes)


@torch.no_grad()
def to_stock(model: NormFreeGPT2LMHeadModel) -> GPT2LMHeadModel:
    """Build the stock GPT2LMHeadModel that computes what `model` computes, in evaluation mode.

    Args:
        model: a folded model, whose reader weights have mean zero over their input dimension; not changed.

    Returns:
        A GPT-2 with new weights in the model's dtype, on its device. Save it in float32: users can then load it in
        float32, bfloat16 or float16.

    Raises:
        UserError: what reads the residual stream does not ignore its mean, as in a model that was trained without norms, or
            trained further after its norms were folded; or a linear map holds an adapter or is quantised.
    """
    from transformers import GPT2LMHeadModel

    check_plain(model, norms=())
    if model.config.split_qkv:
        model = from_folded(model.config, model.state_dict())
    if (share := _share_of_mean(model)) > LARGEST_MEAN:
        raise UserError(
            f"the model reads the mean of its residual stream (means are {share:.1%} of its weights, at most {LARGEST_MEAN:.1%} "
            "after a fold), which a stock GPT-2's LayerNorm subtracts: it was trained further after its norms were folded (a merged "
            "LoRA adapter is such a training too), or trained without norms; use --format normfree"
        )

    with torch.device("meta"):
        stock = GPT2LMHeadModel(stock_config(model.config))
    width = model.config.n_embd
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name in [f"transformer.h.{i}.{reader}" for i in range(model.config.n_layer) for reader in _READERS]:
        state[f"{name}.weight"] *= READER_SCALE
    like = state["transformer.wte.weight"]
    scale = torch.full((width,), NORM_WEIGHT, dtype=like.dtype, device=like.device)
    norms = [f"transformer.h.{i}.{ln}" for i in range(model.config.n_layer) for ln in ("ln_1", "ln_2")]
    for name in [*norms, "transformer.ln_f"]:
        state[f"{name}.weight"] = scale.clone()
        state[f"{name}.bias"] = torch.zeros_like(scale)
    weight = state["lm_head.weight"].double() * READER_SCALE
    bias = state.pop("lm_head.bias").double()
    carrier = _carrier(weight, bias)
    state["transformer.ln_f.bias"].fill_(carrier)
    state["lm_head.weight"] = (weight + (bias / (carrier * width)).unsqueeze(1)).to(like.dtype)
    stock.load_state_dict({name: nn.Parameter(value) for name, value in state.items()}, strict=True, assign=True)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()


def _share_of_mean(model: NormFreeGPT2LMHeadModel) -> float:
    """Over all readers, the largest root mean square of the columns' means relative to that of the weights."""
    blocks = [
        model.get_submodule(f"transformer.h.{i}.{name}") for i in range(model.config.n_layer) for name in _READERS
    ]
    # (in, out) each; nn.Linear keeps its weight output-first (V, D)
    weights = [*(block.get_parameter("weight") for block in blocks), model.lm_head.weight.T]
    return max(
        float(weight.float().mean(dim=0).norm() * weight.shape[0] ** 0.5 / weight.float().norm()) for weight in weights
    )


def _carrier(weight: Tensor, bias: Tensor) -> float:
    """The constant t that carries the logit bias through ln_f, a power of two.

    In half precision a large t drowns the signal that it is added to, a small one makes the added b_v / (t D) drown the
    weights. At rms(b) / (sqrt(D) * row norm) the added constant is as long as the row itself: rounding then costs at
    most sqrt(2) times what it costs without the bias, or it is small against the bias.

    Args:
        weight: (V, D) unembedding.
        bias: (V,) logit bias.
    """
    rows = weight.square().sum(dim=1).mean().sqrt()
    ratio = float(bias.square().mean().sqrt() / (math.sqrt(weight.shape[1]) * rows))
    assert math.isfinite(ratio), ratio
    return 2.0 ** round(math.log2(min(max(ratio, _SMALLEST_CARRIER), _LARGEST_CARRIER)))
