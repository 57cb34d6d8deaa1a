"""The LN-free model as transformers' own class of its family, for tools that know no other: a stock GPT2LMHeadModel of a GPT-2.

Its norms are still there but disarmed. With eps = 2^40 a LayerNorm computes, for any residual stream whose variance is
small against 2^40, about 10^12,

    (x - mean(x)) / sqrt(var(x) + 2^40) * 2^14  =  (x - mean(x)) * 2^-6,

a constant scale that the next matrix undoes by a factor 2^6. Powers of two make both steps exact, and 2^14 fits
float16, where weights of 10^6 (the usual choice with eps = 10^12) overflow. Subtracting the mean changes nothing: the
columns of folded weights have mean zero. An RMSNorm does the same without the mean. The relative error is mean(x^2) / (2 eps),
7.6e-6 where the root mean square of x is 4096.

The unembedding of these classes has no bias, so the logit bias b that LayerNorms leave travels as a constant: the last norm's
bias is t for every channel, and every channel of row v of the unembedding gets b_v / (t D) added. The D channels of the
constant give t D b_v / (t D) = b_v; what varies from token to token has mean zero over the channels, so the added constant
does not see it. Folded RMSNorms leave no bias.

In float16 this works for LayerNorm, which multiplies with its weight before it rounds. An RMSNorm of transformers rounds
x * 2^-20 to the type of its input first. A float16 has steps of 2^-24 there, which are steps of 1/16 in x. Another epsilon does
not help: the error of the disarmed norm is y^2 / 2 with y the root mean square of x / sqrt(eps), so an error below 10^-4 takes
y < 0.014 whatever epsilon is, and between that and the step of 2^-24 there is no room for both the largest streams of a model
and its ordinary ones, unless epsilon were set to the largest stream that the model ever has.

Shapes: D model width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING

from ln_removal.errors import UserError
from ln_removal.models.families import Family, family_of
from ln_removal.models.layout import check_plain
from ln_removal.models.norm_free import built, from_folded, without_identity

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EPSILON = 2.0**40
"""The norms' epsilon in the stock form; its square root is 2^20."""

NORM_WEIGHT = 2.0**14
"""Weight of every disarmed norm."""

READER_SCALE = 2.0**6
"""Factor on the weights behind each norm: sqrt(EPSILON) / NORM_WEIGHT."""

LARGEST_MEAN = 0.005
"""Mean of a folded weight's columns relative to the weights that rounding, to bfloat16 at most, can leave."""

# Both ends, and b / (t D) with them, are far from the limits of float16.
_SMALLEST_CARRIER, _LARGEST_CARRIER = 2.0**-10, 2.0**4


def stock_config(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the stock form of an LN-free model with configuration `config`.

    That of a GPT-2 has n_ctx, which transformers no longer writes and HookedTransformer reads.
    """
    family = family_of(config)
    changes: dict[str, Any] = {family.epsilon: EPSILON, "tie_word_embeddings": False}
    if hasattr(config, "n_positions"):
        changes["n_ctx"] = config.n_positions
    found: PretrainedConfig = CONFIG_MAPPING[family.model_type](**without_identity(config) | changes)
    return found


def check_stock_form(config: PretrainedConfig, dtype: str = "float32") -> None:
    """Make sure that a model has a stock form, and that it computes what the model does when its weights are in `dtype`.

    Raises:
        UserError: it does not.
    """
    family = family_of(config)
    if family.kept:
        raise UserError(
            f"a {family.title} has no stock form: its configuration has one epsilon, and the norms that stay ({family.kept_as}) need "
            'the usual one; use the format normfree (in a recipe: export.formats = ["normfree"])'
        )
    if dtype == "float16" and not family.centred:
        raise UserError(
            f"a stock {family.title} without norms is not exact in float16: transformers' RMSNorm rounds what it has scaled down to "
            "float16 before it multiplies with its weight; write float32 or bfloat16, or the format normfree"
        )


@torch.no_grad()
def to_stock(model: PreTrainedModel) -> PreTrainedModel:
    """Build the stock model of the family, such as a GPT2LMHeadModel, that computes what `model` computes, in evaluation mode.

    Args:
        model: a folded model; behind LayerNorms its reader weights have mean zero over their input dimension. Not changed.

    Returns:
        A model with new weights in the model's dtype, on its device. Save it in float32: users can then load it in float32
        or bfloat16, and one whose family has LayerNorms in float16 too.

    Raises:
        UserError: what reads the residual stream does not ignore its mean, as in a model that was trained without norms, or
            trained further after its norms were folded; a linear map holds an adapter or is quantised; or see `check_stock_form`.
    """
    family = family_of(model.config)
    check_stock_form(model.config)
    check_plain(model, norms=())
    if getattr(model.config, "split_qkv", False):
        model = from_folded(model.config, model.state_dict())
    if family.centred and (share := _share_of_mean(model, family)) > LARGEST_MEAN:
        raise UserError(
            f"the model reads the mean of its residual stream (means are {share:.1%} of its weights, at most {LARGEST_MEAN:.1%} "
            f"after a fold), which a stock {family.title}'s LayerNorm subtracts: it was trained further after its norms were folded "
            "(a merged LoRA adapter is such a training too), or trained without norms; use --format normfree"
        )
    layers = model.config.num_hidden_layers
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for path in family.readers(layers):
        state[f"{path}.weight"] *= READER_SCALE
    like = state["lm_head.weight"]
    scale = torch.full((like.shape[1],), NORM_WEIGHT, dtype=like.dtype, device=like.device)
    for path in family.norms(layers).values():
        state[f"{path}.weight"] = scale.clone()
        if family.centred:
            state[f"{path}.bias"] = torch.zeros_like(scale)
    if family.centred:
        weight, bias = like.double(), state.pop("lm_head.bias").double()
        carrier = _carrier(weight, bias)
        state[f"{family.norms(layers)['ln_f']}.bias"].fill_(carrier)
        state["lm_head.weight"] = (weight + (bias / (carrier * like.shape[1])).unsqueeze(1)).to(like.dtype)
    stock = built(getattr(transformers, family.model_class), stock_config(model.config), state)
    stock.generation_config = copy.deepcopy(model.generation_config)
    return stock


def _share_of_mean(model: PreTrainedModel, family: Family) -> float:
    """Over all readers, the largest root mean square of the columns' means relative to that of the weights."""

    def input_first(path: str) -> Tensor:
        weight = model.get_submodule(path).get_parameter("weight").float()
        return weight if family.input_first and path != "lm_head" else weight.T

    weights = map(input_first, family.readers(model.config.num_hidden_layers))  # one at a time
    return max(float(weight.mean(dim=0).norm() * weight.shape[0] ** 0.5 / weight.norm()) for weight in weights)


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
