"""Tables, lines and grids of the logit lens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ln_removal.interpret.lens import LayerPredictions
from ln_removal.interpret.models import TITLES
from ln_removal.interpret.passes import ByModel
from ln_removal.report import plots
from ln_removal.report.side_by_side import COLOURS, banded, fixed, header, scaled, text_note
from ln_removal.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table
    from transformers import PreTrainedTokenizerBase

POSITIONS = 14
"""Positions in a grid."""

MOST_LAYERS = 14
"""Layers in a grid; of more, some are shown, spread evenly."""

LETTERS = 8
"""Letters of a token that are written into a cell."""

CELL = (0.62, 0.21)
"""Width and height of a cell in inches."""


def lens_tables(found: ByModel[LayerPredictions]) -> list[Table]:
    """KL to the output, loss, median rank of the right token and how often it is first, by layer, a column a model."""
    seed, models = found.documents.seed, list(found.results.values())
    notes = [text_note(found.documents)]
    tables = []
    for title, cells in (
        (
            "KL(output || layer) (nats)",
            [[fixed(x, 2) for x in one.mean_divergence(seed=seed)] for one in models],
        ),
        (
            "loss of the layer's prediction (nats)",
            [[fixed(x, 2) for x in one.mean_loss(seed=seed)] for one in models],
        ),
        (
            "right token first (%)",
            [[fixed(scaled(x, 100), 1) for x in one.right_first(seed=seed)] for one in models],
        ),
        ("median rank of the right token (0 is the first)", [[f"{x:g}" for x in one.median_rank] for one in models]),
    ):
        rows = [[name, *column] for name, *column in zip(models[0].layers, *cells, strict=True)]
        tables.append(text_table(f"logit lens: {title}", header(found.results, "layer"), rows, notes))
        notes = []
    return tables


def lens_charts(
    found: ByModel[LayerPredictions], tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Callable[[], Figure]]:
    """Lines of KL and rank by layer, and the likeliest tokens of each layer at some positions of the first document."""
    return {"lens-layers": lambda: layer_lines(found), "lens-grid": lambda: token_grid(found, tokenizer)}


def layer_lines(found: ByModel[LayerPredictions]) -> Figure:
    """KL to the output, and the rank of the right token, by layer, a line a model."""
    figure, axes = plots.panels(["distance from the output", "rank of the right token"], (3.1, 2.3), share=False)
    seed = found.documents.seed
    for role, one in found.results.items():
        x = list(range(len(one.layers)))
        banded(axes[0], x, one.mean_divergence(seed=seed), COLOURS[role], TITLES[role])
        axes[1].plot(x, 1 + one.median_rank, color=COLOURS[role], label=TITLES[role], marker="o", markersize=2.5)
    axes[0].set_ylabel("KL(output || layer) (nats)")
    axes[1].set_ylabel("1 + median rank")
    axes[1].set_yscale("log")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    for panel in axes:
        panel.set_xlabel("blocks passed")
        panel.set_xticks(plots.whole_ticks(len(x), 8))
        panel.grid(axis="y")
    plots.note(
        figure, "The unembedding reads the residual stream behind each block. Band: 95 % intervals over documents."
    )
    return figure


def token_grid(found: ByModel[LayerPredictions], tokenizer: PreTrainedTokenizerBase | None) -> Figure:
    """The likeliest token of each layer at the last positions of the first document, models below one another.

    A cell is coloured by the probability of its token, and in bold if it is the right next token.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    roles = list(found.results)
    text = found.documents.tokens[0]
    first = max(0, len(text) - 1 - POSITIONS)
    places = np.arange(first, len(text) - 1)
    layers = found.results[roles[0]].layers
    shown = np.unique(np.linspace(0, len(layers) - 1, min(len(layers), MOST_LAYERS)).round().astype(int))
    width, height = CELL[0] * len(places) + 1.8, (CELL[1] * len(shown) + 0.75) * len(roles) + 0.4
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(roles), 1, squeeze=False)[:, 0]
    for panel, role in zip(axes, roles, strict=True):
        one = found.results[role]
        probability = one.top_probability[shown, 0][:, places]
        image = panel.imshow(
            probability, cmap=plots.colour_map(), vmin=0, vmax=1, interpolation="nearest", aspect="auto", origin="lower"
        )
        for (row, column), value in np.ndenumerate(probability):
            token = int(one.top_tokens[shown[row], 0, places[column], 0])
            panel.text(
                column, row, shown_token(tokenizer, token), ha="center", va="center", fontsize=6.5, parse_math=False,
                color=plots.TEXT if value > 0.6 else "#ffffff",
                fontweight="bold" if token == text[places[column] + 1] else "normal",
            )  # fmt: skip
        panel.set_title(TITLES[role], loc="left")
        panel.set_yticks(range(len(shown)), [layers[place] for place in shown])
        _token_ticks(panel, [shown_token(tokenizer, int(text[place])) for place in places])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    plots.colour_bar(figure, list(axes), image, "probability of the token")
    plots.note(
        figure,
        f"The likeliest token of each layer at positions {first} to {len(text) - 2} of the first of the "
        f"{found.documents.unit}. Below each panel: the text that was read up to there; its next token is in the next column. "
        "Bold: the right next token.",
    )
    return figure


def shown_token(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """A token as a few visible letters: spaces and line breaks have signs; without a tokenizer it is its id."""
    if tokenizer is None:
        return str(token)
    text = str(tokenizer.decode([token])).replace("\n", "↵").replace("\t", "→").replace(" ", "·")
    visible = "".join(letter if letter.isprintable() and ord(letter) < 0x3000 else "□" for letter in text)
    return visible if len(visible) <= LETTERS else visible[: LETTERS - 1] + "…"


def _token_ticks(panel: Any, names: Sequence[str]) -> None:
    labels = panel.set_xticks(range(len(names)), names)
    for label in labels:
        label.label1.set_parse_math(False)
        label.label1.set_fontsize(6.5)
