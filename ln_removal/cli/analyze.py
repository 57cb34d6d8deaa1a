"""`ln-analyze`: attention entropy, NaN and learnable slopes of runs and models, as figures and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ln_removal.cli import analysis, console
from ln_removal.cli.analyze_exact import circuits, dla, paths
from ln_removal.cli.analyze_inside import attention, behaviour, lens, neurons, residual
from ln_removal.cli.analyze_paper import paper
from ln_removal.cli.analyze_patching import patching

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure
    from rich.table import Table

RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="Runs trained with observation.every, or directories of them.", show_default=False
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the figures go. Default: RUN/analysis, or ./analysis for several.",
        show_default=False,
    ),
]


SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN|MODEL...",
        help="Runs trained with observation.every, or directories of them; with --tokens or --text also models: tiny, a "
        "directory, a Hub id.",
        show_default=False,
    ),
]
StepOption = Annotated[
    int | None, typer.Option(min=0, help="The observation to show. Default: a run's last.", show_default=False)
]
TokensOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Measure models on these tokens from ln-prepare.", show_default=False)
]
TextOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Measure models on this text.", show_default=False)
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens in a measured sequence. Default: the shortest context of the models, at most 1024.",
        show_default=False,
    ),
]


def entropy(
    sources: SourcesArgument,
    out: OutOption = None,
    step: StepOption = None,
    tokens: TokensOption = None,
    text: TextOption = None,
    context: ContextOption = None,
    device: console.DeviceOption = "auto",
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Attention entropy of every head. Draws heatmaps, layers over the steps, and the heads that attend almost uniformly.

    The entropy is that of a row of the attention matrix, in nats, averaged over sequences and queries. A causal head that
    attends uniformly to all of its keys has an entropy of log(T!)/T; heads above 0.9 of that are in the overload band.

    \b
    Examples:
      ln-analyze entropy checkpoints/normfree
      ln-analyze entropy checkpoints/normfree-table --out figures --step 1000
      ln-analyze entropy tiny checkpoints/demo/model --tokens checkpoints/demo/tokens
      ln-analyze entropy gpt2 schaeff/gpt2-small_LNFree300 --text notes.txt --context 256
    """
    from ln_removal.interpret.entropies import heads_of, output_directory
    from ln_removal.report import analysis_tables, plots

    place = console.pick_device(device) if tokens is not None or text is not None else "cpu"
    found = heads_of(sources, step=step, tokens=tokens, text=text, context=context, device=place)
    charts: dict[str, Callable[[], Figure]] = {
        "entropy-heads": lambda: plots.head_heatmap(found.heads),
        "entropy-overload": lambda: plots.overload_shares(found.heads),
    }
    if found.runs:
        charts["entropy-layers"] = lambda: plots.layers_over_steps(found.runs)
    figures = analysis.draw(charts, output_directory(out, sources))
    if as_json:
        _print_json(analysis_tables.entropy_json(found.heads, found.runs), figures)
        return
    screen = console.wide_console()
    for table in analysis_tables.entropy_tables(found.heads):
        screen.print(table)
    analysis.print_figures(figures)


def nans(
    runs: RunsArgument,
    out: OutOption = None,
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
) -> None:
    """NaN and infinity by layer and step. Shows where and when a training met them, and the norms before that.

    \b
    Examples:
      ln-analyze nans checkpoints/unstable
    """
    from ln_removal.interpret.entropies import output_directory, runs_of
    from ln_removal.report import analysis_tables, plots

    found = runs_of(runs)
    figures = analysis.draw(
        {
            "nans": lambda: plots.nan_counts(found),
            "residual-norms": lambda: plots.norms_over_steps(found),
            "gradient-norms": lambda: plots.gradients_over_steps(found),
        },
        output_directory(out, runs),
    )
    if as_json:
        _print_json(analysis_tables.nan_json(found), figures)
        return
    for line in analysis_tables.nan_lines(found):
        typer.echo(line)
    analysis.print_figures(figures)


def training(
    runs: RunsArgument,
    out: OutOption = None,
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Entropy, stream and gradients of several runs over the steps, in one figure with a row for each run.

    \b
    Examples:
      ln-analyze training checkpoints/ladder/*-seed0 --out figures
    """
    from ln_removal.interpret.entropies import output_directory, runs_of
    from ln_removal.report import analysis_tables, plots

    found = runs_of(runs)
    figures = analysis.draw({"training": lambda: plots.training_over_steps(found)}, output_directory(out, runs))
    if as_json:
        _print_json(analysis_tables.training_json(found), figures)
    else:
        _print_table(analysis_tables.training_table(found), figures)


def slopes(
    runs: RunsArgument,
    out: OutOption = None,
    as_json: console.JsonOption = False,
    debug: console.DebugOption = False,
) -> None:
    """Learnable slopes over the steps. Shows how the slopes of leaky ReLUs change during training; a slope of 0 is ReLU.

    \b
    Examples:
      ln-analyze slopes checkpoints/learnable-slopes
    """
    from ln_removal.interpret.entropies import output_directory, runs_of
    from ln_removal.report import analysis_tables, plots

    found = analysis_tables.with_slopes(runs_of(runs))
    figures = analysis.draw({"slopes": lambda: plots.slopes_over_steps(found)}, output_directory(out, runs))
    if as_json:
        _print_json(analysis_tables.slope_json(found), figures)
    else:
        _print_table(analysis_tables.slope_table(found), figures)


def _print_json(found: list[dict[str, Any]], figures: list[Path]) -> None:
    typer.echo(json.dumps({"runs": found, "figures": [str(path) for path in figures]}, indent=2, allow_nan=False))


def _print_table(table: Table, figures: list[Path]) -> None:
    console.wide_console().print(table)
    analysis.print_figures(figures)


HELP = """Look into models and their training. Original, control and LN-free model of a run are shown side by side.

Figures are written as PNG and PDF; tables go to the screen, or everything as JSON with --json.

\b
Examples:
  ln-analyze entropy checkpoints/normfree-table
  ln-analyze entropy tiny checkpoints/demo/model --tokens checkpoints/demo/tokens
  ln-analyze nans checkpoints/unstable --json
  ln-analyze dla checkpoints/demo
  ln-analyze patching checkpoints/demo --task repeat
  ln-analyze attention checkpoints/demo
"""

app = console.build_group(
    HELP,
    entropy=entropy,
    nans=nans,
    training=training,
    slopes=slopes,
    dla=dla,
    paths=paths,
    circuits=circuits,
    patching=patching,
    attention=attention,
    residual=residual,
    neurons=neurons,
    lens=lens,
    behaviour=behaviour,
    paper=paper,
)


def main() -> None:
    """Entry point of `ln-analyze`."""
    app()


if __name__ == "__main__":
    main()
