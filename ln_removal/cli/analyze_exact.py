"""`ln-analyze dla`, `paths` and `circuits`: what is exact without LayerNorm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ln_removal.cli.analysis import BosOption, DocumentsOption, Found, LengthOption, Request, named, on_run

if TYPE_CHECKING:
    from ln_removal.interpret.attribution import Direction

DirectionOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="Any of correct, difference, centred, with commas; what of the logits is explained."
    ),
]
OneDirectionOption = Annotated[
    Literal["correct", "difference", "centred"], typer.Option(help="What of the logits is explained.")
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        metavar="LAYER_HEAD",
        help="Whose raised tokens are listed, such as L1H0. Default: the one with the largest copying score.",
        show_default=False,
    ),
]


@on_run
def dla(
    request: Request,
    direction: DirectionOption = "correct,difference,centred",
    documents: DocumentsOption = 32,
    length: LengthOption = 128,
    bos: BosOption = False,
) -> Found:
    """Direct logit attribution against ablation. Shows how far the two differ for heads and MLPs.

    The error is mean |attribution - ablation| over mean |ablation|, in per cent. It is 0 without LayerNorm, up to rounding.
    With LayerNorm, ablation also changes the scale of the rest, which the attribution takes as constant.

    \b
    Examples:
      ln-analyze dla checkpoints/demo
      ln-analyze dla checkpoints/demo --direction centred --documents 64 --bos --json
    """
    from ln_removal.interpret.attribution import direct_effects_of_run
    from ln_removal.report.exact_analyses import dla_charts, dla_tables

    chosen = _directions(direction)
    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = direct_effects_of_run(models, text, chosen, progress=request.progress)
    return Found(found, dla_tables(found), dla_charts(found))


@on_run
def paths(
    request: Request,
    direction: OneDirectionOption = "centred",
    documents: DocumentsOption = 8,
    length: LengthOption = 128,
    bos: BosOption = False,
) -> Found:
    """Path expansion. Splits a logit by source and by the number of heads passed, and names the largest single paths.

    Given the attention patterns, the logits are a sum over all paths from an embedding, an MLP or a bias through heads. The sum
    is exact for all three models; that a path's contribution is what its removal changes holds without LayerNorm only.

    \b
    Examples:
      ln-analyze paths checkpoints/demo
      ln-analyze paths checkpoints/demo --direction difference --documents 16
    """
    from ln_removal.interpret.paths import paths_of_run
    from ln_removal.report.exact_analyses import paths_charts, paths_tables

    (chosen,) = _directions(direction)
    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = paths_of_run(models, text, chosen, progress=request.progress)
    return Found(found, paths_tables(found), paths_charts(found))


@on_run
def circuits(
    request: Request,
    head: HeadOption = None,
    documents: DocumentsOption = 2,
    length: LengthOption = 128,
    bos: BosOption = False,
) -> Found:
    """Circuits from weights. Shows which heads copy, how heads compose, and which pairs of sources make their patterns.

    Copying, matching and composition scores need the weights alone. Attention scores are split into exact terms by what the
    query and the key read, on a few documents.

    \b
    Examples:
      ln-analyze circuits checkpoints/demo
      ln-analyze circuits checkpoints/demo --head L5H2
    """
    from ln_removal.interpret.circuits import circuits_of_run
    from ln_removal.report.exact_analyses import circuits_charts, circuits_tables

    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = circuits_of_run(models, text, head=head, progress=request.progress)
    return Found(found, circuits_tables(found), circuits_charts(found))


def _directions(direction: str) -> list[Direction]:
    """The directions that an option names.

    Raises:
        UserError: there is no such direction.
    """
    from ln_removal.interpret.attribution import DIRECTIONS

    asked = named("--direction", direction, DIRECTIONS)
    return [name for name in DIRECTIONS if name in asked]
