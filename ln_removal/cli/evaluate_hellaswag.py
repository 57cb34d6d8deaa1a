"""`evaluate-hellaswag`: four-way multiple choice for one model or several."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ln_removal.cli import console

ModelsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL",
        help="Any causal language model: tiny, a directory, or a Hub id such as gpt2.",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Questions: the official jsonl or the six-line text form, plain, .gz or .bz2; `hellaswag`, from the "
        "Hub; or `completions`, the Python set built from this machine's held-out modules. "
        "Default: completions for tiny and for --protocol code, else hellaswag.",
        show_default=False,
    ),
]
ProtocolOption = Annotated[
    Literal["lm-eval", "nanogpt", "code"] | None,
    typer.Option(
        help="How endings are tokenised and compared. Default: code for completions, else lm-eval.", show_default=False
    ),
]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Answer only the first LIMIT questions.", show_default=False)
]
PerQuestionOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write each question's scores and choices there, as JSON lines.", show_default=False
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the bootstrap that compares several models.")]


def evaluate_hellaswag(
    models: ModelsArgument,
    data: DataOption = None,
    protocol: ProtocolOption = None,
    limit: LimitOption = None,
    per_question: PerQuestionOption = None,
    seed: SeedOption = 0,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Score models on HellaSwag, or on the Python completion set.

    acc compares the endings' summed log-probabilities; acc_norm divides them first: by characters (lm-eval), by tokens
    (nanogpt) or by bytes (code). Scores under different protocols cannot be compared.

    Every model after the first is compared with the first, question by question: the difference of the accuracies with a
    95 % paired bootstrap interval, and the exact McNemar test of whether both are equally good.

    \b
    Examples:
      evaluate-hellaswag tiny checkpoints/demo/model --data completions
      evaluate-hellaswag gpt2 checkpoints/gpt2/control/model checkpoints/gpt2/model --protocol nanogpt
      evaluate-hellaswag gpt2 --data hellaswag_val.jsonl --protocol lm-eval --limit 1000
    """
    console.check_writable(per_question, "--per-question")
    place = console.pick_device(device)

    from ln_removal.evaluation.hellaswag import COMPLETIONS, HELLASWAG, load_question_set, score_models
    from ln_removal.models.loading import EMBEDDED_MODEL, load_config

    if data is None:
        data = COMPLETIONS if EMBEDDED_MODEL in models or protocol == "code" else HELLASWAG
    for name in models:  # a mistake in the last name is found before the first model is scored
        load_config(name)
    questions = load_question_set(data, protocol=protocol)
    found = score_models(models, questions, limit=limit, seed=seed, device=place, progress=sys.stderr.isatty())
    if per_question is not None:
        lines = (json.dumps(line) + "\n" for line in found.per_question_json())
        per_question.write_text("".join(lines), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    from ln_removal.report.tables import question_tables

    for table in question_tables(found):
        console.wide_console().print(table)


app = console.build(evaluate_hellaswag)


def main() -> None:
    """Entry point of `evaluate-hellaswag`."""
    app()


if __name__ == "__main__":
    main()
