"""What each step measured, kept on the device until the next log step reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepFigures:
    """Losses and gradient norms of the steps since the last log, on the device, and their learning rates."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: list[Tensor] = []
        self._rates: list[float] = []

    def add(self, loss: Tensor, norm: Tensor, rate: float) -> Tensor:
        """Keep a step's figures, averaged over ranks; returns 1.0 where either is not finite, else 0.0 (a scalar tensor).

        A loss can be infinite on one rank and all gradients finite, so the ranks have to agree before they step.
        """
        row: Tensor = self._accelerator.reduce(torch.stack([loss.float(), norm.float()]), reduction="mean")
        bad = (~torch.isfinite(row).all()).float()
        self._rows.append(row)
        self._rates.append(rate)
        return bad

    def read(self) -> list[tuple[float, float, float]]:
        """(loss, gradient norm, learning rate) of every step since the last call. Waits for the device."""
        figures = zip(torch.stack(self._rows).tolist(), self._rates, strict=True)
        rows = [(float(loss), float(norm), rate) for (loss, norm), rate in figures]
        self._rows, self._rates = [], []
        return rows
