"""`ln-prepare`: turn a corpus into token shards."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.data.tokens import TokenDataset

CorpusArgument = Annotated[
    str,
    typer.Argument(
        help="A named corpus (--list shows them), hub:OWNER/NAME[:CONFIG], or a file or directory.", show_default=False
    ),
]
OutOption = Annotated[
    Path | None, typer.Option(help="Directory for the tokens. Default: data/CORPUS.", show_default=False)
]
TokenizerOption = Annotated[
    str,
    typer.Option(
        help="The model whose tokenizer to use, and which writes the corpus generated: tiny, gpt2, a directory, a Hub id."
    ),
]
MaxTokensOption = Annotated[
    int | None, typer.Option(min=1, help="Stop after this many training tokens.", show_default=False)
]
MaxBytesOption = Annotated[
    int | None, typer.Option(min=1, help="Read about this much training text.", show_default=False)
]
FieldOption = Annotated[
    str | None, typer.Option(help="Name of the text field in jsonl, parquet or the Hub data set.", show_default=False)
]
ShareOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the documents to hold out, above 0 and at most 1, where the corpus has no validation split of its own.",
        show_default=False,
    ),
]
ListOption = Annotated[bool, typer.Option("--list", help="List the named corpora and stop.")]


def prepare(
    corpus: CorpusArgument = "",
    out: OutOption = None,
    tokenizer: TokenizerOption = "gpt2",
    max_tokens: MaxTokensOption = None,
    max_bytes: MaxBytesOption = None,
    field: FieldOption = None,
    validation_share: ShareOption = None,
    list_corpora: ListOption = False,
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Tokenize a corpus into memory-mapped shards. After an interruption, the same command goes on where it stopped.

    \b
    Examples:
      ln-prepare --list
      ln-prepare python-source --tokenizer tiny --out data/python
      ln-prepare openwebtext --max-tokens 600000000 --out data/openwebtext
      ln-prepare texts/ --tokenizer gpt2 --validation-share 0.05 --out data/texts
      ln-prepare generated --tokenizer my-model/ --max-tokens 2000000 --out data/generated
    """
    if list_corpora:
        from ln_removal.data.open_corpus import known_corpora

        for name, summary in known_corpora().items():
            typer.echo(f"{name:24} {summary}")
        return
    if not corpus:
        raise UserError(
            "no corpus was named; give a file, a directory or one of the names that `ln-prepare --list` shows"
        )
    safe = "".join(character if character.isalnum() or character in "-_." else "-" for character in corpus).strip("-.")
    place = out or Path("data") / (safe or "corpus")
    options = {"max_bytes": max_bytes, "field": field, "validation_fraction": validation_share}
    data = _prepared(corpus, place, tokenizer, max_tokens, options)
    splits = {
        name: {"tokens": split.tokens, "documents": split.documents, "bytes": split.bytes}
        for name in ("train", "validation")
        for split in [data.split(name)]
    }
    if as_json:
        typer.echo(
            json.dumps({"directory": str(place), "tokenizer": tokenizer, "vocab_size": data.vocab_size, **splits})
        )
        return
    for name, counts in splits.items():
        typer.echo(
            f"{name:10} {counts['tokens']:>14,} tokens  {counts['documents']:>10,} documents  {counts['bytes']:>14,} bytes"
        )
    typer.echo(f"tokens: {place}   train on them with --tokens {place}")


def _prepared(
    corpus: str, place: Path, tokenizer: str, max_tokens: int | None, options: Mapping[str, object]
) -> TokenDataset:
    """Prepare the corpus in `place`; after a mistake of the user nothing unfinished is left there."""
    from ln_removal.data.open_corpus import Writer, open_corpus
    from ln_removal.data.prepare import prepare as run_prepare
    from ln_removal.data.prepare import prepare_bar
    from ln_removal.models.checks import say_what_is_left_out
    from ln_removal.models.loading import load_tokenizer, tokenizer_fingerprint

    source = open_corpus(corpus, writer=Writer(tokenizer, max_tokens), **options)
    loaded = load_tokenizer(tokenizer)
    say_what_is_left_out(loaded, tokenizer)
    with prepare_bar(source.name, total=max_tokens, enabled=sys.stderr.isatty()) as show:
        return run_prepare(
            source,
            loaded,
            place,
            tokenizer_name=tokenizer,
            tokenizer_sha256=tokenizer_fingerprint(loaded),
            max_tokens=max_tokens,
            progress=show,
        )


app = console.build(prepare)


def main() -> None:
    """Entry point of `ln-prepare`."""
    app()


if __name__ == "__main__":
    main()
