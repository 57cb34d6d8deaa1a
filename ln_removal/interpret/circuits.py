"""Circuits from weights: what heads move (OV), what they look for (QK), how they compose, and their scores by source pair.

Definitions of Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021), with row vectors:

    OV = W_V W_O                what a head writes for what it reads at a key
    QK = W_Q W_K^T              how much a query looks at a key
    copying score               sum of Re(lambda) / sum of |lambda| over the eigenvalues of W_E OV W_U: 1 if a head raises the
                                logits of the tokens that it looks at, -1 if it lowers them
    with the first MLP          the same with M in place of W_E; row v of M is what the first MLP writes for token v if the first
                                layer attends to v alone, at a mean position: the effective embedding of McDougall et al.,
                                "Copy Suppression" (arXiv 2310.04625), without W_E. Later heads often read a token there (Wang et
                                al., arXiv 2211.00593, copy scores); heads of the first layer cannot, so they have none
    matching score              the same of W_E QK W_E^T: 1 if a head looks at keys with its query's own token
    composition score           |A B| / (|A| |B|) in Frobenius norms; A is OV of the earlier head, B the later head's QK (Q), its
                                transpose (K), or OV (V): TransformerLens' `composition_scores`

The norm in front of a head is part of what it reads with. Its gamma and its mean subtraction are folded into W_Q, W_K, W_V, and
those of the final norm into W_U, which is centred over the vocabulary. All scores are free of scale, so the unknown 1 / sigma of
a norm does not matter here.

Attention scores are exact sums over pairs of sources (a, b) of the residual stream x = sum of sources, the biases being one:

    score(t, s) = sum over a, b of q_a[t] . k_b[s] / sqrt(K),      q_a = (a / sigma) W_Q,  k_b = (b / sigma) W_K

On a model with norms each factor needs the 1 / sigma of its position; an LN-free model has none.

Shape legend: L layers, H heads, K width of a head, D model width, V vocabulary, A sources, N documents, T queries, S keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ln_removal.errors import UserError
from ln_removal.interpret.attribution import Array
from ln_removal.interpret.entropies import nullable
from ln_removal.interpret.models import Documents, Models
from ln_removal.interpret.reading import as_read, bias_read, folded_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformer_lens import FactoredMatrix
    from transformer_lens.model_bridge import TransformerBridge

Composition = Literal["Q", "K", "V"]
SHOWN_TOKENS = 8
"""Tokens whose effect through a head is listed."""

TOKENS_AT_ONCE = 4096
"""Tokens of the vocabulary whose first MLP is computed at once."""

COMPOSITIONS: tuple[Composition, ...] = get_args(Composition)


@dataclass(frozen=True)
class Circuits:
    """Scores of all heads of one model from its weights.

    Attributes:
        ov_eigenvalues: (L, H, K) complex, of W_E OV W_U (the others are 0).
        mlp_ov_eigenvalues: (L, H, K) complex, of M OV W_U, with the first MLP in place of the embedding; NaN in the first layer.
        qk_eigenvalues: (L, H, K) complex, of W_E QK W_E^T.
        composition: by "Q", "K" and "V", (L, H, L, H): earlier head, later head; 0 where the second is not later.
    """

    ov_eigenvalues: Any
    mlp_ov_eigenvalues: Any
    qk_eigenvalues: Any
    composition: dict[Composition, Array]

    @property
    def copying(self) -> Array:
        """(L, H) copying scores, from -1 to 1."""
        return _positive_share(self.ov_eigenvalues)

    @property
    def mlp_copying(self) -> Array:
        """(L, H) copying scores with the first MLP in place of the embedding, from -1 to 1; NaN in the first layer."""
        return _positive_share(self.mlp_ov_eigenvalues)

    @property
    def matching(self) -> Array:
        """(L, H) matching scores, from -1 to 1."""
        return _positive_share(self.qk_eigenvalues)

    def strongest(self, kind: Composition, count: int = 10) -> list[tuple[str, float]]:
        """The head pairs with the largest composition scores of a kind, such as ("L0H1 -> L3H2", 0.4)."""
        scores = self.composition[kind]
        order = np.argsort(-scores, axis=None)[:count]
        places = (np.unravel_index(index, scores.shape) for index in order)
        found = [(f"L{at[0]}H{at[1]} -> L{at[2]}H{at[3]}", float(scores[at])) for at in places]
        return [one for one in found if one[1] > 0]

    def to_json(self) -> dict[str, Any]:
        """Scores and eigenvalues; complex numbers are pairs of real and imaginary part."""
        return {
            "copying_score": self.copying.tolist(),
            "copying_score_with_first_mlp": nullable(self.mlp_copying),
            "matching_score": self.matching.tolist(),
            "composition_score": {kind: scores.tolist() for kind, scores in self.composition.items()},
            "ov_eigenvalues": np.stack([self.ov_eigenvalues.real, self.ov_eigenvalues.imag], -1).tolist(),
        }


@dataclass(frozen=True)
class ScoreTerms:
    """The attention scores of one head as a sum over pairs of sources.

    Attributes:
        sources: A names: "embed", "pos_embed", "0_attn_out", "0_mlp_out", ..., "bias".
        terms: (A, A, N, T, S), the query's source first; causal entries only, others are 0.
        pattern: (N, T, S), the softmax of their sum over the keys up to the query.
        pattern_error: largest difference between it and the model's own pattern.
    """

    sources: list[str]
    terms: Tensor
    pattern: Tensor
    pattern_error: float

    def shares(self) -> Array:
        """(A, A) how much of the scores' variation over keys each pair makes; they sum to 1.

        Softmax sees only differences between the keys of a query, so the share is the covariance over keys of a pair's term
        with the whole score, summed over queries, divided by the variance of the score. It is negative for a pair that
        works against the rest.
        """
        import torch

        T, S = self.terms.shape[-2:]
        visible = torch.ones(T, S, dtype=torch.bool, device=self.terms.device).tril()
        whole = self.terms.sum(dim=(0, 1))
        # Once one of two factors is centred, their covariance needs no mean of the other.
        whole = torch.where(visible, whole - whole.sum(dim=-1, keepdim=True) / visible.sum(dim=-1, keepdim=True), 0.0)
        found = torch.einsum("abnts,nts->ab", self.terms, whole) / whole.square().sum()
        return np.asarray(found.double().cpu().numpy())


@dataclass(frozen=True)
class CircuitsByModel:
    """Circuits of every model of a run, by role.

    Attributes:
        circuits: from weights.
        sources: names of the sources that each layer's heads read.
        shares: by role, for each layer (H, A, A), of `ScoreTerms.shares`.
        pattern_errors: by role, (L, H), of `ScoreTerms`, the largest over the documents.
        documents: on which scores were split.
        head: layer and head of `raised`.
        raised: by role, the `token_table` of the head for the tokens of the documents that it moves most in the last model;
            as texts.
    """

    circuits: dict[str, Circuits]
    sources: list[list[str]]
    shares: dict[str, list[Array]]
    pattern_errors: dict[str, Array]
    documents: Documents
    names: dict[str, str]
    head: tuple[int, int]
    raised: dict[str, list[tuple[str, list[str]]]]

    def pairs(self, role: str, layer: int, head: int, count: int = 2) -> list[tuple[str, float]]:
        """The source pairs with the largest shares of a head's scores, such as ("embed . 0_attn_out", 0.6)."""
        found, names = self.shares[role][layer][head], self.sources[layer]
        order = np.argsort(-found, axis=None)[:count]
        places = [np.unravel_index(index, found.shape) for index in order]
        return [(f"{names[a]} . {names[b]}", float(found[a, b])) for a, b in places]

    def to_json(self) -> dict[str, Any]:
        """By model; the shares by layer and head, as the three largest pairs."""
        models = {}
        for role, one in self.circuits.items():
            heads = [
                [
                    [{"query_key": pair, "share": share} for pair, share in self.pairs(role, layer, head, 3)]
                    for head in range(len(self.shares[role][layer]))
                ]
                for layer in range(len(self.sources))
            ]
            models[role] = {
                "name": self.names.get(role),
                **one.to_json(),
                "pattern_error": self.pattern_errors[role].tolist(),
                "score_pairs": heads,
            }
        for role, rows in self.raised.items():
            models[role]["raised_tokens"] = [{"token": token, "raises": texts} for token, texts in rows]
        return {"text": self.documents.to_json(), "head": f"L{self.head[0]}H{self.head[1]}", "models": models}


