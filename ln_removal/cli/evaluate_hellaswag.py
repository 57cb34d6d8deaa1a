"""`evaluate-hellaswag`: four-way multiple choice for one model or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ln_removal.cli import console


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
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap that compares several models.")] = 0,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Score models on HellaSwag, or on the Python completion set.

    acc compares the endings' summed log-probabilities; acc_norm divides them first: by characters (lm-eval), by tokens
    (nanogpt) or by bytes (code). A figure means nothing without its protocol.

    Every model after the first is compared with the first, question by question: the difference of the accuracies with a
    95 % paired bootstrap interval, and the exact McNemar test of whether both are equally good.

    \b
    Examples:
      evaluate-hellaswag tiny checkpoints/demo/model --data completions
      evaluate-hellaswag gpt2 checkpoints/gpt2/control/model checkpoints/gpt2/model --protocol nanogpt
      evaluate-hellaswag gpt2 --data hellaswag_val.jsonl --protocol lm-eval --limit 1000
    """
    import json
    import sys

    from ln_removal.evaluation.scoring import COMPLETIONS, HELLASWAG, load_question_set
    from ln_removal.models.loading import EMBEDDED_MODEL, load_config, load_model

    if data is None:
        data = COMPLETIONS if EMBEDDED_MODEL in models or protocol == "code" else HELLASWAG
    if per_question is not None:
        console.check_writable(per_question, "--per-question")
    place = console.pick_device(device)
    for name in models:  # a misspelt last name should not wait for the scores of the first
        load_config(name)
    question_set = load_question_set(data, protocol=protocol)

    from ln_removal.evaluation.hellaswag import ChoiceResult, compare_choices, evaluate_choices

    results: dict[str, ChoiceResult] = {}
    lines: list[dict[str, Any]] = []
    for name in dict.fromkeys(models):
        loaded = load_model(name, device=place)
        results[name] = evaluate_choices(
            loaded.model,
            loaded.tokenizer,
            question_set.questions,
            protocol=question_set.protocol,
            limit=limit,
            progress=name if sys.stderr.isatty() else False,
        )
        lines += [{"model": name, **score} for score in results[name].per_question_json()]
        del loaded
    summaries = {name: result.summary() for name, result in results.items()}
    first, *others = results
    comparisons = [
        {"first": first, "second": name, **compare_choices(results[first], results[name], seed=seed)} for name in others
    ]
    if per_question is not None:
        per_question.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if as_json:
        found = {"data": question_set.name, "device": place, "models": summaries, "comparisons": comparisons}
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_tables(summaries, comparisons, question_set.name)


def _print_tables(summaries: dict[str, dict[str, Any]], comparisons: list[dict[str, Any]], source: str) -> None:
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
    wide = console.wide_console()
    wide.print(table)
    if not comparisons:
        return
    paired = Table(title=f"difference to {comparisons[0]['first']}, in points", title_justify="left")
    paired.add_column("model", overflow="fold")
    for column in ("rule", "difference", "95 % interval", "only it right", "only the first right", "McNemar p"):
        paired.add_column(column, justify="right")
    for comparison in comparisons:
        for rule in ("acc", "acc_norm"):
            one = comparison[rule]
            paired.add_row(
                comparison["second"],
                rule,
                f"{100 * one['difference']:+.2f}",
                f"{100 * one['low']:+.2f} to {100 * one['high']:+.2f}",
                f"{one['only_second']:,}",
                f"{one['only_first']:,}",
                f"{one['p_value']:.3g}",
            )
    wide.print(paired)


def _percent(share: float, error: float | None) -> str:
    return f"{100 * share:.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


app = console.build(evaluate_hellaswag)


def main() -> None:
    """Entry point of `evaluate-hellaswag`."""
    app()


if __name__ == "__main__":
    main()
