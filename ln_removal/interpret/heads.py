"""What attention heads look at: sinks, entropy, and the previous, duplicate and induction patterns.

A(t, s) is the attention of query t on key s.

    sink rate (published)   share of heads and queries t with A(t, 0) > 0.3, as the scripts of Baroni et al. (arXiv 2507.02559)
                            compute it: no query is left out
    sink rate (later)       the same without queries 0 to 2, in which a head that attends uniformly has 1, 1/2 and 1/3
    sink heads              share of heads whose mean over t of A(t, 0) in a document is above 0.3 (Gu et al., arXiv 2410.10781)
    entropy                 mean over queries of - sum over s of A(t, s) log A(t, s), nats
    previous                mean over t > 0 of A(t, t - 1)

The next two are measured on random tokens that come twice (Olsson et al., arXiv 2209.11895). They are means over the queries
that have such a key, of the attention on all such keys:

    duplicate               on earlier places of the same token
    induction               on places that follow an earlier place of the same token

Shape legend: N documents, C copied sequences, L layers, H heads, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ln_removal.errors import UserError
from ln_removal.evaluation.bootstrap import Interval
from ln_removal.interpret.attribution import interval_json
from ln_removal.interpret.entropies import nullable
from ln_removal.interpret.models import SHORTEST_LENGTH, Documents, Models
from ln_removal.interpret.passes import Array, ByModel, each_model, mean_interval, passes

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

SINK_THRESHOLD = 0.3
"""Attention on position 0 above which a query, or a head, is said to sink."""

TRIVIAL_QUERIES = 3
"""Queries 0, 1 and 2: a head that attends uniformly gives position 0 more than the threshold there."""

COPIES = 32
"""Sequences of random tokens that come twice."""

Score = Literal["published_sink_rate", "later_sink_rate", "sink_heads", "entropy", "previous", "duplicate", "induction"]
SCORES: tuple[Score, ...] = get_args(Score)

UNITS: dict[Score, str] = {
    "published_sink_rate": "per_cent",
    "later_sink_rate": "per_cent",
    "sink_heads": "per_cent",
    "entropy": "nats",
    "previous": "attention",
    "duplicate": "attention",
    "induction": "attention",
}


@dataclass(frozen=True)
class HeadScores:
    """Scores of every head of a model.

    Attributes:
        values: of each score, (N, L, H), or (C, L, H) for "duplicate" and "induction": shares between 0 and 1, and nats.
        queries: T of the documents.
    """

    values: dict[Score, Array]
    queries: int

    def by_head(self, score: Score) -> Array:
        """(L, H) mean over documents: shares between 0 and 1, or nats."""
        return np.asarray(self.values[score].mean(axis=0))

    def overall(self, score: Score, *, seed: int = 0) -> Interval:
        """Mean over heads and documents with its 95 % interval over documents: a share between 0 and 1, or nats."""
        return mean_interval(self.values[score].mean(axis=(1, 2)), seed=seed)

    def strongest(self, score: Score) -> tuple[int, int]:
        """Layer and head with the highest mean."""
        layer, head = np.unravel_index(self.by_head(score).argmax(), self.by_head(score).shape)
        return int(layer), int(head)

    def at(self, score: Score, layer: int, head: int, *, seed: int = 0) -> Interval:
        """Mean of one head over documents with its 95 % interval."""
        return mean_interval(self.values[score][:, layer, head], seed=seed)

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Each score's mean with its interval, and the heads'. Sink rates are in per cent."""
        found: dict[str, Any] = {
            "queries": self.queries,
            "queries_left_out_of_later_sink_rate": list(range(min(TRIVIAL_QUERIES, self.queries))),
            "sink_threshold": SINK_THRESHOLD,
        }
        for score in SCORES:
            unit = UNITS[score]
            factor = 100.0 if unit == "per_cent" else 1.0
            overall, best = self.overall(score, seed=seed), self.strongest(score)
            found[f"{score}_{unit}"] = {
                "mean": interval_json(Interval(*(factor * x for x in (overall.value, overall.low, overall.high)))),
                "strongest_head": list(best),
                "heads": nullable(factor * self.by_head(score)),
            }
        return found


