"""The model shapes that are measured, and random tokens to train them on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A model of random weights and its batch.

    Attributes:
        tokens_per_step: on a GPU; the papers use 2^19 for every size. Larger models get fewer so that a run stays short.
        peer_micro_batch: sequences a forward pass for those that cannot choose it: what their authors fit into 80 GB,
            rounded down to a power of two. Halved where it does not fit.
    """

    n_layer: int
    n_embd: int
    n_head: int
    vocab_size: int
    context: int
    tokens_per_step: int
    peer_micro_batch: int
    family: Literal["gpt2", "pythia"] = "gpt2"

    @property
    def eot_token_id(self) -> int:
        """GPT-2's end of text; it is the peers' constant too. Shapes with a smaller vocabulary take their last id."""
        return min(50256, self.vocab_size - 1)

    @property
    def sizes(self) -> dict[str, int]:
        """The arguments of a GPT2Config of this shape."""
        return {
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_positions": self.context,
            "vocab_size": self.vocab_size,
            "bos_token_id": self.eot_token_id,
            "eos_token_id": self.eot_token_id,
        }

    def model(self, **settings: Any) -> Any:
        """A model of this shape; `settings` go into its configuration."""
        from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig

        if self.family == "gpt2":
            return AutoModelForCausalLM.from_config(GPT2Config(**self.sizes, **settings))
        config = GPTNeoXConfig(
            num_hidden_layers=self.n_layer,
            num_attention_heads=self.n_head,
            hidden_size=self.n_embd,
            intermediate_size=4 * self.n_embd,
            max_position_embeddings=self.context,
            vocab_size=self.vocab_size,
            bos_token_id=self.eot_token_id,
            eos_token_id=self.eot_token_id,
            **settings,
        )
        return AutoModelForCausalLM.from_config(config)


SHAPES = {
    "tiny": Shape(6, 192, 3, 4096, 512, tokens_per_step=4096, peer_micro_batch=8),
    "pythia-70m": Shape(6, 512, 8, 50304, 512, tokens_per_step=4096, peer_micro_batch=8, family="pythia"),
    "gpt2": Shape(12, 768, 12, 50257, 1024, tokens_per_step=2**19, peer_micro_batch=32),
    "gpt2-medium": Shape(24, 1024, 16, 50257, 1024, tokens_per_step=2**18, peer_micro_batch=16),
    "gpt2-large": Shape(36, 1280, 20, 50257, 1024, tokens_per_step=2**17, peer_micro_batch=8),
    "gpt2-xl": Shape(48, 1600, 25, 50257, 1024, tokens_per_step=2**16, peer_micro_batch=4),
}


def random_tokens(shape: Shape, count: int, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """`count` uniform token ids with an end of text about every 500 tokens, as documents have."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(shape.vocab_size, size=count, dtype=np.uint16)
    tokens[generator.random(count) < 1 / 500] = shape.eot_token_id
    return tokens


def write_token_directory(shape: Shape, directory: Path, count: int) -> None:
    """Write random tokens in the form of ln-prepare, so that this project reads them as it reads a corpus."""
    from ln_removal.data.tokens import Shard, TokenIndex, write_index
    from ln_removal.files.atomic import checksum

    directory.mkdir(parents=True, exist_ok=True)
    index = TokenIndex(
        corpus={"name": "random"},
        tokenizer={"name": "random", "sha256": ""},
        vocab_size=shape.vocab_size,
        eot_token_id=shape.eot_token_id,
        dtype="uint16",
    )
    for split, tokens in (("train", count), ("validation", 4 * (shape.context + 1))):
        path = directory / f"{split}-random-00000.bin"
        random_tokens(shape, tokens).tofile(path)
        shard = Shard(file=path.name, split=split, source="random", tokens=tokens, documents=1, sha256=checksum(path))
        index.shards.append(shard)
    write_index(directory, index)
