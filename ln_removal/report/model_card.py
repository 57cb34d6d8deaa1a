"""README.md of an LN-free model: what it is, how to load it, its scores, how it was made and its limits.

The Hugging Face Hub reads the front matter: base model, data sets, license, and the scores as a model index. So a
directory can be uploaded as it is. A card on disk says THIS-DIRECTORY where a published one names its repository.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ln_removal.errors import UserError
from ln_removal.evaluation.results import TITLES
from ln_removal.files.hub import PUBLISHED, is_hub_id
from ln_removal.models.families import FAMILIES, Family, family_of
from ln_removal.report.tables import (
    PROMPTS_TITLE,
    Score,
    markdown_table,
    prompt_notes,
    prompt_table,
    score_rows,
    shown_roles,
)

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from ln_removal.config.recipe import Recipe
    from ln_removal.evaluation.results import Results

REPOSITORIES = {name: f"{owner}/{name}" for name, owner in PUBLISHED.items()}
"""Where the Hub keeps the models that are usually named without an owner."""

LICENSES = {
    **dict.fromkeys(("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "mit"),
    "distilgpt2": "apache-2.0",
}
"""Licenses of the models in REPOSITORIES and of the embedded one; fine-tuning does not change them."""

UNKNOWN_LICENSE = "unknown"

GPT2 = FAMILIES["gpt2"]

Form = Literal["normfree", "stock"]

_LABELS: dict[Score, str] = {
    "cross_entropy": "cross-entropy (nats per token)",
    "median": "median token",
    "percentile_99_9": "99.9 % of tokens below",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy (%)",
}


def metric_entries(metrics: dict[str, tuple[str, float | None]], *, dataset: tuple[str, str]) -> list[EvalResult]:
    """Model index entries of metrics (type: name, value) on a data set (type, name); values that are missing are left out."""
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


def front_matter(
    name: str,
    *,
    base_model: str | None,
    datasets: list[str],
    tags: list[str],
    license_id: str,
    measured: list[EvalResult],
) -> str:
    """The YAML between two lines of hyphens; keys whose value is None or empty are left out."""
    from huggingface_hub import ModelCardData

    optional: dict[str, Any] = {"base_model": base_model, "datasets": datasets, "eval_results": measured}
    if base_model is not None:
        optional["base_model_relation"] = "finetune"
    data = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license_id,
        tags=tags,
        **{key: value for key, value in optional.items() if value},
    )
    return f"---\n{data.to_yaml()}\n---"


def license_of(model: str) -> str:
    """The license of a published GPT-2, or the one that the card in the model's directory names; else "unknown"."""
    if (name := _without_commit(model)) in LICENSES:
        return LICENSES[name]
    known = {repository: LICENSES[name] for name, repository in REPOSITORIES.items()}
    card = Path(model) / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, ValueError):
        text = ""
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    named = re.search(r"^license: *([\w.-]+) *$", front[1], flags=re.MULTILINE) if front else None
    return known.get(name) or (named[1] if named else UNKNOWN_LICENSE)


def hub_id(model: str) -> str | None:
    """The Hub repository of a model, which may be pinned to a commit; None for the embedded model and for local directories."""
    name = _without_commit(model)
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    return name if "/" in name and is_hub_id(model) else None


def _without_commit(model: str) -> str:
    return model.partition("@")[0] if is_hub_id(model) else model


def hub_datasets(corpus: str) -> list[str]:
    """Hub ids of a corpus; empty for local text."""
    from ln_removal.data.hub_corpora import KNOWN_CORPORA

    if corpus.startswith("hub:"):
        return [corpus.split(":")[1]]
    known = KNOWN_CORPORA.get(corpus)
    return [] if known is None else sorted({part.dataset for part in known.parts})


def slug(text: str) -> str:
    words = "".join(character if character.isalnum() else " " for character in Path(text).name.lower()).split()
    return "-".join(words) or "text"


def is_public_corpus(corpus: str) -> bool:
    """Whether anybody can read a recipe's corpus for certain. Data sets of the Hub that are not listed may be private."""
    from ln_removal.data.hub_corpora import KNOWN_CORPORA

    return corpus in KNOWN_CORPORA


def is_public_data(name: str) -> bool:
    """Whether anybody can read a data set in results.json for certain: it is a known corpus, not a path."""
    return is_public_corpus(corpus_of(name))


