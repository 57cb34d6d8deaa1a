"""Convert LN-free models: a published one, with disarmed norms, to one without norms, and an LN-free one to TransformerLens.

Both earlier projects (apollo-research/gpt2_noLN, schaeff/gpt2-*_LNFree*) give LayerNorm an epsilon of 10^12 and weights
of 10^6 gamma / sigma. For any residual stream whose variance is small against 10^12 such a norm computes

    (x - mean(x)) / sqrt(var(x) + eps) * weight + bias  =  (x - mean(x)) * weight / sqrt(eps) + bias,

a frozen norm with the constant sqrt(eps), so it folds like ours. Our own stock form is one more of this kind, of any family; an
RMSNorm does the same without mean and bias.

The epsilon lives in config.json and the weights in another file, so the two can disagree: a model whose weights are
disarmed still is when its config has the norm's usual epsilon, but then the epsilon has to be guessed.

Shapes: D model width, V vocabulary, L layers.

A bridge of TransformerLens 4 is made from a model in memory, or by TransformerLens from its directory:

    bridge = ln_removal.to_bridge(model, tokenizer)
    bridge = TransformerBridge.boot_transformers("path/to/an/ln-free/model")      # after `import ln_removal`

Nothing normalises, so the residual stream's components add up to the logits: with `logits, cache =
bridge.run_with_cache(tokens)`,

    cache.get_full_resid_decomposition(expand_neurons=False) @ bridge.W_U, summed, + bridge.b_U  ==  logits
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ln_removal.errors import UserError
from ln_removal.export.stock import EPSILON, NORM_WEIGHT
from ln_removal.export.verify import TOLERANCE, ExportError, position_errors, readers
from ln_removal.models.bridge import as_bridge, is_bridged
from ln_removal.models.families import family_of, is_norm_choice, is_norm_free
from ln_removal.models.layout import DISARMING_EPSILON, check_supported
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import fold_into

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PUBLISHED_EPSILON = 1e12
"""layer_norm_epsilon of the published models."""

DISARMED_WEIGHT = 1e3
"""Root mean square that tells a disarmed norm's weight from LayerNorm's own: published ones lie between 10^4 and 10^7
(10^6 gamma / sigma), ours are 2^14, those of a LayerNorm lie below 10^2."""


def has_disarmed_norms(model: PreTrainedModel) -> bool:
    """Whether any norm of a stock model is disarmed, by the epsilon of its configuration or norms, or by its weights."""
    norms = _norms(model).values()
    return max(_written_epsilons(model)) >= DISARMING_EPSILON or any(map(_has_disarmed_weight, norms))


@torch.no_grad()
def from_disarmed(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a model with disarmed norms to one without norms, in evaluation mode.

    A norm's own epsilon counts if it disarms; else that of the configuration; else, where the weights are those of a
    disarmed norm, the epsilon that goes with them, with a warning.

    Args:
        model: of a known family, every norm disarmed; the unembedding tied or not. Not changed.

    Returns:
        The LN-free model, with new weights in the model's dtype and on its device.

    Raises:
        UserError: another architecture, some of its norms still normalise, or weights are not finite.
    """
    family = check_supported(model)
    _check_finite(model)
    norms, epsilons = _norms(model), _epsilons(model)
    if max(_written_epsilons(model)) < DISARMING_EPSILON:
        logger.warning(
            "the configuration has %s %g, but the %s weights are those of disarmed norms; took epsilon %.6g, with which such "
            "models are made",
            family.epsilon,
            getattr(model.config, family.epsilon),
            family.norm_name,
            max(epsilons.values()),
        )
    slots = tuple(f"{path}." for path in family.norms(model.config.num_hidden_layers).values())
    state = {name: value.detach().clone() for name, value in model.state_dict().items() if not name.startswith(slots)}
    for name, (_, reader) in readers(model).items():
        gamma, beta = norms[name].get_parameter("weight"), norms[name].get_parameter("bias") if family.centred else None
        sigma = torch.tensor(math.sqrt(epsilons[name]), dtype=torch.float64, device=gamma.device)
        folded = fold_into(reader, gamma, beta, sigma, input_first=family.is_input_first(name))
        state |= {f"{name}.{part}": value for part, value in folded.items()}
    return from_folded(model.config, state, model.generation_config)


