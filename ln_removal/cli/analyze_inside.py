"""`ln-analyze attention`, `residual`, `neurons`, `lens` and `behaviour`: what removal changes inside a model."""

from __future__ import annotations

from typing import Annotated

import typer

from ln_removal.cli.analysis import BosOption, DocumentsOption, Found, LengthOption, Request, named, on_run

CopiesOption = Annotated[int, typer.Option(min=1, help="How many sequences of random tokens are given twice.")]
AblatedOption = Annotated[
    int, typer.Option(metavar="K", min=1, help="How many neurons of the last block are ablated, one at a time.")
]
TopOption = Annotated[int, typer.Option(min=1, help="How many of the likeliest tokens of a layer are kept.")]

TaskOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        help="Any of brackets, repeat, quotes, self, return, with, ioi, greater-than, with commas; all that the tokenizer has "
        "prompts for; or none.",
    ),
]
PromptsOption = Annotated[int, typer.Option(min=1, help="How many prompts of a kind are scored, at most.")]
TaskPromptsOption = Annotated[int, typer.Option(min=1, help="How many prompts of a task are drawn.")]


@on_run
def attention(
    request: Request,
    documents: DocumentsOption = 32,
    length: LengthOption = 128,
    bos: BosOption = False,
    copies: CopiesOption = 32,
) -> Found:
    """Attention sinks, entropy, and previous-token, duplicate-token and induction heads. Draws heatmaps of the models.

    A query sinks if it gives position 0 more than 0.3 of its attention. The published rate counts all queries, although the
    first three sink in a uniform head, too; the second rate leaves them out. The third is the share of heads whose mean
    attention on position 0 is above 0.3.

    \b
    Examples:
      ln-analyze attention checkpoints/demo
      ln-analyze attention checkpoints/demo --length 256 --bos --json
    """
    from ln_removal.interpret.heads import head_scores_of_run
    from ln_removal.report.heads import head_charts, head_tables

    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = head_scores_of_run(models, text, copies=copies, progress=request.progress)
    return Found(found, head_tables(found), head_charts(found))


@on_run
def residual(
    request: Request, documents: DocumentsOption = 32, length: LengthOption = 128, bos: BosOption = False
) -> Found:
    """The shape of the residual stream: L2 norm, largest over median coordinate, cosine to its mean, effective rank.

    Each is measured before every block, between attention and MLP, and behind the last block, for position 0, end-of-text
    tokens and ordinary positions. A text is two documents with an end-of-text token between them.

    \b
    Examples:
      ln-analyze residual checkpoints/demo
      ln-analyze residual checkpoints/demo --documents 64 --bos
    """
    from ln_removal.interpret.streams import residual_shape_of_run
    from ln_removal.report.streams import residual_charts, residual_tables

    models = request.load()
    half = (int(models.any.cfg.n_ctx) - 1) // 2
    text = request.documents(models, documents, min(length, half), bos=bos)
    found = residual_shape_of_run(models, text, progress=request.progress)
    return Found(found, residual_tables(found), residual_charts(found))


@on_run
def neurons(
    request: Request,
    documents: DocumentsOption = 32,
    length: LengthOption = 128,
    bos: BosOption = False,
    ablated: AblatedOption = 128,
) -> Found:
    """Entropy neurons of the last block. Shows how much of their effect goes through the final norm.

    Each ablated neuron is set to its mean. The change of the prediction's entropy is taken with the final norm's scale of the
    changed residual stream, and with its scale frozen. The share mediated by the norm is 1 - |dH, frozen| / |dH|.

    \b
    Examples:
      ln-analyze neurons checkpoints/demo
      ln-analyze neurons checkpoints/demo --ablated 768 --documents 64
    """
    from ln_removal.interpret.neurons import neuron_effects_of_run
    from ln_removal.report.neurons import neuron_charts, neuron_tables

    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = neuron_effects_of_run(models, text, ablated=ablated, progress=request.progress)
    return Found(found, neuron_tables(found), neuron_charts(found))


@on_run
def lens(
    request: Request,
    documents: DocumentsOption = 32,
    length: LengthOption = 128,
    bos: BosOption = False,
    top: TopOption = 5,
) -> Found:
    """The logit lens. Shows what each layer would predict, how far that is from the output, and the right token's rank.

    The residual stream behind each block is read by the model's own final norm and unembedding (TransformerLens). The figure
    shows the likeliest tokens at some positions of the first document; the JSON file has them for all of it.

    \b
    Examples:
      ln-analyze lens checkpoints/demo
      ln-analyze lens checkpoints/demo --documents 8 --top 10 --seed 3
    """
    from ln_removal.interpret.lens import layer_predictions_of_run
    from ln_removal.report.lens import lens_charts, lens_tables

    models = request.load()
    text = request.documents(models, documents, length, bos=bos)
    found = layer_predictions_of_run(models, text, top=top, progress=request.progress)
    return Found(found, lens_tables(found), lens_charts(found, models.tokenizer))


@on_run
def behaviour(
    request: Request,
    task: TaskOption = "all",
    documents: DocumentsOption = 64,
    length: LengthOption = 128,
    prompts: PromptsOption = 64,
    task_prompts: TaskPromptsOption = 32,
) -> Found:
    """Calibration, loss at document starts and of repeated text, and tasks, each with and without BOS. Draws bars.

    BOS is the end-of-text token in front of a text, which TransformerLens puts there by default. The same tokens are scored
    with it and without it.

    \b
    Examples:
      ln-analyze behaviour checkpoints/demo
      ln-analyze behaviour checkpoints/demo --task brackets,self --task-prompts 100
    """
    from ln_removal.interpret.behaviour import behaviour_of_run, both_ways
    from ln_removal.interpret.tasks import TASKS
    from ln_removal.report.behaviour import behaviour_charts, behaviour_tables

    asked = named("--task", task, list(TASKS), alone=("all", "none"))
    models = request.load()
    chosen = None if asked == ["all"] else [] if asked == ["none"] else list(dict.fromkeys(asked))
    pairs = both_ways(models, chosen, count=task_prompts, seed=request.seed)
    text = request.documents(models, documents, min(length, int(models.any.cfg.n_ctx) - 1), bos=False)
    found = behaviour_of_run(models, text, pairs, prompts=prompts, progress=request.progress)
    left_out = [name for name in TASKS if name not in {one.name for one, _ in pairs}] if chosen is None else []
    return Found(found, behaviour_tables(found, left_out), behaviour_charts(found))
