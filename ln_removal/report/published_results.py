"""What the two published removals of LayerNorm from GPT-2 measured, to set a run beside.

Losses are in nats per token. The gap is the LN-free model minus a control fine-tuned on the same tokens with its
LayerNorm kept.
"""

from __future__ import annotations

from dataclasses import dataclass

HEIMERSHEIM = "Heimersheim 2024"
BARONI = "Baroni et al. 2025"

SOURCES = {
    HEIMERSHEIM: ("You can remove GPT2's LayerNorm by fine-tuning", "https://arxiv.org/abs/2409.13710"),
    BARONI: (
        "Transformers Don't Need LayerNorm at Inference Time: Scaling LayerNorm Removal to GPT-2 XL and the "
        "Implications for Mechanistic Interpretability",
        "https://arxiv.org/abs/2507.02559",
    ),
}
"""Title and address of each paper."""


@dataclass(frozen=True, slots=True)
class PublishedLoss:
    """Cross-entropy of one model on one data set, mean over its samples."""

    model: str
    tokens: str
    data: str
    original: float
    control: float
    ln_free: float
    source: str

    @property
    def gap(self) -> float:
        """LN-free minus control."""
        return self.ln_free - self.control


@dataclass(frozen=True, slots=True)
class PublishedAccuracy:
    """HellaSwag in per cent; None where the source gives no figure."""

    model: str
    measure: str
    original: float
    control: float | None
    ln_free: float
    source: str


LOSSES = (
    PublishedLoss("gpt2", "about 590M", "OpenWebText", 3.095, 2.989, 3.014, HEIMERSHEIM),
    PublishedLoss("gpt2", "157M", "OpenWebText", 3.1006, 3.0126, 3.0797, BARONI),
    PublishedLoss("gpt2-medium", "262M", "OpenWebText", 2.8145, 2.7390, 2.7642, BARONI),
    PublishedLoss("gpt2-large", "315M", "OpenWebText", 2.6623, 2.6240, 2.6384, BARONI),
    PublishedLoss("gpt2-xl", "413M", "OpenWebText", 2.5567, 2.4799, 2.5052, BARONI),
    PublishedLoss("gpt2", "about 590M", "The Pile", 2.856, 2.880, 2.926, HEIMERSHEIM),
    PublishedLoss("gpt2", "157M", "The Pile", 2.8450, 2.8511, 2.8852, BARONI),
    PublishedLoss("gpt2-medium", "262M", "The Pile", 2.5163, 2.5752, 2.6579, BARONI),
    PublishedLoss("gpt2-large", "315M", "The Pile", 2.5320, 2.6233, 2.7504, BARONI),
    PublishedLoss("gpt2-xl", "413M", "The Pile", 2.4436, 2.4673, 130.22, BARONI),
)

LOSS_NOTE = (
    "GPT-2 XL's 130.22 on the Pile comes from 3 of 10,000 samples, with form feeds and tabs that OpenWebText does not "
    "have; its median is unremarkable."
)

ACCURACIES = (
    PublishedAccuracy("gpt2", "nanoGPT-style protocol", 29.56, 29.82, 29.54, HEIMERSHEIM),
    PublishedAccuracy("gpt2", "lm-eval acc_norm", 31.1, None, 30.2, BARONI),
    PublishedAccuracy("gpt2-medium", "lm-eval acc_norm", 39.4, None, 37.4, BARONI),
    PublishedAccuracy("gpt2-large", "lm-eval acc_norm", 45.4, 43.4, 42.8, BARONI),
    PublishedAccuracy("gpt2-xl", "lm-eval acc_norm", 50.9, 49.8, 48.8, BARONI),
)