def check_conversion(source: PreTrainedModel, converted: PreTrainedModel, input_ids: Tensor) -> float:
    """Compare a converted model with its source in float32, and again in float64 where float32 rounding may be the difference.

    The source is run with the epsilons that the conversion took, whatever its configuration says. Some LN-free models'
    activations explode on tokens that their training text lacked, and there even a disarmed norm still normalises. Such
    positions are passed over with a warning as long as they are fewer than half.

    Args:
        source: as given to `from_disarmed`.
        converted: what it returned.
        input_ids: (B, T) tokens; many short rows, since an explosion reaches all later positions of its row.

    Returns:
        The largest difference of a position's logits relative to its largest logit.

    Raises:
        ExportError: most positions differ by more than TOLERANCE: at the size of its activations the source still
            normalises.
    """
    epsilons = _epsilons(source)
    for dtype in (torch.float32, torch.float64):
        reference, candidate = (
            model if model.dtype == dtype else copy.deepcopy(model).to(dtype) for model in (source, converted)
        )
        with _run_with(reference, epsilons):
            errors = position_errors(reference, candidate, input_ids)
        equal = errors <= TOLERANCE  # a NaN is not
        if equal.all():
            return float(errors.max())
    if equal.double().mean() <= 0.5:
        raise ExportError(
            f"the model without norms differs from the disarmed one by {float(errors.median()):.2e} relative, more than "
            f"{TOLERANCE:.0e}: the activations are too large for epsilon {min(epsilons.values()):g}, so it still normalises and "
            "is not LN-free; do not use it as such, or get the checkpoint again from where it was published"
        )
    logger.warning(
        "at %d of %d positions of random tokens the activations are so large that the disarmed norms still act, and the "
        "model without norms differs there by up to %.1e relative",
        int((~equal).sum()),
        equal.numel(),
        float(errors.max()),
    )
    return float(errors[equal].max())


def _epsilons(model: PreTrainedModel) -> dict[str, float]:
    """The epsilon of each norm, by the name of the linear map that reads it.

    Raises:
        UserError: some norms still normalise.
    """
    family, norms = family_of(model.config), _norms(model)
    kind, configured = family.norm_name, float(getattr(model.config, family.epsilon))
    armed = [name for name, norm in norms.items() if not _has_disarmed_weight(norm)]
    if len(armed) == len(norms):
        raise UserError(
            f"{family.epsilon} {max(_written_epsilons(model)):g} disarms the {kind}s, but their weights are ordinary ones, "
            f"so next to nothing is left of what they read; if the model has its {kind}s, set it back to "
            f"{'1e-5' if family.centred else '1e-6 (or 1e-5)'} in config.json"
        )
    if armed:
        raise UserError(
            f"the model is only partly disarmed: {len({norms[name] for name in armed})} of its {len(set(norms.values()))} {kind}s, "
            f"the first the one that {armed[0]} reads, have ordinary weights; get the checkpoint again from where it was published"
        )
    ours = all(bool((norm.get_parameter("weight") == NORM_WEIGHT).all()) for norm in norms.values())
    default = configured if configured >= DISARMING_EPSILON else EPSILON if ours else PUBLISHED_EPSILON
    return {name: own if (own := _epsilon_of(norm)) >= DISARMING_EPSILON else default for name, norm in norms.items()}


def _written_epsilons(model: PreTrainedModel) -> list[float]:
    """That of the configuration, then those of the norms."""
    own = getattr(model.config, family_of(model.config).epsilon)
    return [float(own), *(_epsilon_of(norm) for norm in _norms(model).values())]


def _norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {name: norm for name, (norm, _) in readers(model).items()}


def _check_finite(model: nn.Module) -> None:
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{name} holds values that are not finite: a disarmed norm's weights do not fit float16; take the "
                "float32 or bfloat16 weights"
            )


@contextmanager
def _run_with(model: PreTrainedModel, epsilons: dict[str, float]) -> Iterator[None]:
    """Give the norms these epsilons for a while."""
    norms = _norms(model)
    before = {name: _epsilon_of(norm) for name, norm in norms.items()}
    try:
        for name, norm in norms.items():
            setattr(norm, _epsilon_name(norm), epsilons[name])
        yield
    finally:
        for name, norm in norms.items():
            setattr(norm, _epsilon_name(norm), before[name])


def _epsilon_of(norm: nn.Module) -> float:
    """The epsilon that a LayerNorm or an RMSNorm of transformers computes with."""
    return float(getattr(norm, _epsilon_name(norm)))


def _epsilon_name(norm: nn.Module) -> str:
    return "eps" if isinstance(norm, nn.LayerNorm) else "variance_epsilon"


def _has_disarmed_weight(norm: nn.Module) -> bool:
    return bool(norm.get_parameter("weight").double().square().mean().sqrt() >= DISARMED_WEIGHT)


def to_bridge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> TransformerBridge:
    """Put a TransformerBridge around a model, LN-free or with its norms, without processing its weights.

    Args:
        model: an LN-free model of this project; a published one, or our stock form, with disarmed norms, which is
            converted first; a model of a known family that still has its norms; or one that was trained without any norm. It is
            left as it is: the bridge gets modules of its own that share the weights (a conversion makes new ones).
        tokenizer: for `to_tokens`, `generate` from text and the like; none is looked for if it is left out.

    Returns:
        As `models.bridge.as_bridge`.

    Raises:
        UserError: the model is of no known family, has freezable norms, holds an adapter, or is in a bridge already; or
            TransformerLens would not compute what it computes.
    """
    as_it_is = isinstance(model, PreTrainedModel) and (is_norm_free(model.config) or is_norm_choice(model.config))
    if isinstance(model, PreTrainedModel) and not is_bridged(model) and not as_it_is:
        check_supported(model)
        model = from_disarmed(model) if has_disarmed_norms(model) else model
    return as_bridge(model, tokenizer)