def weight_circuits(bridge: TransformerBridge) -> Circuits:
    """Copying, matching and composition scores of all heads, from the weights alone.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, weights not processed.
    """
    import torch
    from transformer_lens import FactoredMatrix

    with torch.no_grad():
        weights = folded_weights(bridge)
        # The eigenvalues of a product that are not 0 stay when its factors change places cyclically.
        ov, mlp_ov = (
            FactoredMatrix(weights.W_U @ vectors @ weights.W_V, weights.W_O).eigenvalues.cpu().numpy()
            for vectors in (weights.W_E, _first_mlp(bridge))
        )
        mlp_ov[0] = np.nan
        gram = weights.W_E.T @ weights.W_E
        qk = FactoredMatrix(gram @ weights.W_Q, weights.W_K.transpose(-2, -1)).eigenvalues
        later = np.triu(np.ones((bridge.cfg.n_layers, bridge.cfg.n_layers)), 1)[:, None, :, None]
        rights = {"Q": weights.QK, "K": weights.QK.T, "V": weights.OV}
        composition = {kind: _composition(weights.OV, rights[kind]) * later for kind in COMPOSITIONS}
    return Circuits(ov, mlp_ov, qk.cpu().numpy(), composition)


def score_terms(bridge: TransformerBridge, tokens: Tensor, layer: int, head: int) -> ScoreTerms:
    """Split the scores of a head by what its queries and keys read.

    Args:
        bridge: from `load` or `ln_removal.to_bridge`, weights not processed.
        tokens: (N, T) token ids on the bridge's device.
    """
    import torch

    with torch.no_grad():
        (found,) = _score_terms(bridge, _run(bridge, tokens), layer, [head])
    return found


