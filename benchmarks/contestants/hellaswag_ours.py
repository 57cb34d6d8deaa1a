"""Answer questions with this project and print seconds, scores and every choice. Argument: JSON with data, model, threads."""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers import AutoModelForCausalLM

import ln_removal  # noqa: F401  # LN-free models load by their name
from ln_removal.evaluation.hellaswag import evaluate_choices
from ln_removal.evaluation.questions import load_questions
from ln_removal.models.loading import load_tokenizer


def main() -> None:
    """Load, answer, print one JSON line."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = model.to(settings["device"]).eval()
    tokenizer = load_tokenizer(settings["model"])
    questions = load_questions(settings["data"])
    evaluate_choices(model, tokenizer, questions[:4], protocol="lm-eval")  # first calls initialise kernels
    began = time.perf_counter()
    result = evaluate_choices(model, tokenizer, questions, protocol="lm-eval")
    seconds = time.perf_counter() - began
    choices = [[score.choice, score.choice_norm] for score in result.per_question]
    log_probs = [score.log_probs for score in result.per_question]
    print(json.dumps({"seconds": seconds, **result.summary(), "choices": choices, "log_probs": log_probs}))


if __name__ == "__main__":
    main()
