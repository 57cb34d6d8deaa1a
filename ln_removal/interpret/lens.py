"""The logit lens: what the unembedding reads in the residual stream before each block and behind the last.

(nostalgebraist 2020, "interpreting GPT: the logit lens".) TransformerLens reads the stream through the model's own final norm
and unembedding. Without norms this is a sum: the logits of a layer are those of the layer before plus the direct effects of one
block. With a final LayerNorm, each layer is divided by its own scale.

    KL     KL(output || layer), nats: 0 behind the last block
    rank   number of tokens with a higher logit than the right next token: 0 if it is the likeliest

Shape legend: L layers, N documents, T predicted positions, V vocabulary, k tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.passes import VALUES_IN_A_PASS, Array, ByModel, each_model, mean_interval

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

TOP = 5
"""Tokens with the highest logits that are kept."""


@dataclass(frozen=True)
class LayerPredictions:
    """What a model would predict if it stopped at a layer.

    Attributes:
        layers: L + 1 names as TransformerLens gives them: "0_pre", "1_pre", ..., "final_post".
        top_tokens: (L + 1, N, T, k) ids of the tokens with the highest logits, the highest first.
        top_logits: (L + 1, N, T, k).
        top_probability: (L + 1, N, T) of the likeliest token.
        divergence: (L + 1, N, T) KL(output || layer), nats.
        rank: (L + 1, N, T) of the right next token, 0 for the highest logit.
        loss: (L + 1, N, T) of the right next token, nats.
    """

    layers: list[str]
    top_tokens: npt.NDArray[np.int64]
    top_logits: Array
    top_probability: Array
    divergence: Array
    rank: npt.NDArray[np.int64]
    loss: Array

    def mean_divergence(self, *, seed: int = 0) -> list[Interval]:
        """[L + 1] mean KL, nats, with 95 % intervals over documents."""
        return [mean_interval(one.mean(axis=1), seed=seed) for one in self.divergence]

    def mean_loss(self, *, seed: int = 0) -> list[Interval]:
        """[L + 1] mean loss, nats, with 95 % intervals over documents."""
        return [mean_interval(one.mean(axis=1), seed=seed) for one in self.loss]

    def right_first(self, *, seed: int = 0) -> list[Interval]:
        """[L + 1] share of positions at which the right token has rank 0, with 95 % intervals over documents."""
        return [mean_interval((one == 0).mean(axis=1), seed=seed) for one in self.rank]

    @property
    def median_rank(self) -> Array:
        """(L + 1,) of the right token."""
        return np.asarray(np.median(self.rank, axis=(1, 2)))

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Figures by layer, and the tokens with the highest logits of the first document."""
        return {
            "layers": self.layers,
            "kl_to_output_nats": [interval_json(one) for one in self.mean_divergence(seed=seed)],
            "loss_nats": [interval_json(one) for one in self.mean_loss(seed=seed)],
            "right_token_first": [interval_json(one) for one in self.right_first(seed=seed)],
            "median_rank_of_right_token": self.median_rank.tolist(),
            "first_document": {
                "top_tokens": self.top_tokens[:, 0].tolist(),
                "top_logits": self.top_logits[:, 0].tolist(),
            },
        }


def layer_predictions(bridge: TransformerBridge, tokens: Tensor, *, top: int = TOP) -> LayerPredictions:
    """The logit lens at every position that has a next token.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`; its logits must be its final norm and unembedding of the residual stream.
        tokens: (N, T + 1) on the bridge's device; the last ones are only predicted.
        top: k.
    """
    import torch
    from transformer_lens.tools.analysis import logit_lens

    layers, vocabulary = int(bridge.cfg.n_layers), int(bridge.cfg.d_vocab)
    places = max(1, VALUES_IN_A_PASS // ((layers + 1) * vocabulary))  # of one document at once
    parts: list[list[dict[str, Any]]] = []
    labels: list[str] = []
    for document in tokens:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(
                document[None],
                names_filter=lambda name: name.endswith(("hook_in", "hook_resid_pre", "hook_resid_post")),
            )
        row = []
        for start in range(0, len(document) - 1, places):
            stop = min(start + places, len(document) - 1)
            found = logit_lens(
                bridge, cache=cache, positions=(start, stop), chunk_size=VALUES_IN_A_PASS // 8 // vocabulary + 1
            )
            labels = list(found.labels)
            row.append(_summaries(found.values[:, 0], document[start + 1 : stop + 1], min(top, vocabulary)))
        parts.append(row)
    whole = {
        name: np.stack([np.concatenate([piece[name] for piece in row], axis=1) for row in parts], axis=1)
        for name in parts[0][0]
    }
    return LayerPredictions(labels, **whole)


def layer_predictions_of_run(
    models: Models, documents: Documents, *, top: int = TOP, progress: bool = False
) -> ByModel[LayerPredictions]:
    """`layer_predictions` of every model of a run on the same documents.

    Args:
        models: from `load`.
        documents: from `Models.documents`.
        top: tokens with the highest logits that are kept.
    """
    return each_model(
        models,
        documents,
        lambda bridge: layer_predictions(bridge, documents.inputs(bridge), top=top),
        "logit lens",
        progress=progress,
    )


def _summaries(logits: Tensor, right: Tensor, top: int) -> dict[str, Any]:
    """By the names of LayerPredictions, (L + 1, T, ...) of logits (L + 1, T, V) and right tokens (T,)."""
    log_probs = logits.log_softmax(-1)
    output = log_probs[-1]
    wanted = right.expand(logits.shape[:2])[..., None]
    best = logits.topk(top, dim=-1)
    found = {
        "top_tokens": best.indices,
        "top_logits": best.values.double(),
        "top_probability": log_probs.amax(-1).exp().double(),
        "divergence": (output.exp() * (output - log_probs)).sum(-1).double(),
        "rank": (logits > logits.gather(-1, wanted)).sum(-1),
        "loss": -log_probs.gather(-1, wanted)[..., 0].double(),
    }
    return {name: one.cpu().numpy() for name, one in found.items()}
