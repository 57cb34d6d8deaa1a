"""An embedding whose largest rows are scaled down, so that no token begins the residual stream far above the constants.

Rows of tokens that a training rarely sees are hardly changed by it. In a model without position embeddings such a row is the whole
stream in front of the first norm, and without norms what is too large there grows from one gated MLP to the next. The scale of a
row depends on its token alone, so it folds into the row.

Shapes: B batch, T positions, V vocabulary, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.families import family_of
from ln_removal.norms.freezable import std_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CappedEmbedding(nn.Embedding):
    """An embedding whose rows have at most the std `limit` when they are read; the weight itself stays as it is.

    Args:
        own: whose weight is taken over, not copied.
        ratio: of the limit to a norm's constant, see `write_limit`.
        centred: the std is that of a LayerNorm; else it is the root mean square.

    Buffers:
        limit: scalar, in units of the residual stream; infinite until the norm behind it begins to freeze.
    """

    limit: Tensor

    def __init__(self, own: nn.Embedding, *, ratio: float, centred: bool) -> None:
        super().__init__(own.num_embeddings, own.embedding_dim, own.padding_idx, _weight=own.weight)
        self.weight = own.weight
        self.ratio = ratio
        self.centred = centred
        dtype = torch.promote_types(own.weight.dtype, torch.float32)
        self.register_buffer("limit", torch.full((), torch.inf, dtype=dtype, device=own.weight.device))

    def forward(self, ids: Tensor) -> Tensor:
        """The rows of token ids (B, T), as (B, T, D)."""
        return self._limited(super().forward(ids))

    @torch.no_grad()
    def folded(self) -> Tensor:
        """The weight (V, D) of a plain embedding that gives the same."""
        return self._limited(self.weight)

    def write_limit(self, constant: Tensor | None) -> None:
        """Set the limit to `ratio` times a scalar constant, or take it away (None). Does not wait for the device."""
        if constant is None:
            self.limit.fill_(torch.inf)
        else:
            self.limit.copy_(self.ratio * constant)

    def _limited(self, rows: Tensor) -> Tensor:
        std = std_of(rows, centred=self.centred).unsqueeze(-1)
        over = std > self.limit
        # Not (limit / std).clamp(max=1), whose gradient is not a number where the limit is infinite.
        return rows * (torch.where(over, self.limit, 1.0) / torch.where(over, std, 1.0)).to(rows.dtype)


def cap_embedding(model: PreTrainedModel, ratio: float) -> None:
    """Put a `CappedEmbedding` in the place of the embedding of a model of a known family.

    Raises:
        UserError: the model has position embeddings.
    """
    family = family_of(model.config)
    if len(family.embeddings) > 1:
        raise UserError(
            f"an embedding_cap is for models whose residual stream begins with the token's embedding alone, and a {family.title} adds "
            "position embeddings; leave it out"
        )
    own = model.get_submodule(family.embedding)
    assert isinstance(own, nn.Embedding), type(own)
    model.set_submodule(family.embedding, CappedEmbedding(own, ratio=ratio, centred=family.centred))
