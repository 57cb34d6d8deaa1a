"""The model card of a model that was pretrained from scratch: what it is, how it scores, how it was made."""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.report.model_card import (
    assemble,
    front_matter,
    hub_datasets,
    metric_entries,
    slug,
    snippet,
    write_card,
)
from ln_removal.report.tables import markdown_table

if TYPE_CHECKING:
    from ln_removal.config.recipe import ArchitectureSpec, Recipe


def write_base_model_card(
    directory: Path,
    recipe: Recipe,
    *,
    cross_entropy: float,
    bits_per_byte: float | None,
    validation_tokens: int,
) -> None:
    """Write README.md into the directory of a model that was pretrained from scratch, such as tiny-gpt2.

    Args:
        cross_entropy: on the validation split, nats per token.
        bits_per_byte: the same over the bytes of the text; None where the bytes are not known.
        validation_tokens: tokens of that split.

    Raises:
        UserError: the file cannot be written.
    """
    shape = recipe.architecture
    assert shape is not None, "a pretraining recipe has an [architecture]"
    measured = metric_entries(
        {
            "cross_entropy": ("cross-entropy (nats per token)", cross_entropy),
            "bits_per_byte": ("bits per byte", bits_per_byte),
        },
        dataset=(slug(recipe.data.corpus), f"{recipe.data.corpus}, validation split"),
    )
    front = front_matter(
        recipe.name,
        base_model=None,
        datasets=hub_datasets(recipe.data.corpus),
        tags=["gpt_neox" if shape.family == "pythia" else shape.family],
        license_id="mit",
        measured=measured,
    )
    perplexity = exp(min(cross_entropy, 700.0))  # of a model that diverged it would overflow
    scores = (
        f"{cross_entropy:.4f} nats per token on {validation_tokens:,} held-out tokens (perplexity {perplexity:.2f})"
    )
    rows = [*_facts(recipe, shape), ("cross-entropy", scores)]
    if bits_per_byte is not None:
        rows.append(("bits per byte", f"{bits_per_byte:.4f}"))
    sections = [
        "\n\n".join(part for part in (f"# {recipe.name}", recipe.description, _kind(shape)) if part),
        markdown_table(("", ""), rows),
        f"## Use\n\n{_loading(shape)}",
        f"## How it was made\n\n{_making(recipe)}",
        "## Limits\n\nA model of this size writes code that looks like code and seldom works. It is for experiments on "
        "normalization, not for writing programs.",
    ]
    write_card(directory, assemble(front, sections))


def _facts(recipe: Recipe, shape: ArchitectureSpec) -> list[tuple[str, str]]:
    """The rows of the table that say what the model is."""
    from ln_removal.config.estimate import count_parameters

    return [
        ("parameters", f"{count_parameters(shape):,}"),
        ("layers, heads, width", f"{shape.n_layer}, {shape.n_head}, {shape.n_embd}"),
        ("context", f"{shape.n_positions} tokens"),
        ("vocabulary", f"{shape.vocab_size:,} entries"),
        ("trained on", f"{recipe.tokens:,} tokens"),
        ("weights", recipe.export.dtype),
    ]


def _loading(shape: ArchitectureSpec) -> str:
    imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if not shape.is_plain:
        imports = f"import ln_removal  # makes transformers know the class\n{imports}"
    return snippet(imports, "AutoModelForCausalLM", "THIS-DIRECTORY")


def _making(recipe: Recipe) -> str:
    """The recipe in full, because a run of a sweep or with --set has no recipe file of its own."""
    from ln_removal.config.recipe import dump_toml

    tokenizer = Path(recipe.data.tokenizer)
    shown = tokenizer.name if tokenizer.is_absolute() else recipe.data.tokenizer
    data = recipe.data.model_copy(update={"tokenizer": shown})
    written = dump_toml(recipe.model_copy(update={"data": data})).strip()
    return f"Save this as recipe.toml and run `ln-pretrain --recipe recipe.toml`:\n\n```toml\n{written}\n```"


def _kind(shape: ArchitectureSpec) -> str:
    """What a pretrained model is, in words: its family, and what was chosen."""
    family = {
        "gpt2": "GPT-2",
        "pythia": "Pythia (GPT-NeoX: rotary positions, parallel residual)",
        "llama": "Llama (rotary positions, gated MLP)",
        "qwen3": "Qwen3 (rotary positions, gated MLP, norms of queries and keys)",
        "qwen2": "Qwen2 (rotary positions, gated MLP, biases in queries, keys and values)",
    }[shape.family]
    if shape.is_plain and shape.activation == shape.parts.activation:
        norm = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[shape.parts.norm]
        return (
            f"It is an ordinary {family} with {norm}, from scratch."
            if shape.family != "gpt2"
            else "It is an ordinary GPT-2 with LayerNorm: the model that ln-removal removes LayerNorm from when no other is at "
            "hand (`ln-remove --model tiny`), small enough to do so on a laptop."
        )
    title = {"layernorm": "LayerNorm", "none": "no norm", "dyt": "DyT", "derf": "Derf"}
    norms = {
        ("layernorm", "layernorm"): "with LayerNorm",
        ("none", "layernorm"): "without LayerNorm in its blocks; the norm in front of the unembedding is kept",
        ("layernorm", "none"): "with LayerNorm in its blocks and none in front of the unembedding",
        ("none", "none"): "without any LayerNorm",
    }.get(
        (shape.block_norm, shape.final_norm),
        f"with {title[shape.block_norm]} in its blocks and {title[shape.final_norm]} in front of the unembedding",
    )
    learned = "one for the network" if shape.slopes == "network" else "one a layer"
    activation = {
        "gelu": "GELU",
        "relu": "ReLU",
        "leaky_relu": f"leaky ReLU with a slope of {shape.negative_slope:g}",
        "learnable_leaky_relu": f"leaky ReLU with a learned slope, {learned},",
    }[shape.activation]
    biases = "" if shape.biases == "all" else " Queries and keys have biases, values and the other projections none."
    means = _means(shape)
    loaded = (
        "" if shape.is_plain else " The model class comes with the Python package ln-removal: import it before loading."
    )
    return f"A {family} trained from scratch {norms}, {activation} in its MLPs.{biases}{means}{loaded}"


def _means(shape: ArchitectureSpec) -> str:
    """What else was chosen so that the model trains without norms."""
    found = {
        "none": "",
        "fixed": " What a branch adds to the residual stream is multiplied with 1 / sqrt(2 n_layer).",
        "learned": " What a branch adds to the residual stream is multiplied with a learned scalar.",
    }[shape.residual_gain]
    if shape.initialisation == "unit":
        found += " The embeddings are multiplied with a constant, so that the residual stream began at a root mean square of 1."
    if shape.attention_scale == "1/k":
        found += " Attention scores are divided by the width of a head, not by its root."
    return found + (" Queries and keys have an RMSNorm for every head." if shape.qk_norm else "")
