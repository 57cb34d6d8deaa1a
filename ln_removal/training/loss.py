"""The loss of a training step: next-token cross-entropy, and the terms that a recipe adds to it.

    loss = (1 - s) CE + s KL(teacher || model) + w_a auxiliary          (removal)
    loss = CE + w_e entropy penalty                                     (pretraining)

The teacher is the model before the removal. Which terms there are is decided once, so a compiled step has no branches.

Shape legend: B batch, T positions, D model width, V vocabulary, N = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.attention import EntropyRegulariser, document_inputs
from ln_removal.models.families import attentions_of, family_of, final_norm_of
from ln_removal.models.precision import DTYPES, Precision
from ln_removal.norms.freezable import ORDINARY, FreezableNorm, NormedProjection, std_of
from ln_removal.training.cross_entropy import Head, linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ln_removal.config.recipe import TrainingSpec


@dataclass(frozen=True)
class Auxiliary:
    """The residual-std loss, which makes the stds that the norms see at different positions more alike.

    Attributes:
        weight: w_a.
        target: "batch" is the published loss (`residual_std_loss`). With "constants" (`constant_std_loss`) the target is what
            each norm divides by once it is frozen; that target does not drift with the scale of the logits.
        sites: the norm in front of the unembedding alone, or every norm.
        outlier_weight: of `outlier_loss`, which is added with the target "constants".
        outlier_ratio: of a std to the constant, or of the constant to a std, beyond which a position is outlying.
        early: factor on both pulls towards the constants, in front of the first fifth of the norms.
    """

    weight: float
    target: Literal["batch", "constants"] = "batch"
    sites: Literal["ln_f", "all"] = "ln_f"
    outlier_weight: float = 0.0
    outlier_ratio: float = 1.5
    early: float = 1.0

    @classmethod
    def of(cls, spec: TrainingSpec) -> Auxiliary:
        """The terms that a recipe's [training] asks for."""
        return cls(
            spec.auxiliary_weight,
            spec.auxiliary_target,
            spec.auxiliary_sites,
            spec.outlier_weight,
            spec.outlier_ratio,
            spec.auxiliary_early,
        )


@dataclass(frozen=True)
class Distillation:
    """A teacher and the weight of its loss.

    Attributes:
        teacher: a model of the same layout and vocabulary; see `as_teacher`.
        share: s, the share of the token loss that is the divergence from the teacher's next-token distribution.
        whole_lag: nats per token; how far the model has to be behind the teacher in a sequence for the whole share.
    """

    teacher: PreTrainedModel
    share: float
    whole_lag: float


def as_teacher(model: PreTrainedModel, precision: Precision) -> PreTrainedModel:
    """Turn `model` into a teacher in place: without gradients and dropout, with weights in `precision`."""
    _switch_dropout_off(model)
    teacher: PreTrainedModel = model.requires_grad_(False).eval()
    return teacher.to(DTYPES[precision])


def residual_std_loss(
    residual: Tensor, special: Tensor, observed: Tensor | None = None, *, centred: bool = True
) -> Tensor:
    """Mean over all positions of (std - target)^2, which brings the std of special positions to that of ordinary ones.

    The target is the mean std over positions that are neither position 0 nor end-of-text, without a gradient
    (Baroni et al. 2025, arXiv 2507.02559, the auxiliary loss at ln_f).

    Args:
        residual: the residual stream in front of a norm, (B, T, D).
        special: true at position 0 and at end-of-text tokens, (B, T).
        observed: (B, T), the positions that count; None counts all.
        centred: the norm is a LayerNorm. In front of an RMSNorm the std is the root mean square.

    Returns:
        Scalar in float32, in squared units of the residual stream.
    """
    std = std_of(residual.float(), centred=centred)
    ordinary = (~special if observed is None else observed & ~special).to(std.dtype)
    target = (std.detach() * ordinary).sum() / ordinary.sum().clamp(min=1.0)
    return _mean((std - target).square(), observed)


