"""Optimizers, a cap of the matrices' spectral norms, and the schedules of the learning rate and of the teacher's share.

Fused AdamW is used everywhere, together with Muon where a recipe for pretraining asks for it. Only matrices and embeddings have
weight decay; biases, norms, slopes and other vectors have none, as is usual for GPT-2. The learning rate depends on the step
alone, so a resumed run has the same rate in the same step.

The cap is an optimizer too, which steps after the others. So its vectors are in the checkpoints, and a resumed run goes on with
the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.families import blocks_of, family_of

if TYPE_CHECKING:
    from ln_removal.config.recipe import TrainingSpec

MUON_MOMENTUM = 0.95

ITERATIONS, FIRST_ITERATIONS = 3, 50
"""Power iterations of every step, and before the first one. A step changes a matrix little, so its vector is close already."""


def build_optimizers(
    model: nn.Module, spec: TrainingSpec, *, besides: Iterable[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold every parameter of `model`, and of `besides`, exactly once.

    `adamw` is one fused AdamW. `muon` gives the matrices inside the blocks to torch.optim.Muon (Jordan et al. 2024, with the
    update scaled to AdamW's root mean square so that both share a learning rate; Liu et al. 2025, arXiv 2502.16982) and the
    rest (embeddings, norms, biases) to AdamW. With a `spectral_cap` a `SpectralCap` of the same matrices comes last.

    Raises:
        UserError: `muon` with a PyTorch that has none (before 2.9).
    """
    caps = [] if spec.spectral_cap is None else [SpectralCap(model, spec.spectral_cap)]
    parameters = [parameter for parameter in (*model.parameters(), *besides) if parameter.requires_grad]
    if spec.optimizer == "adamw":
        return [_adamw(parameters, spec), *caps]
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"training.optimizer = 'muon' needs PyTorch 2.9 or newer, found {torch.__version__}; upgrade it or use 'adamw'"
        )
    inside = [parameter for block in blocks_of(model) for parameter in block.parameters()]
    matrices = [parameter for parameter in inside if parameter.requires_grad and parameter.dim() == 2]
    owned = set(map(id, matrices))
    rest = [parameter for parameter in parameters if id(parameter) not in owned]
    muon = torch.optim.Muon(
        matrices,
        lr=spec.learning_rate,
        weight_decay=spec.weight_decay,
        momentum=MUON_MOMENTUM,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _adamw(rest, spec), *caps]


def _adamw(parameters: list[nn.Parameter], spec: TrainingSpec) -> torch.optim.AdamW:
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=spec.learning_rate, betas=spec.betas, fused=True
    )


