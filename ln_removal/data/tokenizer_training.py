"""Train a byte-level BPE tokenizer for source code.

GPT-2's pre-tokenizer splits code into many short pieces. This one lets a word take one leading symbol (`.append`,
`_name`, `(self`), a run of symbols take the line break after it, and a line break take the indentation that follows: fewer
tokens for the same text, at the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

CODE_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)?|\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
"""Words with one leading symbol; up to three digits; symbols with a line break and its indentation; white space."""


def train_code_tokenizer(texts: Iterable[str], vocab_size: int, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Train on `texts` and wrap the result for transformers.

    Args:
        texts: documents; consumed once.
        vocab_size: entries including the 256 bytes and the end-of-text token.
        model_max_length: positions of the model it will serve.

    Returns:
        A fast tokenizer whose end-of-text token `<|endoftext|>` has id 0 and serves as bos, eos and unk.
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence(
        [Split(Regex(CODE_PATTERN), behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
