"""A plain GPT-2 in NumPy float64, against which the tests compare. Shares no code with ln_removal.

Its norms are LayerNorm, frozen, or a mixture, given for each site and each position class. Shapes: B batch,
T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class SiteSetting:
    """mix 0 is LayerNorm, 1 frozen; constants are for ordinary positions, end-of-text tokens, position 0."""

    mix: float = 0.0
    constants: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass
class Reference:
    """GPT-2 from the state dict of an untouched transformers GPT2LMHeadModel.

    Attributes:
        stds: filled by a forward pass: sqrt(var + eps) (B, T) of what enters each norm ("ln_1.0", ..., "ln_f").
    """

    weights: Mapping[str, Array]
    n_layer: int
    n_head: int
    eot: int | None
    eps: float = 1e-5
    stds: dict[str, Array] = field(default_factory=dict)

    def logits(
        self,
        ids: NDArray[np.int64],
        sites: Mapping[str, SiteSetting] | None = None,
        positions: NDArray[np.int64] | None = None,
    ) -> Array:
        """(B, T, V) logits for tokens (B, T); sites without a setting are LayerNorms.

        Positions that restart at 0 begin another packed sequence, which does not see the ones before it (transformers
        reads explicit position_ids so).
        """
        sites = sites or {}
        if positions is None:
            positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        self.classes = np.zeros(ids.shape, dtype=np.int64)
        for b in range(ids.shape[0]):
            for t in range(ids.shape[1]):
                if positions[b, t] == 0:
                    self.classes[b, t] = 2
                elif self.eot is not None and ids[b, t] == self.eot:
                    self.classes[b, t] = 1
        sequence = np.cumsum(positions == 0, axis=1)
        self.visible = np.tril(sequence[:, :, None] == sequence[:, None, :])
        x = self.weights["transformer.wte.weight"][ids] + self.weights["transformer.wpe.weight"][positions]
        for i in range(self.n_layer):
            x = x + self._attention(x, i, sites)
            x = x + self._mlp(x, i, sites)
        out = self._norm(x, "transformer.ln_f", "ln_f", sites.get("ln_f", SiteSetting()))
        logits: Array = out @ self.weights["lm_head.weight"].T
        return logits

    def _norm(self, x: Array, path: str, name: str, setting: SiteSetting) -> Array:
        mean = x.mean(-1, keepdims=True)
        std = np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + self.eps)
        self.stds[name] = std[..., 0]
        constant = np.array(setting.constants)[self.classes][..., None]
        scale = std ** (setting.mix - 1) * constant**-setting.mix
        return (x - mean) * scale * self.weights[f"{path}.weight"] + self.weights[f"{path}.bias"]

    def _attention(self, x: Array, i: int, sites: Mapping[str, SiteSetting]) -> Array:
        path = f"transformer.h.{i}"
        weight, bias = self.weights[f"{path}.attn.c_attn.weight"], self.weights[f"{path}.attn.c_attn.bias"]
        width = x.shape[-1]
        for_qk = self._norm(x, f"{path}.ln_1", f"ln_1.{i}", sites.get(f"ln_1_qk.{i}", SiteSetting()))
        for_v = self._norm(x, f"{path}.ln_1", f"ln_1.{i}", sites.get(f"ln_1_v.{i}", SiteSetting()))
        query = for_qk @ weight[:, :width] + bias[:width]
        key = for_qk @ weight[:, width : 2 * width] + bias[width : 2 * width]
        value = for_v @ weight[:, 2 * width :] + bias[2 * width :]
        size = width // self.n_head
        mixed = np.empty_like(x)
        for head in range(self.n_head):
            part = slice(head * size, (head + 1) * size)
            scores = query[..., part] @ key[..., part].swapaxes(-1, -2) / np.sqrt(size)
            scores = np.where(self.visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed[..., part] = (weights / weights.sum(-1, keepdims=True)) @ value[..., part]
        out: Array = mixed @ self.weights[f"{path}.attn.c_proj.weight"] + self.weights[f"{path}.attn.c_proj.bias"]
        return out

    def _mlp(self, x: Array, i: int, sites: Mapping[str, SiteSetting]) -> Array:
        path = f"transformer.h.{i}"
        normed = self._norm(x, f"{path}.ln_2", f"ln_2.{i}", sites.get(f"ln_2.{i}", SiteSetting()))
        hidden = normed @ self.weights[f"{path}.mlp.c_fc.weight"] + self.weights[f"{path}.mlp.c_fc.bias"]
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        out: Array = hidden @ self.weights[f"{path}.mlp.c_proj.weight"] + self.weights[f"{path}.mlp.c_proj.bias"]
        return out
