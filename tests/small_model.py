"""A GPT-2 of random weights with a tokenizer of its own, text for it, and a run: what the tests of commands start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from command_line import done
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

END_OF_TEXT = "<|endoftext|>"

STEP = "--set training.tokens_per_step=256 --set training.precision=float32"
REMOVE = f"ln-remove --model model --set data.corpus=texts --steps 6 --questions none {STEP}"
"""A removal in the world of `write_world`, without its --out."""


class Adapter(nn.Module):
    """As peft wraps a linear layer: `weight` and `bias` are the layer's, and the forward pass adds a product of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        size = weight.T.shape if isinstance(layer, nn.Linear) else weight.shape
        self.base_layer = layer
        self.down, self.up = nn.Linear(size[0], 2, bias=False), nn.Linear(2, size[1], bias=False)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.get_parameter("weight")

    @property
    def bias(self) -> nn.Parameter:
        return self.base_layer.get_parameter("bias")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.base_layer(x) + self.up(self.down(x))
        return added


def write_corpus(directory: Path, documents: int = 24) -> Path:
    """Text files that differ, of about 600 tokens each."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        lines = [
            f"def function_{number}_{line}(value):\n    total = value * {line % 9} + {number}\n    return total\n"
            for line in range(30)
        ]
        (directory / f"part_{number:02d}.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory


def write_tokenizer(directory: Path, *, entries: int = 320, texts: list[str] | None = None) -> int:
    """A byte-level BPE tokenizer of exactly `entries` entries, unused ones included; returns its end-of-text id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    texts = texts or [f"def function_{n}(value):\n    total = value * {n} + 1\n    return total\n" for n in range(50)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=min(entries, 400), initial_alphabet=alphabet, special_tokens=[END_OF_TEXT])
    tokenizer.train_from_iterator(texts, trainer)
    missing = entries - tokenizer.get_vocab_size()
    if missing:
        tokenizer.add_tokens([f"<|unused {number}|>" for number in range(missing)])
    assert tokenizer.get_vocab_size() == entries
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    saved.save_pretrained(directory)
    return int(tokenizer.token_to_id(END_OF_TEXT))


def write_model(
    directory: Path,
    *,
    n_layer: int = 2,
    n_head: int = 2,
    n_embd: int = 32,
    n_positions: int = 64,
    entries: int = 320,
    vocabulary: int | None = None,
    seed: int = 0,
) -> Path:
    """A directory in Hugging Face format that `ln-remove --model` takes.

    `entries` of the tokenizer; `vocabulary` of the model, if it has more rows than that.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    eot = write_tokenizer(directory, entries=entries)
    config = GPT2Config(
        vocab_size=vocabulary or entries,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        bos_token_id=eot,
        eos_token_id=eot,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(directory)
    return directory


GENERATION = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 12, "eos_token_id": [0, 1]}


def leave_settings(model: Path) -> None:
    """What users leave in a model's directory: how it was last run, in config.json, and how it is to write text."""
    flags = {
        "output_attentions": True,
        "output_hidden_states": True,
        "return_dict": False,
        "gradient_checkpointing": True,
    }
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | flags), encoding="utf-8")
    (model / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")


def tiny_neox(*, parallel: bool = True) -> PreTrainedModel:
    """A random GPT-NeoX of the Pythia kind: 2 layers, width 32, 4 heads, 101 tokens, 32 positions; evaluation mode."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
        use_parallel_residual=parallel,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return GPTNeoXForCausalLM(config).eval()


def write_world(place: Path) -> Path:
    """Two models, text, tokens of each, and a finished run with a control, whose checkpoints are of steps 3 and 6."""
    leave_settings(write_model(place / "model"))
    write_model(place / "other", entries=300)
    write_corpus(place / "texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        done("ln-prepare texts --tokenizer model --out tokens")
        done("ln-prepare texts --tokenizer other --out other-tokens")
        done(f"{REMOVE} --control --set training.checkpoint_every=3 --out run")
    return place
