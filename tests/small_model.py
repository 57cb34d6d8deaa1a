"""A GPT-2 of random weights with a tokenizer of its own, and text for it: what the tests of commands start from."""

from __future__ import annotations

from pathlib import Path

import torch

END_OF_TEXT = "<|endoftext|>"


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
    seed: int = 0,
) -> Path:
    """A directory in Hugging Face format that `ln-remove --model` takes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    eot = write_tokenizer(directory, entries=entries)
    config = GPT2Config(
        vocab_size=entries,
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
