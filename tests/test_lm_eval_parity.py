"""evaluate-hellaswag against lm-evaluation-harness's answers to the same questions, recorded by benchmarks/hellaswag_parity.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ln_removal.evaluation.hellaswag import evaluate_choices
from ln_removal.evaluation.questions import load_questions
from ln_removal.files.resources import embedded_model_directory
from ln_removal.models.loading import load_tokenizer

RECORDED = Path(__file__).parent / "data" / "lm_eval_answers.json"


@pytest.mark.slow
def test_every_choice_is_lm_evals(tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(question) for question in recorded["questions"]) + "\n", encoding="utf-8")
    questions = load_questions(file)
    assert len(questions) >= 200
    model = AutoModelForCausalLM.from_pretrained(embedded_model_directory(), dtype="float32").eval()
    tokenizer = load_tokenizer("tiny")
    found = evaluate_choices(model, tokenizer, questions, protocol="lm-eval")
    for score, choices, log_probs in zip(found.per_question, recorded["choices"], recorded["log_probs"], strict=True):
        assert score.log_probs == pytest.approx(log_probs, rel=1e-4, abs=2e-3)
        assert [score.choice, score.choice_norm] == choices
    summary = found.summary()
    assert summary["acc"] == pytest.approx(recorded["acc"], abs=1e-9)
    assert summary["acc_norm"] == pytest.approx(recorded["acc_norm"], abs=1e-9)
    assert {choice for choice, _ in recorded["choices"]} == {0, 1, 2, 3}, "lm-eval must have had something to decide"
