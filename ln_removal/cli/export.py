"""`ln-export`: write an LN-free model in another format, or publish it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ln_removal.cli import console
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.export.hub import HubTarget, Published

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL",
        help="A run of ln-remove, or of ln-pretrain without any norm; the directory of an LN-free model; or a published LN-free "
        "model (disarmed norms): its directory or Hub id.",
        show_default=False,
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory to write; must not exist yet. Not needed to publish a run as it is.", show_default=False
    ),
]
FormOption = Annotated[
    Literal["normfree", "stock"],
    typer.Option(
        "--format", help="normfree: no norm module at all. stock: transformers' own class, such as GPT2LMHeadModel."
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of the weights written.")
]
WithCodeOption = Annotated[
    bool,
    typer.Option(
        "--with-code",
        help="Also save the modelling file, for users who pass trust_remote_code instead of installing ln-removal.",
    ),
]
SplitOption = Annotated[
    bool,
    typer.Option(
        "--split-qkv",
        help="Write a GPT-2's queries, keys and values as linear maps of their own, for tools that decompose parameters.",
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="Take the tokenizer of this model, where the source has none.", show_default=False
    ),
]


def export(
    source: SourceArgument,
    out: OutOption = None,
    form: FormOption = "normfree",
    dtype: DtypeOption = "float32",
    with_code: WithCodeOption = False,
    split_qkv: SplitOption = False,
    tokenizer: TokenizerOption = None,
    push_to_hub: console.PushOption = None,
    private: console.PrivateOption = False,
    tag: console.TagOption = None,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Write an LN-free model in another format. A run that stopped before its export is folded from its checkpoint; a
    published model with disarmed norms is converted to one without norms.

    \b
    Examples:
      ln-export checkpoints/demo --format stock --out exports/demo-stock
      ln-export checkpoints/demo/model --dtype bfloat16 --out exports/demo-bf16
      ln-export apollo-research/gpt2_noLN --tokenizer gpt2 --with-code --out exports/gpt2-noln
      ln-export checkpoints/gpt2 --push-to-hub alice/gpt2-without-layernorm --tag v1.0
    """
    from ln_removal.export.hub import check_target, named_target

    target = named_target(push_to_hub, private=private, tag=tag)
    if target is None and out is None:
        raise UserError(
            "there is nothing to do: give --out DIR, the directory to write, or --push-to-hub USER/REPO to publish a run as it is"
        )
    if out is None and (form, dtype, with_code, split_qkv, tokenizer) != (
        "normfree",
        "float32",
        False,
        False,
        None,
    ):
        raise UserError("a run is published as it was exported; for another form, give --out DIR too")
    if target is not None:
        check_target(target)
    done = []
    if out is not None:
        from ln_removal.export.write import export_model

        difference = export_model(
            source, out, form=form, dtype=dtype, tokenizer=tokenizer, with_code=with_code, split_qkv=split_qkv
        )
        done.append(f"{form} model: {out}   largest relative difference of the logits: {difference:.1e}")
    try:
        if target is not None:
            done.append(_publish(source, out, target, form).line)
    finally:
        for line in done:
            typer.echo(line)


def _publish(source: str, out: Path | None, target: HubTarget, form: Literal["normfree", "stock"]) -> Published:
    """Publish the model that was written to `out`, or else the run as it is."""
    from ln_removal.pipelines.publishing import publish_export, publish_run

    if out is None:
        return publish_run(Path(source), target, progress=sys.stderr.isatty())
    return publish_export(out, source, target, form=form, progress=sys.stderr.isatty())


app = console.build(export)


def main() -> None:
    """Entry point of `ln-export`."""
    app()


if __name__ == "__main__":
    main()
