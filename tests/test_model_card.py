"""Model cards: what the Hub reads in them, and what a person does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from report_run import prompts

from ln_removal.config.recipe import Recipe, load_recipe, validate_recipe
from ln_removal.evaluation.results import ByRole, LossSpread, Results, Settings
from ln_removal.report.base_model_card import write_base_model_card
from ln_removal.report.model_card import converted_model_card, model_card, write_model_card


def results(*, control: bool = True, questions: bool = True) -> Results:
    spread = LossSpread(standard_error=0.01, median=2.1, percentile_95=9.5, percentile_99_9=17.25)
    return Results(
        models=ByRole[str](original="gpt2", control="run/control/model" if control else None, ln_free="run/model"),
        cross_entropy=ByRole[float](original=3.0957, control=2.9891 if control else None, ln_free=3.0142),
        bits_per_byte=ByRole[float](original=1.0012, control=0.9667 if control else None, ln_free=0.9748),
        accuracy=ByRole[float](original=0.311, control=0.308 if control else None, ln_free=0.3047)
        if questions
        else ByRole[float](),
        loss_spread=ByRole[LossSpread](original=spread, control=spread if control else None, ln_free=spread),
        gap=3.0142 - 2.9891 if control else None,
        tokens=4_430_000,
        seconds=5400.0,
        device="NVIDIA H100",
        settings=Settings(
            data="openwebtext, validation split",
            context=1024,
            questions=10_042 if questions else 0,
            question_set="HellaSwag validation" if questions else "",
            protocol="lm-eval" if questions else "",
        ),
        versions={},
    )


def card_of(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


def test_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    write_model_card(tmp_path, load_recipe("gpt2"), results())
    data = card_of(tmp_path).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.license == "mit"
    assert data.base_model == "openai-community/gpt2"
    assert data.datasets == ["Skylion007/openwebtext"]
    assert "layernorm-free" in data.tags


def test_model_index_holds_the_measured_figures(tmp_path: Path) -> None:
    write_model_card(tmp_path, load_recipe("gpt2"), results())
    data = card_of(tmp_path).data
    assert data.model_name == "gpt2 without LayerNorm"
    found = {result.metric_type: (result.metric_value, result.dataset_type) for result in data.eval_results}
    assert found == {
        "cross_entropy": (3.0142, "openwebtext"),
        "bits_per_byte": (0.9748, "openwebtext"),
        "accuracy": (0.3047, "Rowan/hellaswag"),
    }


def test_table_has_the_three_models_side_by_side(tmp_path: Path) -> None:
    write_model_card(tmp_path, load_recipe("gpt2"), results())
    text = card_of(tmp_path).text
    assert "|  | original | control | LN-free |\n| --- | ---: | ---: | ---: |\n" in text
    assert "| cross-entropy (nats per token) | 3.0957 | 2.9891 | 3.0142 |" in text
    assert "| 99.9 % of tokens below | 17.25 | 17.25 | 17.25 |" in text
    assert "| accuracy (%) | 31.10 | 30.80 | 30.47 |" in text
    assert "+0.0251 nats per token" in text
    assert "4,430,000 tokens of openwebtext" in text


def test_losses_on_prompts_stand_below_the_scores(tmp_path: Path) -> None:
    write_model_card(tmp_path, load_recipe("gpt2"), results().model_copy(update={"prompts": prompts()}))
    text = card_of(tmp_path).text
    assert "| second copy, text, with BOS | 0.905 | 0.955 | 1.255 | +0.300 | +0.290 to +0.320 |" in text
    assert "+0.300 with BOS and +0.050 without" in text
    write_model_card(tmp_path, load_recipe("gpt2"), results())
    assert "BOS" not in card_of(tmp_path).text, "results of an earlier version"


@pytest.mark.parametrize("model", ["tiny", "./my-gpt2", "/models/mine"])
def test_a_model_that_is_not_on_the_hub_is_not_given_as_base(tmp_path: Path, model: str) -> None:
    recipe = load_recipe("tiny", {"model": model})
    write_model_card(tmp_path, recipe, results())
    data = card_of(tmp_path).data
    assert data.base_model is None
    assert data.datasets is None  # python-source is no Hub data set either


@pytest.mark.parametrize(
    ("model", "corpus", "base", "datasets"),
    [
        ("owner/code-gpt2", "hub:owner/texts:plain", "owner/code-gpt2", ["owner/texts"]),
        ("gpt2-xl", "the-pile", "openai-community/gpt2-xl", ["monology/pile-uncopyrighted"]),
        ("distilgpt2", "texts/", "distilbert/distilgpt2", None),
    ],
)
def test_hub_models_and_data_sets_are_linked(
    tmp_path: Path, model: str, corpus: str, base: str, datasets: list[str] | None
) -> None:
    write_model_card(tmp_path, load_recipe("tiny", {"model": model, "data.corpus": corpus}), results())
    data = card_of(tmp_path).data
    assert data.base_model == base
    assert data.datasets == datasets


def test_the_recipe_in_the_card_is_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("gpt2-fast")
    write_model_card(tmp_path, recipe, results())
    assert recipe_in(tmp_path) == recipe


def test_license_is_that_of_the_base_model(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-4.0\n---\n# mine\n", encoding="utf-8")
    bare = tmp_path / "bare"
    bare.mkdir()
    for model, license_id in (
        ("gpt2", "mit"),
        ("distilgpt2", "apache-2.0"),
        ("openai-community/gpt2-xl", "mit"),
        (str(mine), "cc-by-4.0"),
        (str(bare), "unknown"),
    ):
        card = ModelCard(model_card(load_recipe("gpt2", {"model": model}), None))
        assert card.data.license == license_id, model
    assert ModelCard(model_card(load_recipe("gpt2"), None, license_id="bsd")).data.license == "bsd"


def test_card_of_a_repository_says_how_to_load_from_there() -> None:
    text = ModelCard(model_card(load_recipe("gpt2"), results(), repo_id="alice/free", has_code=True)).text
    assert 'AutoModelForCausalLM.from_pretrained("alice/free")' in text
    assert 'AutoModelForCausalLM.from_pretrained("alice/free", trust_remote_code=True)' in text
    assert 'GPT2LMHeadModel.from_pretrained("alice/free", subfolder="stock")' in text
    assert "THIS-DIRECTORY" not in text and ".." not in text.partition("## Scores")[0].replace("...", "")
    stock = ModelCard(model_card(load_recipe("gpt2"), results(), repo_id="alice/free", form="stock")).text
    assert 'GPT2LMHeadModel.from_pretrained("alice/free")' in stock and "import ln_removal" not in stock


def test_card_of_a_converted_model() -> None:
    card = ModelCard(converted_model_card("apollo-research/gpt2_noLN", repo_id="alice/free"))
    assert card.data.base_model == "apollo-research/gpt2_noLN" and card.data.license == "unknown"
    assert card.data.eval_results is None
    assert 'from_pretrained("alice/free")' in card.text and "huggingface.co/apollo-research/gpt2_noLN" in card.text


def test_base_model_card(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-gpt2")
    write_base_model_card(tmp_path, recipe, cross_entropy=3.2521, bits_per_byte=1.2893, validation_tokens=524_288)
    card = card_of(tmp_path)
    assert card.data.license == "mit"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "cross_entropy": 3.2521,
        "bits_per_byte": 1.2893,
    }
    assert "3.2521 nats per token on 524,288 held-out tokens" in card.text
    assert f"| trained on | {recipe.tokens:,} tokens |" in card.text
    assert recipe_in(tmp_path) == recipe


def recipe_in(directory: Path) -> Recipe:
    import tomllib

    block = (directory / "README.md").read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    return validate_recipe(tomllib.loads(block), source="the card")


@pytest.mark.parametrize(
    ("changes", "expected", "absent"),
    [
        ({}, "ordinary GPT-2 with LayerNorm", "import ln_removal"),
        (
            {"block_norm": "none", "activation": "relu", "biases": "paper"},
            "without LayerNorm in its blocks; the norm in front of the unembedding is kept, ReLU in its MLPs. Queries and keys",
            "ordinary",
        ),
        (
            {"family": "pythia", "block_norm": "none", "final_norm": "none", "activation": "learnable_leaky_relu"},
            "A Pythia (GPT-NeoX: rotary positions, parallel residual) trained from scratch without any LayerNorm, leaky ReLU "
            "with a learned slope, one a layer, in its MLPs.",
            "ordinary",
        ),
        (
            {
                "block_norm": "dyt",
                "final_norm": "derf",
                "initialisation": "unit",
                "residual_gain": "learned",
                "qk_norm": True,
                "attention_scale": "1/k",
            },
            "with DyT in its blocks and Derf in front of the unembedding, GELU in its MLPs. What a branch adds to the residual "
            "stream is multiplied with a learned scalar. The embeddings are multiplied with a constant, so that the residual "
            "stream began at a root mean square of 1. Attention scores are divided by the width of a head, not by its root. "
            "Queries and keys have an RMSNorm for every head.",
            "ordinary",
        ),
    ],
)
def test_base_model_card_says_what_was_chosen(
    tmp_path: Path, changes: dict[str, Any], expected: str, absent: str
) -> None:
    recipe = load_recipe("tiny-gpt2", {f"architecture.{key}": value for key, value in changes.items()})
    write_base_model_card(tmp_path, recipe, cross_entropy=3.25, bits_per_byte=None, validation_tokens=1000)
    text = card_of(tmp_path).text
    assert expected in text and absent not in text
    assert ("import ln_removal" in text) == bool(changes)
    assert "perplexity 25.79" in text


def test_a_base_model_that_diverged_has_a_card_too(tmp_path: Path) -> None:
    recipe = load_recipe("tiny-gpt2", {"data.tokenizer": "/home/alice/secret/tokenizer"})
    write_base_model_card(tmp_path, recipe, cross_entropy=5000.0, bits_per_byte=None, validation_tokens=1000)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "5000.0000 nats" in text and "alice" not in text
