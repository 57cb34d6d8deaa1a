"""`evaluate-hellaswag`: four-way multiple choice for one model or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ln_removal.commands import console


def evaluate_hellaswag(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL", help="tiny, a directory, or a Hub id such as gpt2.", show_default=False),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Questions: the official jsonl or the six-line text form, plain, .gz or .bz2; `hellaswag`, from the "
            "Hub; or `completions`, the Python set built from this machine's held-out modules. "
            "Default: completions for tiny and for --protocol code, else hellaswag.",
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        Literal["lm-eval", "nanogpt", "code"] | None,
        typer.Option(
            help="How endings are tokenised and compared. Default: code for completions, else lm-eval.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Answer only the first LIMIT questions.", show_default=False)
    ] = None,
    per_question: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write each question's scores and choices there, as JSON lines.", show_default=False
        ),
    ] = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Score models on HellaSwag, or on the Python completion set.

    acc compares the endings' summed log-probabilities; acc_norm divides them first: by characters (lm-eval), by tokens
    (nanogpt) or by bytes (code). A figure means nothing without its protocol.

    \b
    Examples:
      evaluate-hellaswag tiny checkpoints/demo/model --data completions
      evaluate-hellaswag gpt2 --data hellaswag_val.jsonl --protocol lm-eval --limit 1000
    """
    import json
    import sys

    from ln_removal.evaluation.scoring import COMPLETIONS, HELLASWAG, load_question_set
    from ln_removal.models import EMBEDDED_MODEL, load_config, load_model

    if data is None:
        data = COMPLETIONS if EMBEDDED_MODEL in models or protocol == "code" else HELLASWAG
    if per_question is not None:
        console.check_writable(per_question, "--per-question")
    place = console.pick_device(device)
    for name in models:  # a misspelt last name should not wait for the scores of the first
        load_config(name)
    question_set = load_question_set(data, protocol=protocol)

    from ln_removal.evaluation.hellaswag import evaluate_choices

    summaries: dict[str, dict[str, Any]] = {}
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(models):
        loaded = load_model(name, device=place)
        result = evaluate_choices(
            loaded.model,
            loaded.tokenizer,
            question_set.questions,
            protocol=question_set.protocol,
            limit=limit,
            progress=name if sys.stderr.isatty() else False,
        )
        summaries[name] = result.summary()
        lines += [{"model": name, **score} for score in result.per_question_json()]
        del loaded
    if per_question is not None:
        per_question.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({"data": question_set.name, "device": place, "models": summaries}, indent=2))
    else:
        _print_table(summaries, question_set.name)


def _print_table(summaries: dict[str, dict[str, Any]], source: str) -> None:
    from rich.table import Table

    first = next(iter(summaries.values()))
    table = Table(
        title=f"{source}: {first['questions']:,} questions, protocol {first['protocol']}", title_justify="left"
    )
    table.add_column("model", overflow="fold")
    for column in ("acc", "acc_norm"):
        table.add_column(f"{column} (%)", justify="right")
    for name, summary in summaries.items():
        table.add_row(name, *(_percent(summary[key], summary[f"{key}_standard_error"]) for key in ("acc", "acc_norm")))
    console.wide_console().print(table)


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


app = console.build(evaluate_hellaswag)


def main() -> None:
    """Entry point of `evaluate-hellaswag`."""
    app()
