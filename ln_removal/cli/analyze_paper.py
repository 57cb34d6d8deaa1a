"""`ln-analyze paper`: the table of the published comparison for a run, and a page of it."""

from __future__ import annotations

from functools import partial

from ln_removal.cli.analysis import DocumentsOption, Found, LengthOption, Request, on_run
from ln_removal.cli.analyze_inside import AblatedOption, PromptsOption, TaskPromptsOption
from ln_removal.cli.analyze_patching import TaskOption, check_task, task_of


@on_run
def paper(
    request: Request,
    task: TaskOption = "repeat",
    documents: DocumentsOption = 32,
    length: LengthOption = 128,
    prompts: PromptsOption = 64,
    task_prompts: TaskPromptsOption = 16,
    ablated: AblatedOption = 768,
) -> Found:
    """The figures of the published comparison for this run, with 95 % intervals. Writes interpret.json and paper.html.

    The table has the errors of direct effects and attribution patching, sink rates, calibration, entropy neurons, and the
    losses at document starts and of repeated random tokens. The published values stand beside them. The report of the run
    links paper.html: call ln-report afterwards. On a GPT-2 without a GPU, fewer --ablated neurons save most of the time.

    \b
    Examples:
      ln-analyze paper checkpoints/demo && ln-report checkpoints/demo
      ln-analyze paper checkpoints/gpt2 --task ioi --device cuda
    """
    from ln_removal.interpret.paper import paper_of_run
    from ln_removal.report.paper import paper_charts, paper_page, paper_tables

    check_task(task)
    models = request.load()
    asks = task_of(request, models, task, task_prompts, bos=False)
    text = request.documents(models, documents, min(length, int(models.any.cfg.n_ctx) - 1), bos=False)
    found = paper_of_run(models, text, asks, prompts=prompts, ablated=ablated, progress=request.progress)
    page = partial(paper_page, found, request.run)
    return Found(found, paper_tables(found), paper_charts(found), file="interpret.json", page=page)
