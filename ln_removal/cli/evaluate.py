"""`ln-evaluate`: cross-entropy and accuracy of original, control and LN-free, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ln_removal.cli import console

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN|MODEL", help="A run of ln-remove, or one model: tiny, a directory, a Hub id.", show_default=False
    ),
]
TokensOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="DIR", help="Tokens from ln-prepare; may be repeated. Default: the run's own.", show_default=False
    ),
]
CorpusOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|PATH",
        help="Held-out text of a corpus (see ln-prepare --list), or text files; may be repeated.",
        show_default=False,
    ),
]
OriginalOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The model before, for comparison.", show_default=False)
]
ControlOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The vanilla control, for comparison.", show_default=False)
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens in a window. Default: the run's, else the model's positions, 2,048 at most.",
        show_default=False,
    ),
]
MaxTokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Score at most about this many tokens of each data set. Default: the run's limit on its own tokens, else all.",
        show_default=False,
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Let windows overlap: one begins every STRIDE tokens and scores its last STRIDE tokens. Default: the "
        "context, no overlap.",
        show_default=False,
    ),
]
WindowsOption = Annotated[
    Literal["stream", "document"] | None,
    typer.Option(
        help="Score windows of the text as one stream, or each document from its start: as the models were trained. "
        "Default: the run's, else stream.",
        show_default=False,
    ),
]
QuestionsOption = Annotated[
    str, typer.Option(metavar="none|completions|hellaswag|FILE", help="Also measure accuracy on these.")
]
StressTextOption = Annotated[
    bool,
    typer.Option(
        "--odd-text",
        help="Also score form feeds, tabs, white space, repeated and random tokens, without and with BOS in front.",
    ),
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="Let each model continue this text, side by side; may be repeated.", show_default=False
    ),
]
SeedOption = Annotated[
    int, typer.Option(min=0, help="Seed of the bootstrap intervals, the odd text and the continuations.")
]
OutOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the results there as JSON.", show_default=False)
]


def evaluate(
    source: SourceArgument,
    tokens: TokensOption = None,
    corpus: CorpusOption = None,
    original: OriginalOption = None,
    control: ControlOption = None,
    context: ContextOption = None,
    max_tokens: MaxTokensOption = None,
    stride: StrideOption = None,
    windows: WindowsOption = None,
    questions: QuestionsOption = "none",
    stress_text: StressTextOption = False,
    prompt: PromptOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
    version: console.VersionOption = False,
) -> None:
    """Score a run's models, or any models, on held-out tokens.

    A model inside a run (DIR/model) takes tokens, context, limit and windows from that run. Besides the mean: percentiles, the
    worst windows, calibration, loss by position and on prompts, and differences with 95 % paired bootstrap intervals. Before
    ln-report, write them to RUN/results.json with --out.

    \b
    Examples:
      ln-evaluate checkpoints/demo
      ln-evaluate checkpoints/demo/model --json
      ln-evaluate checkpoints/gpt2/model --original gpt2 --tokens data/the-pile --questions hellaswag
      ln-evaluate checkpoints/gpt2 --corpus wikitext --corpus notes.txt --max-tokens 1000000
      ln-evaluate checkpoints/demo --odd-text --prompt "def read_lines(path):"
    """
    console.check_writable(out, "--out")
    place = console.pick_device(device)
    from ln_removal.evaluation import results as results_file
    from ln_removal.evaluation.hellaswag import load_question_set
    from ln_removal.evaluation.scoring import STRESS_SEQUENCES, ScoringOptions, score, scoring_inputs

    limits = {"context": context, "max_tokens": max_tokens}
    with scoring_inputs(
        source, tokens or (), corpus or (), original=original, control=control, windows=windows, **limits
    ) as inputs:
        options = ScoringOptions(
            stride=stride,
            questions=None if questions == "none" else load_question_set(questions),
            stress_sequences=STRESS_SEQUENCES if stress_text else 0,
            prompts=prompt or (),
            seed=seed,
            device=place,
            progress=sys.stderr.isatty(),
        )
        results = score(inputs, options)
    if out is not None:
        results_file.write(results, out)
    console.print_results(results, as_json=as_json)


app = console.build(evaluate)


def main() -> None:
    """Entry point of `ln-evaluate`."""
    app()


if __name__ == "__main__":
    main()