class SpectralCap(torch.optim.Optimizer):
    """Scales every matrix inside the blocks down, after each step, to an RMS-to-RMS norm of at most a cap.

    The RMS-to-RMS norm of a map W from n to m numbers is the largest factor by which it changes the root mean square of its input,
    sqrt(n / m) sigma(W), with sigma(W) the spectral norm (Newhouse et al. 2025, arXiv 2507.13338, "spectral normalize"). Queries, keys
    and values of a GPT-2 count as three maps. sigma is found by power iteration with a vector that is kept from step to step:

        u = W v,  v = W^T u / |W^T u|,  sigma = |W v|

    This finds sigma from below, so a norm may be above the cap by one or two per cent.

    Args:
        model: of a known family.
        cap: above 0.
    """

    def __init__(self, model: nn.Module, cap: float) -> None:
        loaded: Any = model
        family = family_of(loaded.config)
        joint = family.qkv[0] if family.joint == "columns" else ""
        split: list[nn.Parameter] = []
        whole: list[nn.Parameter] = []
        for block in blocks_of(model):
            for name, parameter in block.named_parameters():
                if parameter.requires_grad and parameter.dim() == 2:
                    (split if joint and name.startswith(f"{joint}.") else whole).append(parameter)
        groups = [{"params": split, "parts": 3}, {"params": whole, "parts": 1}]
        super().__init__([group for group in groups if group["params"]], {"lr": 0.0})
        self.cap, self.input_first = cap, family.input_first
        generator = torch.Generator().manual_seed(0)
        for group in self.param_groups:
            for parameter in group["params"]:
                maps = self._maps(parameter, group["parts"])
                drawn = torch.randn(len(maps), maps.shape[2], generator=generator).to(parameter)
                self.state[parameter]["vector"] = _largest(maps, drawn, FIRST_ITERATIONS)[0]

    def _maps(self, parameter: Tensor, parts: int) -> Tensor:
        """The matrix as (parts, inputs, outputs), a view."""
        matrix = parameter.detach() if self.input_first else parameter.detach().T
        return matrix.unflatten(1, (parts, -1)).movedim(1, 0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Apply the cap. Does not wait for the device."""
        for group in self.param_groups:
            for parameter in group["params"]:
                maps, state = self._maps(parameter, group["parts"]), self.state[parameter]
                state["vector"], sigma = _largest(maps, state["vector"], ITERATIONS)
                largest = self.cap * math.sqrt(maps.shape[2] / maps.shape[1])
                maps.mul_((largest / sigma.clamp(min=largest))[:, None, None])


@torch.no_grad()
def _largest(maps: Tensor, vector: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Of each map (parts, n, m) the right singular vector (parts, m) of its largest singular value, and this value (parts,)."""
    for _ in range(iterations):
        left = torch.einsum("pnm,pm->pn", maps, vector)
        vector = nn.functional.normalize(torch.einsum("pnm,pn->pm", maps, left), dim=-1)
    return vector, torch.einsum("pnm,pm->pn", maps, vector).norm(dim=-1)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def to_step(optimizers: list[torch.optim.Optimizer], bad: Tensor) -> list[torch.optim.Optimizer]:
    """The optimizers to call `step` of, so that nothing is updated where `bad` is 1 (a scalar tensor).

    Fused AdamW reads the flag on the device, as it does for gradient scalers, so it is always among them and needs no host
    synchronisation. A cap of weights that have not changed does not change them either. Muon has no such argument: it is left out
    after a look at the flag, which is a synchronisation.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
    always = (torch.optim.AdamW, SpectralCap)
    if all(isinstance(optimizer, always) for optimizer in optimizers) or not bad:
        return optimizers
    return [optimizer for optimizer in optimizers if isinstance(optimizer, always)]


def learning_rate_at(step: int, spec: TrainingSpec) -> float:
    """The learning rate of an optimizer step, counted from 0.

    In the w steps of the warm-up it is peak * (step + 1) / w: step 0 already learns, and step w - 1 has the peak. After that,
    with s the start of the decay, e its end (`decay_steps`, or the length of the run) and p = (step - s) / (e - s):

        cosine, linear   s = w        minimum + (peak - minimum) * (1 + cos(pi p)) / 2,  or  * (1 - p)
        trapezoid        s = e - round(decay_fraction * e)    the peak before s, then linear

    From step e on it is the minimum. Cosine: Loshchilov & Hutter 2017 (arXiv 1608.03983), one period; trapezoid: Hägele et
    al. 2024 (arXiv 2405.18392).

    Args:
        step: from 0; beyond the end of the run too.
        spec: the recipe's [training].

    Returns:
        The rate: in (0, peak] during the warm-up, in [minimum, peak] after it.
    """
    assert step >= 0, f"steps count from 0, got {step}"
    peak, minimum = spec.learning_rate, spec.minimum_learning_rate
    if step < spec.warmup_steps:
        return peak * (step + 1) / spec.warmup_steps
    end = spec.steps if spec.decay_steps is None else spec.decay_steps
    start = end - round(spec.decay_fraction * end) if spec.decay == "trapezoid" else spec.warmup_steps
    if step >= end:
        return minimum
    if step <= start:
        return peak
    progress = (step - start) / (end - start)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if spec.decay == "cosine" else 1 - progress
    return minimum + (peak - minimum) * remaining


def distillation_at(step: int, spec: TrainingSpec) -> float:
    """The share of the loss that comes from the teacher, linear from `distillation` to `distillation_end` in the last step.

    Early in a removal the teacher repairs what freezing has damaged. Later the text itself is the better target, because it
    also holds what the teacher does not know.
    """
    end = spec.distillation if spec.distillation_end is None else spec.distillation_end
    progress = min(1.0, step / max(1, spec.steps - 1))
    return spec.distillation + (end - spec.distillation) * progress