def head_scores(bridge: TransformerBridge, tokens: Tensor, copies: Tensor) -> HeadScores:
    """Scores of every head, from its attention patterns.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`.
        tokens: (N, T) documents, T > 3, on the bridge's device.
        copies: (C, T') sequences that repeat tokens, from `copied_sequences`; each has a token that comes again.
    """
    layers, heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    values: dict[Score, Array] = {
        score: np.full((len(copies if score in ("duplicate", "induction") else tokens), layers, heads), np.nan)
        for score in SCORES
    }

    def text(layer: int, rows: slice, pattern: Tensor) -> None:
        from ln_removal.models.attention import attention_entropy

        first = pattern[..., 0]  # (B, H, T)
        sinks = (first > SINK_THRESHOLD).double()
        found: dict[Score, Tensor] = {
            "published_sink_rate": sinks.mean(-1),
            "later_sink_rate": sinks[..., TRIVIAL_QUERIES:].mean(-1),
            "sink_heads": (first.double().mean(-1) > SINK_THRESHOLD).double(),
            "entropy": attention_entropy(pattern).mean(-1),
            "previous": pattern.diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1),
        }
        for score, one in found.items():
            values[score][rows, layer] = one.double().cpu().numpy()

    masks = {"duplicate": _masks(copies, "duplicate"), "induction": _masks(copies, "induction")}

    def copying(layer: int, rows: slice, pattern: Tensor) -> None:
        for score, mask in masks.items():
            wanted = mask[rows, None].to(pattern)  # (B, 1, T, T)
            queries = wanted.amax(-1).sum(-1)  # that have such a key
            values[score][rows, layer] = ((pattern * wanted).sum((-2, -1)) / queries).double().cpu().numpy()  # type: ignore[index]

    for rows_of, reader in ((tokens, text), (copies, copying)):
        length = rows_of.shape[1]
        readers = {
            f"blocks.{layer}.attn.hook_pattern": lambda rows, pattern, layer=layer, reader=reader: reader(
                layer, rows, pattern
            )
            for layer in range(layers)
        }
        for _ in passes(bridge, rows_of, readers, numbers=length * max(heads * length, int(bridge.cfg.d_vocab))):
            pass
    return HeadScores(values, int(tokens.shape[1]))


def head_scores_of_run(
    models: Models, documents: Documents, *, copies: int = COPIES, progress: bool = False
) -> ByModel[HeadScores]:
    """`head_scores` of every model of a run, on the same documents and copied sequences.

    Args:
        models: from `load`, with a tokenizer.
        documents: from `Models.documents`; the copied sequences are as long, and have a BOS if the documents have one.
        copies: how many sequences of random tokens are given twice.

    Raises:
        UserError: the models have no tokenizer to draw random tokens from.
    """
    import torch

    repeated = copied_sequences(models, documents, copies)

    def look(bridge: TransformerBridge) -> HeadScores:
        inputs = documents.inputs(bridge)
        return head_scores(bridge, inputs, torch.from_numpy(repeated).to(inputs.device))

    return each_model(models, documents, look, "attention", progress=progress)


def copied_sequences(models: Models, documents: Documents, count: int) -> Any:
    """(C, T') random tokens twice, with the BOS of the documents in front if they have one; T' is at most their length.

    Raises:
        UserError: there is no tokenizer, or the documents are too short.
    """
    from ln_removal.data.stress_text import repeated_sequences

    if models.tokenizer is None:
        raise UserError("there is no tokenizer to draw random tokens from; load the models from directories")
    period = (documents.tokens.shape[1] - documents.prepend_bos) // 2
    if 2 * period < SHORTEST_LENGTH - 1:
        raise UserError(f"documents of {documents.tokens.shape[1]} tokens are too short; ask for longer ones")
    rows = repeated_sequences(models.tokenizer, context=2 * period, count=count, seed=documents.seed, period=period)
    if documents.prepend_bos:
        rows = np.insert(rows, 0, documents.tokens[0, 0], axis=1)
    return rows


def _masks(tokens: Tensor, kind: Literal["duplicate", "induction"]) -> torch.Tensor:
    """(C, T, T) TransformerLens' detection pattern of each sequence: 1 where a query of such a head looks."""
    import torch
    from transformer_lens import head_detector

    pattern = getattr(
        head_detector,
        f"get_{kind}_token_head_detection_pattern" if kind == "duplicate" else "get_induction_head_detection_pattern",
    )
    return torch.stack([pattern(row[None].cpu()) for row in tokens]).to(tokens.device)