def token_table(
    bridge: TransformerBridge, layer: int, head: int, tokens: Sequence[int], count: int = 5
) -> list[list[tuple[int, float]]]:
    """The tokens whose logits a head raises most when it looks at each of some tokens: rows of W_E OV W_U.

    Args:
        tokens: that the head looks at.
        count: of raised tokens for each.

    Returns:
        For each token, (id, value) of the raised ones. Values are logits up to the scale of the norms.
    """
    import torch

    with torch.no_grad():
        weights = folded_weights(bridge)
        rows = weights.W_E[list(tokens)] @ weights.W_V[layer, head] @ weights.W_O[layer, head] @ weights.W_U
        values, ids = rows.topk(count, dim=-1)
    return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


def circuits_of_run(
    models: Models, documents: Documents, *, head: str | None = None, progress: bool = False
) -> CircuitsByModel:
    """Circuits of every model of a run; scores are split by source pair on the documents.

    Args:
        head: whose raised tokens are listed, such as "L1H0"; by default the one with the largest copying score in the last
            model.

    Raises:
        UserError: there is no such head.
    """
    import torch
    from tqdm.auto import tqdm

    layers, heads = int(models.any.cfg.n_layers), int(models.any.cfg.n_heads)
    asked = None if head is None else _parsed(head, layers, heads)
    circuits: dict[str, Circuits] = {}
    shares: dict[str, list[Array]] = {}
    errors: dict[str, Array] = {}
    sources: list[list[str]] = []
    with tqdm(total=layers * len(models.items()), desc="circuits", unit="layer", disable=not progress) as bar:
        for role, bridge in models.items():
            circuits[role], shares[role] = weight_circuits(bridge), []
            errors[role], sources = np.zeros((layers, heads)), []
            with torch.no_grad():
                runs = [_run(bridge, row) for row in documents.inputs(bridge).split(1)]
                for layer in range(layers):
                    found = [list(_score_terms(bridge, one, layer, range(heads))) for one in runs]
                    shares[role].append(np.mean([[one.shares() for one in some] for some in found], axis=0))
                    errors[role][layer] = np.max([[one.pattern_error for one in some] for some in found], axis=0)
                    sources.append(found[0][0].sources)
                    bar.update()
    copying = circuits[models.items()[-1][0]].copying
    chosen = asked or divmod(int(copying.argmax()), heads)
    raised = _raised(models, documents, *chosen)
    return CircuitsByModel(circuits, sources, shares, errors, documents, dict(models.names), chosen, raised)


def _parsed(head: str, layers: int, heads: int) -> tuple[int, int]:
    match = re.fullmatch(r"L(\d+)H(\d+)", head)
    if match is None or int(match[1]) >= layers or int(match[2]) >= heads:
        raise UserError(
            f"{head} is no head of these models; write L0H0 to L{layers - 1}H{heads - 1}, the layer and then the head"
        )
    return int(match[1]), int(match[2])