def constant_std_loss(
    residual: Tensor, constant: Tensor, observed: Tensor | None = None, *, centred: bool = True
) -> Tensor:
    """Mean over all positions of log(std / constant)^2, which brings every std to the constant of the frozen norm.

    The loss is of the logarithm because otherwise a position with 30 times the usual std would weigh about a thousand times
    as much as any other.

    Args:
        residual: the residual stream in front of a norm, (B, T, D).
        constant: scalar, without a gradient, in units of the residual stream.
        observed: (B, T), the positions that count; None counts all.
        centred: as for `residual_std_loss`.

    Returns:
        Scalar in float32, without a unit.
    """
    return _mean(_log_ratio(residual, constant, centred=centred).square(), observed)


def outlier_loss(
    residual: Tensor,
    constant: Tensor,
    observed: Tensor | None = None,
    *,
    centred: bool = True,
    ratio: float = 1.5,
) -> Tensor:
    """Mean of max(0, |log(std / constant)| - log(ratio))^2 over the positions where it is not 0.

    Unlike in `constant_std_loss`, a single position with a massive activation weighs as much as if all positions had one. While
    the norms are still real they hardly mind what they divide by, so this takes massive activations away before anything freezes.

    Args:
        residual, constant, observed, centred: as for `constant_std_loss`.
        ratio: a position is outlying where its std is more than `ratio` times the constant, or less than the constant over `ratio`.

    Returns:
        Scalar in float32, without a unit; 0 where no position is outlying.
    """
    beyond = (_log_ratio(residual, constant, centred=centred).abs() - math.log(ratio)).clamp(min=0)
    if observed is not None:
        beyond = torch.where(observed, beyond, 0.0)
    return beyond.square().sum() / (beyond > 0).sum().clamp(min=1)


def _variance(residual: Tensor, *, centred: bool) -> Tensor:
    """What the norm behind `residual` (B, T, D) takes the root of at each position, (B, T): variance or mean square."""
    wide = residual.float()
    return wide.var(dim=-1, correction=0) if centred else wide.square().mean(dim=-1)


def _log_ratio(residual: Tensor, constant: Tensor, *, centred: bool) -> Tensor:
    """log(std / constant) of each position, (B, T)."""
    return 0.5 * torch.log(_variance(residual, centred=centred) + 1e-5) - constant.log()


def _mean(values: Tensor, observed: Tensor | None) -> Tensor:
    """Mean of `values` (B, T) over the positions that are observed, or over all."""
    if observed is None:
        return values.mean()
    return torch.where(observed, values, 0.0).sum() / observed.sum().clamp(min=1)


@dataclass(frozen=True)
class EntropyPenalty:
    """The penalty on attention entropy.

    Attributes:
        weight: w_e.
        regulariser: holds the thresholds, which are trained with the model.
    """

    weight: float
    regulariser: EntropyRegulariser


class StepLoss(NamedTuple):
    """The loss of one forward pass, as float32 scalars: `total` for the backward pass, `cross_entropy` for the log."""

    total: Tensor
    cross_entropy: Tensor


