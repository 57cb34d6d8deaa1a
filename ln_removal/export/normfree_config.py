"""The configuration of a GPT-2 without LayerNorm.

In a module of its own because transformers' AutoConfig has to know it before any model is built; it needs no model code.
"""

from __future__ import annotations

from typing import Any

from transformers.models.gpt2.configuration_gpt2 import GPT2Config

_NOT_INHERITED = ("model_type", "architectures", "auto_map", "transformers_version", "tie_word_embeddings", "dtype")
"""Entries of a GPT-2 configuration that say which class it is for, and so are not taken over."""


class NormFreeGPT2Config(GPT2Config):  # type: ignore[misc]  # transformers' base is untyped to mypy
    """Configuration of `NormFreeGPT2LMHeadModel`: GPT-2's, with an unembedding of its own.

    layer_norm_epsilon is kept from the original for the record; nothing reads it.
    """

    model_type = "normfree_gpt2"

    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # A configuration exists before a model is looked up by it, and at that moment no import is half done. See
        # registration for why this is not done when transformers is imported.
        from ln_removal.export.registration import register_model

        register_model()
        super().__post_init__(**kwargs)

    @classmethod
    def from_gpt2(cls, config: GPT2Config) -> NormFreeGPT2Config:
        """The configuration of the LN-free model folded from a model with configuration `config`."""
        return cls(**without_identity(config))


def without_identity(config: GPT2Config) -> dict[str, Any]:
    """A GPT-2 configuration as a dictionary, without what ties it to one model class."""
    return {key: value for key, value in config.to_dict().items() if key not in _NOT_INHERITED}
