"""README.md beside a saved model: what it is, how to load it, what was measured, how it was made, where it ends.

The front matter follows the Hugging Face Hub's model card metadata, so a directory can be uploaded as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ln_removal.evaluation.results import Results
    from ln_removal.recipe import Recipe

REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Where the Hub keeps the models that are usually named without an owner."""

TAGS = ["gpt2", "layernorm-free", "mechanistic-interpretability"]

_TITLES = {"original": "original", "control": "control", "ln_free": "LN-free"}


def write_model_card(directory: Path, recipe: Recipe, results: Results) -> None:
    """Write README.md for an LN-free model.

    Args:
        directory: of the saved model.
        recipe: the removal that made it.
        results: its scores, beside those of the original and of the control where there are any.

    Raises:
        UserError: the file cannot be written.
    """
    title = f"{_base_name(recipe.model)} without LayerNorm"
    front = _front_matter(
        title,
        base_model=_hub_id(recipe.model),
        datasets=_hub_datasets(recipe.data.corpus),
        tags=TAGS,
        measured=_measured(results, recipe),
    )
    sections = [
        f"# {title}\n\n{_about(recipe)}",
        f"## Use\n\n{_loading(recipe)}",
        f"## Scores\n\n{_scores(results)}",
        f"## How it was made\n\n{_making(recipe)}",
        f"## Limits\n\n{_limits(recipe)}",
    ]
    _write(directory, front, sections)


def write_base_model_card(
    directory: Path,
    recipe: Recipe,
    *,
    cross_entropy: float,
    bits_per_byte: float | None,
    validation_tokens: int,
) -> None:
    """Write README.md for a model that was pretrained from scratch, such as tiny-gpt2.

    Args:
        directory: of the saved model.
        recipe: the pretraining recipe.
        cross_entropy: on the validation split, nats per token.
        bits_per_byte: the same over the bytes of the text; None where the bytes are not known.
        validation_tokens: tokens of that split.

    Raises:
        UserError: the file cannot be written.
    """
    from ln_removal.planning import count_parameters
    from ln_removal.recipe import dump_toml

    shape = recipe.architecture
    assert shape is not None, "a pretraining recipe has an [architecture]"
    measured = _entries(
        {
            "cross_entropy": ("cross-entropy (nats per token)", cross_entropy),
            "bits_per_byte": ("bits per byte", bits_per_byte),
        },
        dataset=(_slug(recipe.data.corpus), f"{recipe.data.corpus}, validation split"),
    )
    front = _front_matter(
        recipe.name, base_model=None, datasets=_hub_datasets(recipe.data.corpus), tags=["gpt2"], measured=measured
    )
    rows = [
        ("parameters", f"{count_parameters(shape):,}"),
        ("layers, heads, width", f"{shape.n_layer}, {shape.n_head}, {shape.n_embd}"),
        ("context", f"{shape.n_positions} tokens"),
        ("vocabulary", f"{shape.vocab_size:,} entries"),
        ("trained on", f"{recipe.tokens:,} tokens"),
        ("weights", recipe.export.dtype),
        ("cross-entropy", f"{cross_entropy:.4f} nats per token on {validation_tokens:,} held-out tokens"),
    ]
    if bits_per_byte is not None:
        rows.append(("bits per byte", f"{bits_per_byte:.4f}"))
    about = [
        f"# {recipe.name}",
        recipe.description,
        "It is an ordinary GPT-2 with LayerNorm: the model that ln-removal removes LayerNorm from when no other is at "
        "hand (`ln-remove --model tiny`), small enough to do so on a laptop.",
    ]
    loading = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS-DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS-DIRECTORY")
