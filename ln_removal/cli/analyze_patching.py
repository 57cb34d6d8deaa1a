"""`ln-analyze patching`: which activations carry a task, and how far estimates by gradients are off."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ln_removal.cli.analysis import BosOption, Found, Request, named, on_run
from ln_removal.errors import UserError

if TYPE_CHECKING:
    from ln_removal.interpret.models import Models
    from ln_removal.interpret.tasks import Task

TaskOption = Annotated[
    str,
    typer.Option(
        metavar="NAME|FILE",
        help="brackets, repeat, quotes, self (models of Python), ioi, greater-than (GPT-2), or a jsonl file of your own: clean, "
        "corrupt, answer, wrong.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        metavar="NAMES", help="Any of atp, atp-star, eap-ig, with commas; exact patches only and estimates nothing."
    ),
]
PromptsOption = Annotated[int, typer.Option(min=1, help="How many prompts are drawn. A file's prompts are all read.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Runs of integrated gradients (eap-ig).")]
BudgetOption = Annotated[
    bool, typer.Option("--budget/--no-budget", help="Also measure which nonlinearity the errors come from.")
]


@on_run
def patching(
    request: Request,
    task: TaskOption = "brackets",
    method: MethodOption = "atp,atp-star,eap-ig",
    prompts: PromptsOption = 16,
    bos: BosOption = False,
    ig_steps: StepsOption = 5,
    budget: BudgetOption = True,
) -> Found:
    """Activation patching and its estimates. Shows which activations carry a task, and where the errors of estimates come from.

    Activations of a clean run are put into a corrupt run, one after the other (exact). Estimates replace these runs by gradients;
    their error is mean |estimate - exact| over mean |exact|. The error budget keeps one nonlinearity (norm, softmax,
    activation) and replaces the others by their tangents.

    \b
    Examples:
      ln-analyze patching checkpoints/demo
      ln-analyze patching checkpoints/demo --task repeat --method atp --prompts 32 --bos
      ln-analyze patching checkpoints/demo --task my_prompts.jsonl --method exact --json
    """
    from ln_removal.interpret.patching import METHODS, patching_of_run
    from ln_removal.report.patching import patching_charts, patching_tables

    asked = named("--method", method, (*METHODS, "exact"))
    chosen = [name for name in METHODS if name in asked]
    check_task(task)
    models = request.load()
    asks = task_of(request, models, task, prompts, bos=bos)
    found = patching_of_run(
        models,
        asks,
        chosen,
        ig_steps=ig_steps,
        budget=budget and bool(chosen),
        seed=request.seed,
        progress=request.progress,
    )
    return Found(found, patching_tables(found), patching_charts(found))


def check_task(task: str) -> None:
    """Before models are loaded.

    Raises:
        UserError: there is neither such a task nor such a file.
    """
    from ln_removal.interpret.tasks import PAIRED

    if not Path(task).is_file() and task not in PAIRED:
        raise UserError(
            f"--task {task}: choose from {', '.join(PAIRED)}, or name a jsonl file of prompts; there is no such file"
        )


def task_of(request: Request, models: Models, task: str, prompts: int, *, bos: bool) -> Task:
    """The prompts that --task names: a user's file, or so many prompts of a task.

    Raises:
        UserError: there is no tokenizer, the file cannot be read, or the task has no prompts for the tokenizer.
    """
    from ln_removal.interpret.tasks import make_task, read_task

    if models.tokenizer is None:
        raise UserError(f"{request.run} has no tokenizer to make prompts with")
    if Path(task).is_file():
        return read_task(task, models.tokenizer, prepend_bos=bos)
    return make_task(task, models.tokenizer, count=prompts, prepend_bos=bos, seed=request.seed)