def corpus_of(data_name: str) -> str:
    """The corpus that a data set in results.json comes from: its name without the split."""
    return data_name.removesuffix(", validation split").removesuffix(", held out")


def write_model_card(directory: Path, recipe: Recipe, results: Results, *, model: str | None = None) -> None:
    """Write README.md into the directory of the LN-free model of a run. `model`: see `model_card`.

    Raises:
        UserError: the file cannot be written.
    """
    from ln_removal.models.loading import load_config

    family = family_of(load_config(directory)) if (directory / "config.json").is_file() else GPT2
    write_card(directory, model_card(recipe, results, family=family, model=model))


def model_card(
    recipe: Recipe,
    results: Results | None,
    *,
    family: Family = GPT2,
    model: str | None = None,
    repo_id: str | None = None,
    form: Form = "normfree",
    has_stock: bool | None = None,
    has_code: bool = False,
    license_id: str | None = None,
) -> str:
    """The card of an LN-free model that a run has made.

    Args:
        results: the scores of the model, the original and the control; None when it was not scored.
        family: of the model.
        model: where the model is that the run was made from, see `identity.model_of_run`. Default: what the recipe names.
        repo_id: the Hub repository that the card is written for; None for a directory.
        form: without norms, or the stock form.
        has_stock: whether the stock form is there too, in the folder `stock`. Default: what export.formats says.
        has_code: whether the modelling file is in the model's directory.
        license_id: of the model that it was made from. Default: `license_of`.
    """
    model = model or recipe.model
    title = f"{_base_name(recipe.model)} without {family.norm_name}"
    front = front_matter(
        title,
        base_model=hub_id(model),
        datasets=hub_datasets(recipe.data.corpus),
        tags=_tags(family),
        license_id=license_id or license_of(model),
        measured=[] if results is None else _measured(results),
    )
    stock = form == "normfree" and ("stock" in recipe.export.formats if has_stock is None else has_stock)
    sections = [
        f"# {title}\n\n{_about(recipe, family)}",
        f"## Use\n\n{_loading(repo_id, family, form=form, has_stock=stock, has_code=has_code)}",
        *([] if results is None else [f"## Scores\n\n{_scores(results, family)}"]),
        f"## How it was made\n\n{_making(recipe, model)}",
        f"## Limits\n\n{_limits(recipe)}",
    ]
    return assemble(front, sections)


def converted_model_card(
    source: str,
    *,
    family: Family = GPT2,
    repo_id: str | None = None,
    form: Form = "normfree",
    has_code: bool = False,
    license_id: str | None = None,
) -> str:
    """The card of an LN-free model that was converted to another form and comes from no run.

    Args:
        source: the model that it was converted from: a Hub id or a directory.
        family, repo_id, form, has_code, license_id: as for `model_card`.
    """
    name, base = _base_name(source), hub_id(source)
    front = front_matter(
        name, base_model=base, datasets=[], tags=_tags(family), license_id=license_id or license_of(source), measured=[]
    )
    about = (
        (f"[{base}](https://huggingface.co/{base})" if base else f"`{name}`")
        + f", a {family.title} that needs no {family.norm_name}, in another form. It computes the same function as the original."
    )
    sections = [
        f"# {name}\n\n{about}",
        f"## Use\n\n{_loading(repo_id, family, form=form, has_stock=False, has_code=has_code)}",
        "## How it was made\n\nConverted with `ln-export` of ln-removal; the weights were folded, not trained.",
    ]
    return assemble(front, sections)


def _tags(family: Family) -> list[str]:
    return [family.model_type, f"{family.norm_name.lower()}-free", "mechanistic-interpretability"]


def _about(recipe: Recipe, family: Family) -> str:
    return (
        f"{_base_name(recipe.model)}, fine-tuned until it needs no {family.norm_name}. Every norm was replaced, one after the "
        "other, by a constant scale, and the constants were folded into the weights behind them. Nothing in this model "
        "depends on a token's own statistics: what attention, MLPs and unembedding read is an affine function of the "
        "residual stream, so contributions to the logits add up exactly."
    )