```"""
    command = f"```\nln-pretrain --recipe {recipe.name}\n```"
    sections = [
        "\n\n".join(part for part in about if part),
        _table(("", ""), rows),
        f"## Use\n\n{loading}",
        f"## How it was made\n\n{command}\n\n```toml\n{dump_toml(recipe).strip()}\n```",
        "## Limits\n\nA model of this size writes code that looks like code and seldom works. It is for experiments on "
        "normalization, not for writing programs.",
    ]
    _write(directory, front, sections)


def _about(recipe: Recipe) -> str:
    return (
        f"{_base_name(recipe.model)}, fine-tuned until it needs no LayerNorm. Every norm was replaced, one after the "
        "other, by a constant scale, and the constants were folded into the weights behind them. Nothing in this model "
        "depends on a token's own statistics: what attention, MLPs and unembedding read is an affine function of the "
        "residual stream, so contributions to the logits add up exactly."
    )


def _loading(recipe: Recipe) -> str:
    parts = [
        "The model class comes with the Python package ln-removal; no remote code is run.",
        """\
```python
import ln_removal  # makes transformers know the class
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS-DIRECTORY")
tokenizer = AutoTokenizer.from_pretrained("THIS-DIRECTORY")
```""",
    ]
    if "stock" in recipe.export.formats:
        parts += [
            "The folder `stock` that was written beside this one holds the same model as a plain `GPT2LMHeadModel`, "
            "whose norms are still there and do nothing. It needs transformers alone:",
            """\
```python
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel.from_pretrained("THIS-DIRECTORY/../stock")
```""",
        ]
    else:
        parts.append("`ln-export THIS-DIRECTORY --format stock --out stock` writes a plain `GPT2LMHeadModel`.")
    return "\n\n".join(parts)


def _scores(results: Results) -> str:
    shown = [role for role in _TITLES if getattr(results.models, role) is not None]
    rows = []

    def row(name: str, values: dict[str, float | None], form: str) -> None:
        if any(value is not None for value in values.values()):
            cells = ["-" if (value := values[role]) is None else format(value, form) for role in shown]
            rows.append((name, *cells))

    def of(field: str, factor: float = 1.0) -> dict[str, float | None]:
        values = {role: getattr(getattr(results, field), role) for role in shown}
        return {role: None if value is None else factor * value for role, value in values.items()}

    def spread(name: str) -> dict[str, float | None]:
        spreads = {role: getattr(results.loss_spread, role) for role in shown}
        return {role: None if found is None else getattr(found, name) for role, found in spreads.items()}

    row("cross-entropy (nats per token)", of("cross_entropy"), ".4f")
    row("median token", spread("median"), ".4f")
    row("99.9 % of tokens below", spread("percentile_99_9"), ".2f")
    row("bits per byte", of("bits_per_byte"), ".4f")
    row("accuracy (%)", of("accuracy", 100), ".2f")
    settings = results.settings
    notes = [f"{results.tokens:,} tokens of {settings.data}, windows of {settings.context}, {settings.precision}."]
    if settings.questions:
        notes.append(
            f"Accuracy is length-normalised, on {settings.questions:,} questions of {settings.question_set} under the "
            f"protocol {settings.protocol}."
        )
    if results.gap is not None:
        notes.append(
            "The control was fine-tuned on the same batches and kept its LayerNorms; the gap, LN-free minus control, "
            f"is {results.gap:+.4f} nats per token."
        )
    return _table(("", *(_TITLES[role] for role in shown)), rows) + "\n\n" + " ".join(notes)


def _making(recipe: Recipe) -> str:
    from ln_removal.recipe import dump_toml

    training = recipe.training
    return (
        f"{recipe.description}\n\n"
        f"{recipe.tokens:,} tokens of {recipe.data.corpus}: {training.steps:,} steps of {training.tokens_per_step:,}, "
        f"context {recipe.data.context}. The whole recipe, as `ln-remove --recipe FILE` takes it:\n\n"
        f"```toml\n{dump_toml(recipe).strip()}\n```"
    ).strip()


def _limits(recipe: Recipe) -> str:
    return "\n".join(
        (
            "- The constants suit text like that of the fine-tuning. Without normalization, residual streams can grow "
            "without bound on tokens it never saw; look at the percentiles of the loss, not only at its mean.",
            f"- Fine-tuned on sequences of {recipe.data.context} tokens: later positions were not seen then.",
            "- It has the abilities, biases and faults of the model it was made from.",
        )
    )


def _measured(results: Results, recipe: Recipe) -> list[EvalResult]:
    """The LN-free model's figures for the model index."""
    settings = results.settings
    hellaswag = "hellaswag" in settings.question_set.lower()
    return _entries(
        {
            "cross_entropy": ("cross-entropy (nats per token)", results.cross_entropy.ln_free),
            "bits_per_byte": ("bits per byte", results.bits_per_byte.ln_free),
        },
        dataset=(_slug(recipe.data.corpus), settings.data),
    ) + _entries(
        {"accuracy": (f"accuracy ({settings.protocol}, length-normalised)", results.accuracy.ln_free)},
        dataset=("Rowan/hellaswag" if hellaswag else _slug(settings.question_set), settings.question_set),
    )


def _entries(metrics: dict[str, tuple[str, float | None]], *, dataset: tuple[str, str]) -> list[EvalResult]:
    """Model index entries of metrics (type: name, value) on a data set (type, name); without those not measured."""
    from huggingface_hub import EvalResult

    kind, name = dataset
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            metric_type=metric,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for metric, (title, value) in metrics.items()
        if value is not None and math.isfinite(value)
    ]


def _front_matter(
    name: str, *, base_model: str | None, datasets: list[str], tags: list[str], measured: list[EvalResult]
) -> str:
    from huggingface_hub import ModelCardData

    optional: dict[str, Any] = {"base_model": base_model, "datasets": datasets, "eval_results": measured}
    if base_model is not None:
        optional["base_model_relation"] = "finetune"
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        license="mit",
        tags=tags,
        **{key: value for key, value in optional.items() if value},
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_id(model: str) -> str | None:
    """The Hub repository of a recipe's model; None for the embedded model and for local directories."""
    if model in REPOSITORIES:
        return REPOSITORIES[model]
    owner, slash, name = model.partition("/")
    looks_like_an_id = bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~"))
    return model if looks_like_an_id and not Path(model).exists() else None


def _base_name(model: str) -> str:
    return "tiny-gpt2" if model == "tiny" else Path(model).name


def _hub_datasets(corpus: str) -> list[str]:
    """Hub ids of a corpus; empty for local text."""
    from ln_removal.data.hub_corpora import KNOWN_CORPORA

    if corpus.startswith("hub:"):
        return [corpus.split(":")[1]]
    known = KNOWN_CORPORA.get(corpus)
    return [] if known is None else sorted({part.dataset for part in known.parts})


def _slug(text: str) -> str:
    words = "".join(character if character.isalnum() else " " for character in Path(text).name.lower()).split()
    return "-".join(words) or "text"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    align = ("---", *("---:" for _ in header[1:]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def _write(directory: Path, front: str, sections: list[str]) -> None:
    path = directory / "README.md"
    temporary = path.with_name(".README.md.tmp")
    try:
        temporary.write_text("\n\n".join([front, *sections]) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check the directory and the free space"
        ) from error
