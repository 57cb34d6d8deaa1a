"""Text to evaluate on, from a corpus's name or from files: prepared on the spot, its held-out part only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.data.corpora import Corpus, Document, TokenDocument
from ln_removal.data.hub_corpora import HubCorpus
from ln_removal.data.local_files import SOURCE, LocalFiles
from ln_removal.data.open_corpus import open_corpus
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from ln_removal.data.tokens import TokenDataset

BYTES_A_TOKEN = 8
"""More than a token of text usually has: reading stops once the bytes are certain to give enough tokens."""


class HeldOutText:
    """The validation documents of a corpus, up to a limit. Files that a user names are held out as a whole.

    One end-of-text token stands for the training split, which a prepared corpus has to have and nobody reads here.

    Args:
        corpus: what to take them from.
        max_tokens: stop after text for about this many tokens; None reads all.
    """

    def __init__(self, corpus: Corpus, max_tokens: int | None = None) -> None:
        self.corpus = corpus
        self.name = corpus.name
        self.max_tokens = max_tokens

    def identity(self) -> dict[str, object]:
        return {**self.corpus.identity(), "held_out_tokens": self.max_tokens}

    def documents(self, skip: int = 0) -> Iterator[Document | TokenDocument]:
        yielded = size = 0
        for document in self._all():
            if yielded == 0 and skip == 0:
                yield Document("", "train", document.source)
            if yielded + 1 >= skip:
                yield document
            yielded += 1
            size += (
                len(document.text.encode()) if isinstance(document, Document) else BYTES_A_TOKEN * len(document.tokens)
            )
            if self.max_tokens is not None and size >= BYTES_A_TOKEN * self.max_tokens:
                return
        if not yielded:
            raise UserError(
                f"{self.name} holds no text to evaluate on; name a file or directory with text, or a corpus"
            )

    def _all(self) -> Iterator[Document | TokenDocument]:
        if isinstance(self.corpus, LocalFiles):
            yield from _WholeFiles(self.corpus.path).documents()
            return
        comes_first = False  # the held-out part, as a whole: nothing after it is worth downloading
        for number, document in enumerate(self.corpus.documents()):
            if document.split == "validation":
                # Where a hash decides, the first document is for training (`hash_split`).
                comes_first |= (
                    number == 0 and isinstance(self.corpus, HubCorpus) and not self.corpus.source.nanogpt_split
                )
                yield document
            elif comes_first:
                return


class _WholeFiles(LocalFiles):
    """Local files without a training split."""

    def documents(self, skip: int = 0) -> Iterator[Document]:
        for number, (_, text) in enumerate(self._texts()):
            if number >= skip:
                yield Document(text, "validation", SOURCE)


def held_out_tokens(
    name: str, tokenizer: PreTrainedTokenizerFast, directory: Path, *, tokenizer_name: str, max_tokens: int | None
) -> TokenDataset:
    """Prepare the held-out text of a corpus, or the files of a path, for evaluation.

    Args:
        name: as `ln-prepare` takes it: a corpus, hub:OWNER/NAME, a file or a directory.
        tokenizer: of the models that will read it. tokenizer_name: its name in error messages.
        directory: where the tokens go.
        max_tokens: text for about so many tokens; None takes all that is held out.

    Raises:
        UserError: there is no such corpus, it is out of reach, or it holds no text to evaluate on.
    """
    from ln_removal.data.prepare import prepare
    from ln_removal.models import tokenizer_fingerprint

    return prepare(
        HeldOutText(open_corpus(name), max_tokens),
        tokenizer,
        directory,
        tokenizer_name=tokenizer_name,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