def _raised(models: Models, documents: Documents, layer: int, head: int) -> dict[str, list[tuple[str, list[str]]]]:
    """For each model the texts of tokens that a head looks at, and of those that it raises then."""

    def text(token: int) -> str:
        return str(token) if models.tokenizer is None else str(models.tokenizer.decode([token]))

    seen = np.unique(documents.tokens).tolist()
    last = token_table(models.items()[-1][1], layer, head, seen, 1)
    strongest = [seen[place] for place in np.argsort([-row[0][1] for row in last])[:SHOWN_TOKENS]]
    return {
        role: [
            (text(token), [text(found) for found, _ in row])
            for token, row in zip(strongest, token_table(bridge, layer, head, strongest, 4), strict=True)
        ]
        for role, bridge in models.items()
    }


def _first_mlp(bridge: TransformerBridge) -> Tensor:
    """(V, D) what the first MLP writes for each token that stands alone, with the mean of all position embeddings, in float64.

    A token that stands alone has all of the attention.
    """
    import torch

    written: list[Tensor] = []

    def at_mean_position(found: Tensor, hook: Any) -> Tensor:
        return bridge.W_pos.mean(dim=0).expand_as(found)

    def keep(found: Tensor, hook: Any) -> None:
        written.append(found[:, 0].double())

    hooks: list[Any] = [("hook_pos_embed", at_mean_position), ("blocks.0.hook_mlp_out", keep)]
    for tokens in torch.arange(bridge.cfg.d_vocab, device=bridge.W_pos.device).unsqueeze(1).split(TOKENS_AT_ONCE):
        bridge.run_with_hooks(tokens, fwd_hooks=hooks, stop_at_layer=1)
    return torch.cat(written)


def _composition(left: FactoredMatrix, right: FactoredMatrix) -> Array:
    """(L, H, L, H), a later layer at a time, because all pairs at once would fill the memory of a large model."""
    from transformer_lens.utilities.matrix import composition_scores

    layers = [composition_scores(left, right[layer]).cpu().nan_to_num().numpy() for layer in range(right.shape[0])]
    return np.asarray(np.stack(layers, axis=2), dtype=np.float64)


def _run(bridge: TransformerBridge, tokens: Tensor) -> Any:
    """What the split of scores needs of a forward pass."""
    wanted = ("hook_embed", "hook_pos_embed", "hook_pattern", "hook_attn_out", "hook_mlp_out", "hook_resid_pre")
    return bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith(wanted))[1]


def _score_terms(bridge: TransformerBridge, cache: Any, layer: int, heads: Sequence[int]) -> Any:
    """`ScoreTerms` of several heads of a layer, one after the other."""
    import torch

    block = bridge.blocks[layer]
    embed = cache["hook_embed"]
    parts = {"embed": embed, "pos_embed": cache["hook_pos_embed"].expand_as(embed)}
    for earlier in range(layer):
        for name in ("attn_out", "mlp_out"):
            parts[f"{earlier}_{name}"] = cache[f"blocks.{earlier}.hook_{name}"]
    read = as_read(block.ln1, torch.stack(list(parts.values())), cache[f"blocks.{layer}.hook_resid_pre"])
    scale = bridge.cfg.d_head**-0.5
    if getattr(bridge.cfg, "scale_attn_by_inverse_layer_idx", False):
        scale /= layer + 1
    length = embed.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool, device=embed.device).tril()
    for head in heads:
        sides = []
        for weight, bias in ((block.attn.W_Q, block.attn.b_Q), (block.attn.W_K, block.attn.b_K)):
            constant = bias_read(block.ln1, embed) @ weight[head] + bias[head]
            own = read @ weight[head]  # (A - 1, N, T, K)
            sides.append(torch.cat([own, constant.expand_as(own[:1])]))
        terms = torch.einsum("antk,bnsk->abnts", *sides) * scale
        terms = torch.where(visible, terms, 0.0)
        pattern = terms.sum(dim=(0, 1)).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        own_pattern = cache[f"blocks.{layer}.attn.hook_pattern"][:, head]
        yield ScoreTerms([*parts, "bias"], terms, pattern, float((pattern - own_pattern).abs().max()))


def _positive_share(eigenvalues: Any) -> Array:
    size = np.abs(eigenvalues).sum(axis=-1)  # NaN, where a head has no score, stays NaN
    found = np.divide(eigenvalues.real.sum(axis=-1), size, out=np.zeros_like(size), where=size != 0)
    return np.asarray(found, dtype=np.float64)
