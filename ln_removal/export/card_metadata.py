"""The front matter of a model card: what the Hugging Face Hub reads of it.

Base model, data sets, license, and the measured figures as a model index.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

REPOSITORIES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
}
"""Where the Hub keeps the models that are usually named without an owner."""

LICENSES = {
    **dict.fromkeys(("tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "mit"),
    "distilgpt2": "apache-2.0",
}
"""Licenses of the models in REPOSITORIES and of the embedded one; fine-tuning does not change them."""

UNKNOWN_LICENSE = "unknown"

TAGS = ["gpt2", "layernorm-free", "mechanistic-interpretability"]


def metric_entries(metrics: dict[str, tuple[str, float | None]], *, dataset: tuple[str, str]) -> list[EvalResult]:
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


def front_matter(
    name: str,
    *,
    base_model: str | None,
    datasets: list[str],
    tags: list[str],
    license_id: str,
    measured: list[EvalResult],
) -> str:
    """The block between the two lines of hyphens; what is None or empty is left out."""
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
    """The license of a model: of a published size, or as the card in its directory says; else "unknown"."""
    if model in LICENSES:
        return LICENSES[model]
    known = {repository: LICENSES[name] for name, repository in REPOSITORIES.items()}
    card = Path(model) / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
    except (OSError, ValueError):
        text = ""
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    named = re.search(r"^license: *([\w.-]+) *$", front[1], flags=re.MULTILINE) if front else None
    return known.get(model) or (named[1] if named else UNKNOWN_LICENSE)


def hub_id(model: str) -> str | None:
    """The Hub repository of a recipe's model; None for the embedded model and for local directories."""
    if model in REPOSITORIES:
        return REPOSITORIES[model]
    owner, slash, name = model.partition("/")
    looks_like_an_id = bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~"))
    return model if looks_like_an_id and not Path(model).exists() else None


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
    """Whether a recipe's corpus is sure to be one that anybody can read. Other data sets of the Hub may be private."""
    from ln_removal.data.hub_corpora import KNOWN_CORPORA

    return corpus in KNOWN_CORPORA


def is_public_data(name: str) -> bool:
    """Whether a data set in results.json is sure to be one that anybody can read: a known corpus, and not a path."""
    return is_public_corpus(corpus_of(name))


def corpus_of(data_name: str) -> str:
    """The corpus that a data set in results.json comes from: what its name says before the split."""
    return data_name.removesuffix(", validation split").removesuffix(", held out")
