"""Optimizers: AdamW (fused), and Muon for pretraining from scratch.

Weight decay goes to matrices and embeddings only; biases, norms, slopes and other vectors have none, as is usual for GPT-2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ln_removal.architectures import blocks_of
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.recipe import TrainingSpec

MUON_MOMENTUM = 0.95


def build_optimizers(
    model: nn.Module, spec: TrainingSpec, *, besides: Iterable[nn.Parameter] = ()
) -> list[torch.optim.Optimizer]:
    """The optimizers that together own every parameter of `model`, and those `besides` it, once.

    `adamw` is one fused AdamW. `muon` gives the matrices inside the blocks to torch.optim.Muon (Jordan et al. 2024, with the
    update scaled to AdamW's root mean square so that both share a learning rate; Liu et al. 2025, arXiv 2502.16982) and the
    rest (embeddings, norms, biases) to AdamW.

    Raises:
        UserError: `muon` with a PyTorch that has none (before 2.9).
    """
    parameters = [parameter for parameter in (*model.parameters(), *besides) if parameter.requires_grad]
    if spec.optimizer == "adamw":
        return [_adamw(parameters, spec)]
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
    return [muon, _adamw(rest, spec)]


def _adamw(parameters: list[nn.Parameter], spec: TrainingSpec) -> torch.optim.AdamW:
    groups = [
        {"params": [parameter for parameter in parameters if parameter.dim() >= 2], "weight_decay": spec.weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=spec.learning_rate, betas=spec.betas, fused=True
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    """Set the learning rate of every parameter group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def step_unless_bad(optimizers: list[torch.optim.Optimizer], bad: Tensor) -> None:
    """Step every optimizer, or none of them where `bad` is 1 (a scalar tensor).

    Fused AdamW reads the flag on the device, as it does for gradient scalers, so a step needs no host synchronisation; Muon
    has no such argument and costs one.
    """
    skip_on_host: bool | None = None
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = bad  # type: ignore[attr-defined]
            optimizer.step()
        else:
            skip_on_host = bool(bad) if skip_on_host is None else skip_on_host
            if not skip_on_host:
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
