"""`ln-analyze dla`, `paths` and `circuits`: what is exact without LayerNorm."""

from __future__ import annotations

from typing import Annotated

import typer

from ln_removal.cli.analysis import BosOption, DocumentsOption, Found, LengthOption, Request, on_run
from ln_removal.errors import UserError

DirectionOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="Any of correct, difference, centred, with commas; what of the logits is explained."
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
    from ln_removal.interpret.attribution import DIRECTIONS, direct_effects_of_run
    from ln_removal.report.exact_analyses import dla_charts, dla_tables

    asked = [name.strip() for name in direction.split(",") if name.strip()]
    unknown = [name for name in asked if name not in DIRECTIONS]
    if unknown or not asked:
        raise UserError(f"--direction {direction}: choose from {', '.join(DIRECTIONS)}, with commas between them")
    chosen = [name for name in DIRECTIONS if name in asked]
    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = direct_effects_of_run(models, text, chosen, progress=request.progress)
    return Found(found, dla_tables(found), dla_charts(found))