class Objective(nn.Module):
    """A causal language model of a known family together with its loss.

    It switches the model's dropout off. A step then depends on weights and batch alone, so a resumed run continues as if it had
    never stopped, and removal and control differ only in their norms.

    Args:
        model: a model of transformers with `base_model` (token ids to final hidden states) and `lm_head`.
        eot_token_id: the end-of-text token, whose positions are special for the residual-std loss; None if there is none.
        auxiliary: the residual-std loss; None leaves it out.
        distillation: the teacher; None learns from the text alone.
        entropy: the penalty on attention entropy; the model then needs `attention.explicit_attention` while it trains.

    Raises:
        UserError: the auxiliary loss needs freezable norms and the model has none, or the teacher has another vocabulary.
    """

    share: Tensor

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eot_token_id: int | None,
        auxiliary: Auxiliary | None = None,
        distillation: Distillation | None = None,
        entropy: EntropyPenalty | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.entropy_weight = 0.0 if entropy is None else entropy.weight
        self.entropy = None if entropy is None else entropy.regulariser.to(model.device)
        self.eot_token_id = eot_token_id
        self.auxiliary = (
            auxiliary if auxiliary is not None and auxiliary.weight + auxiliary.outlier_weight > 0 else None
        )
        self.teacher: PreTrainedModel | None = None
        self.whole_lag = 0.0
        # A buffer: it changes from step to step, and a compiled graph should not.
        self.register_buffer("share", torch.zeros((), device=model.device), persistent=False)
        if distillation is not None and distillation.share > 0:
            self.teacher = distillation.teacher
            self.whole_lag = distillation.whole_lag
            self.set_share(distillation.share)
            _check_same_layout(model, self.teacher)
        _switch_dropout_off(model)
        self._centred = family_of(model.config).centred
        # Hooks fill these lists during a forward pass of this module, which empties them at its end: the inputs of the norms,
        # and the attention probabilities. They stay empty when the model is evaluated by itself.
        self._listening = False
        self._read: list[tuple[nn.Module, Tensor]] = []
        self._attended: list[Tensor] = []
        if self.entropy is not None:
            for attention in attentions_of(model):
                attention.register_forward_hook(self._keep_attended)
        if self.auxiliary is not None:
            for norm in _norms_to_watch(model, self.auxiliary):
                norm.register_forward_pre_hook(self._keep_read)

    @property
    def trained(self) -> nn.Module:
        """What checkpoints save: the model, and the thresholds of the entropy penalty if there is one."""
        return self.model if self.entropy is None else nn.ModuleDict({"model": self.model, "entropy": self.entropy})

    def set_share(self, share: float) -> None:
        """Change s, the share of the token loss that comes from the teacher, from the next forward pass on."""
        assert 0 <= share <= 1, share
        self.share.fill_(share)

    def _keep_read(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._listening:
            self._read.append((module, args[0]))

    def _keep_attended(self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        if self._listening:
            assert output[1] is not None, "the entropy penalty needs explicit attention"
            # The entropy is computed later: what a recomputed block saves may not depend on hooks.
            self._attended.append(output[1])

    def train(self, mode: bool = True) -> Objective:
        """As nn.Module.train, but the teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(self, tokens: Tensor, document_starts: Tensor | None = None) -> StepLoss:
        """Mean loss of predicting tokens[:, 1:] from tokens[:, :-1].

        Args:
            tokens: (B, T + 1).
            document_starts: (B, T + 1), where rows hold several documents (`sampler.Batch`). No document then sees another, and
                the means are over the targets that lie in the same document as their input. The model needs the attention of
                `setup.training_attention` with documents.
        """
        self.forget()  # of a pass that ran out of memory
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        documents = {} if document_starts is None else document_inputs(self.model, document_starts)
        observed = documents.get("observed")
        self._listening = True
        taught = self._teach(inputs, documents)
        hidden = self.model.base_model(input_ids=inputs, use_cache=False, **documents).last_hidden_state
        loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            _head(self.model),
            targets.reshape(-1),
            teacher_hidden=taught.reshape(-1, taught.shape[-1]) if taught is not None else None,
            teacher_head=_head(self.teacher) if self.teacher is not None else None,
            share=self.share,
            trained=None if observed is None else observed.reshape(-1),
            length=inputs.shape[1],
            whole_lag=self.whole_lag,
        )
        total = loss.total
        if self.auxiliary is not None:
            total = total + self._auxiliary_loss(inputs, documents)
        if self.entropy is not None:
            total = total + self.entropy_weight * self.entropy(self._attended, observed)
        self.forget()
        return StepLoss(total, loss.cross_entropy)

    def forget(self) -> None:
        """Empty what the hooks have gathered, after a forward pass or after one that failed."""
        self._listening = False
        self._read, self._attended = [], []

    def _teach(self, inputs: Tensor, documents: dict[str, Any]) -> Tensor | None:
        """The teacher's final hidden states (B, T, D'), in its own precision; None without a teacher."""
        if self.teacher is None:
            return None
        # Not inference mode, whose tensors cannot be saved for the backward pass.
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            taught: Tensor = self.teacher.base_model(input_ids=inputs, use_cache=False, **documents).last_hidden_state
        return taught

    def _auxiliary_loss(self, inputs: Tensor, documents: dict[str, Any]) -> Tensor:
        """The weighted residual-std loss, as the mean over the norms chosen by `auxiliary.sites`."""
        assert self.auxiliary is not None
        observed = documents.get("observed")
        if self.auxiliary.target == "constants":
            losses = []
            for number, (norm, residual) in enumerate(self._read):
                constant, known = _constant_of(norm)
                early = self.auxiliary.early if number < len(self._read) // 5 else 1.0
                losses.append(early * known * self._towards(residual, constant, observed))
        else:
            special = torch.zeros_like(inputs, dtype=torch.bool)
            special[:, 0] = True
            if documents:
                special = documents["position_ids"] == 0
            if self.eot_token_id is not None:
                special |= inputs == self.eot_token_id
            losses = [
                self.auxiliary.weight * residual_std_loss(residual, special, observed, centred=self._centred)
                for _, residual in self._read
            ]
        return torch.stack(losses).mean()

    def _towards(self, residual: Tensor, constant: Tensor, observed: Tensor | None) -> Tensor:
        """The pull of the stream in front of one norm towards its constant."""
        assert self.auxiliary is not None
        pull = self.auxiliary.weight * constant_std_loss(residual, constant, observed, centred=self._centred)
        if self.auxiliary.outlier_weight == 0:
            return pull
        ratio = self.auxiliary.outlier_ratio
        outlying = outlier_loss(residual, constant, observed, centred=self._centred, ratio=ratio)
        return pull + self.auxiliary.outlier_weight * outlying


def _head(model: PreTrainedModel) -> Head:
    return Head(model.lm_head.weight, getattr(model.lm_head, "bias", None))


def _constant_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The constant that a frozen norm divides ordinary positions by, or the running std of a norm that is not frozen.

    Both elements are scalars; the second says whether the first is known: in the first step there are no statistics yet.
    """
    norm = norm.norm if isinstance(norm, NormedProjection) else norm
    assert isinstance(norm, FreezableNorm)
    frozen = torch.where(norm.mix > 0, norm.frozen_std[:, ORDINARY], norm.running_std[ORDINARY])
    return frozen.mean().detach(), norm.running_initialized[ORDINARY]


def _norms_to_watch(model: PreTrainedModel, auxiliary: Auxiliary) -> Sequence[nn.Module]:
    """The modules whose input is the residual stream in front of a norm. For ln_1 that is the projection, which calls the norm."""
    inside = {id(module.norm) for module in model.modules() if isinstance(module, NormedProjection)}
    freezable = [
        module
        for module in model.modules()
        if isinstance(module, NormedProjection) or (isinstance(module, FreezableNorm) and id(module) not in inside)
    ]
    if auxiliary.sites == "all" or auxiliary.target == "constants":
        if not freezable:
            raise UserError(
                "an auxiliary loss at every norm, or towards their constants, needs freezable norms: install them first"
            )
        return freezable if auxiliary.sites == "all" else freezable[-1:]
    return [final_norm_of(model)]


def _check_same_layout(model: PreTrainedModel, teacher: PreTrainedModel) -> None:
    for name in ("vocab_size", "num_hidden_layers"):
        ours, theirs = getattr(model.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise UserError(
                f"the teacher has {name} {theirs}, the model {ours}; distil from the model that is being changed"
            )


def _switch_dropout_off(model: nn.Module) -> None:
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Outside of GPT-2 a number, of which the attention makes dropout itself.
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
