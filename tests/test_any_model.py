"""Any causal language model of transformers is loaded and scored, and what is none is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import Commands
from small_model import write_corpus, write_model, write_tokenizer

from ln_removal.errors import UserError
from ln_removal.evaluation.loss import position_losses
from ln_removal.models.loading import NO_LIMIT, load_model, positions_of

_SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

OTHERS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "bloom": {},  # no limit of positions
    "gemma2": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 0.5},  # it bends its logits behind lm_head
    "granite": {"logits_scaling": 8.0, "max_position_embeddings": 64},
    "mamba": {"state_size": 4},  # no attention, no cache
}


def other_model(kind: str, directory: Path) -> Path:
    config = transformers.AutoConfig.for_model(kind, **{**_SIZES, **OTHERS.get(kind, {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.mul_(2)
        model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("kind", OTHERS)
def test_any_causal_model_is_scored_by_its_own_logits(kind: str, tmp_path: Path) -> None:
    loaded = load_model(other_model(kind, tmp_path))
    tokens = torch.randint(320, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.model(tokens[:, :-1]).logits.flatten(0, 1).float()
        found = position_losses(loaded.model, tokens[:, :-1], tokens[:, 1:].flatten())
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    limit = {"bloom": NO_LIMIT, "mamba": NO_LIMIT, "gemma2": 8192}.get(kind, 64)
    assert positions_of(loaded.model.config) == limit


@pytest.mark.slow
def test_both_commands_take_a_model_of_no_known_family(tmp_path: Path, forked: Commands) -> None:
    commands = forked.at(tmp_path)
    write_corpus(tmp_path / "texts", documents=8)
    write_model(tmp_path / "gpt2-like")
    model = str(other_model("gemma2", tmp_path / "gemma2"))
    texts = ("--corpus", "texts", "--context", "32", "--max-tokens", "500", "--prompt", "def f", "--device", "cpu")
    commands.run("ln-evaluate", model, *texts, "--out", str(tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["cross_entropy"]["original"] == pytest.approx(5.77, abs=0.3)
    assert scores["residual_std"]["original"] is None
    question = {
        "ind": 0, "activity_label": "a", "ctx_a": "def f", "ctx_b": "", "ctx": "def f", "split": "val", "label": 0,
        "endings": ["(value)", "(number)", "(x)", "()"],
    }  # fmt: skip
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    commands.run(
        "evaluate-hellaswag", model, "gpt2-like", "--data", str(tmp_path / "questions.jsonl"), "--device", "cpu"
    )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_reads_what_comes_behind_is_refused(kind: str, tmp_path: Path) -> None:
    other_model(kind, tmp_path)
    with pytest.raises(UserError, match="text behind them"):
        load_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    named = settings | {"architectures": [f"{kind.title()}ForMaskedLM"]}
    (tmp_path / "config.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match="not a causal language model"):
        load_model(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling.py").write_text("raise SystemExit('it ran')")
    config = {"model_type": "brand_new", "auto_map": {"AutoConfig": "modeling.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"brand_new.*never run"):
        load_model(tmp_path)


def test_a_configuration_of_a_far_larger_model_takes_no_memory(tmp_path: Path) -> None:
    """transformers would fill up what the files lack with random numbers: 28 GB for a Llama of the usual size."""
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="6,738,415,616 parameters"):
        load_model(tmp_path)