def _loading(repo_id: str | None, family: Family, *, form: Form, has_stock: bool, has_code: bool) -> str:
    place, stock_class = repo_id or "THIS-DIRECTORY", family.model_class
    plain = f"a plain `{stock_class}`, whose norms are still there and do nothing. {_stock_needs(family)}:"
    if form == "stock":
        imports = f"from transformers import AutoTokenizer, {stock_class}"
        return "\n\n".join((f"A{plain[1:]}", snippet(imports, stock_class, place)))
    imports = "import ln_removal  # makes transformers know the class\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
    parts = [
        "The model class comes with the Python package ln-removal; no remote code is run.",
        snippet(imports, "AutoModelForCausalLM", place),
    ]
    if has_code:
        parts += [
            "The class lies here too, in a file of its own, for those who would rather trust that file than install the "
            "package:",
            f"""\
```python
model = AutoModelForCausalLM.from_pretrained("{place}", trust_remote_code=True)
```""",
        ]
    if has_stock:
        where = "The folder `stock` that was written beside this one" if repo_id is None else "The folder `stock`"
        stock = f'"{place}/../stock"' if repo_id is None else f'"{place}", subfolder="stock"'
        parts += [
            f"{where} holds the same model as {plain}",
            f"""\
```python
from transformers import {stock_class}

model = {stock_class}.from_pretrained({stock})
```""",
        ]
    else:
        parts.append(f"`ln-export {place} --format stock --out stock` writes a plain `{stock_class}`.")
    return "\n\n".join(parts)


def _stock_needs(family: Family) -> str:
    """What the stock form needs, without the end of the sentence."""
    if family.centred:
        return "It needs transformers alone"
    return (
        "Load it in float32 or bfloat16, because in float16 transformers rounds inside of its norms what they hand on, and the "
        "logits are wrong. It needs transformers alone"
    )


def snippet(imports: str, model_class: str, place: str) -> str:
    return f"""\
```python
{imports}

model = {model_class}.from_pretrained("{place}")
tokenizer = AutoTokenizer.from_pretrained("{place}")
```"""


def _scores(results: Results, family: Family) -> str:
    """The tables of scores and how they were taken."""
    roles = shown_roles(results)
    rows = [(row.label, *map(row.value, roles)) for row in score_rows(results, _LABELS)]
    settings = results.settings
    window = f"windows of {settings.context}{results.windows_note}"
    notes = [f"{results.tokens:,} tokens of {settings.data}, {window}, {settings.precision}."]
    if settings.questions:
        notes.append(
            f"Accuracy is length-normalised, on {settings.questions:,} questions of {settings.question_set} under the "
            f"protocol {settings.protocol}."
        )
    if results.gap is not None:
        notes.append(
            f"The control was fine-tuned on the same batches and kept its {family.norm_name}s; the gap, LN-free minus control, "
            f"is {results.gap:+.4f} nats per token."
        )
    parts = [markdown_table(("", *(TITLES[role] for role in roles)), rows), " ".join(notes)]
    if results.prompts:
        parts += [f"{PROMPTS_TITLE}:", markdown_table(*prompt_table(results)), *prompt_notes(results)]
    return "\n\n".join(parts)


def _making(recipe: Recipe, model: str) -> str:
    from ln_removal.config.recipe import dump_toml

    training = recipe.training
    base, commit = hub_id(model), model.partition("@")[2]
    made_from = f"Made from {base} at commit {commit}. " if base and commit else ""
    return (
        f"{recipe.description}\n\n{made_from}"
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


def _measured(results: Results) -> list[EvalResult]:
    """The LN-free model's scores for the model index."""
    settings = results.settings
    hellaswag = "hellaswag" in settings.question_set.lower()
    return metric_entries(
        {
            "cross_entropy": ("cross-entropy (nats per token)", results.cross_entropy.ln_free),
            "bits_per_byte": ("bits per byte", results.bits_per_byte.ln_free),
        },
        dataset=(slug(corpus_of(settings.data)), settings.data),
    ) + metric_entries(
        {"accuracy": (f"accuracy ({settings.protocol}, length-normalised)", results.accuracy.ln_free)},
        dataset=("Rowan/hellaswag" if hellaswag else slug(settings.question_set), settings.question_set),
    )


def _base_name(model: str) -> str:
    return "tiny-gpt2" if model == "tiny" else Path(_without_commit(model)).name


def assemble(front: str, sections: list[str]) -> str:
    return "\n\n".join([front, *sections]) + "\n"


def write_card(directory: Path, text: str) -> None:
    path = directory / "README.md"
    temporary = path.with_name(".README.md.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; check the directory and the free space"
        ) from error
