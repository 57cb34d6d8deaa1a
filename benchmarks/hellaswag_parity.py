"""Does evaluate-hellaswag choose what lm-evaluation-harness chooses, on every question?

    python benchmarks/hellaswag_parity.py --data hellaswag_val.jsonl --lm-eval /tmp/lmeval-venv/bin/python
    python benchmarks/hellaswag_parity.py --record 300 --lm-eval ...      # renews tests/data/lm_eval_answers.json

The same records go to both, protocol lm-eval, float32; the models are the embedded one and a GPT-2 of random weights (scaled
up, so that its answers differ). lm-eval runs in its own environment, see README.md. `--record` asks both questions made of this
project's own documentation instead and keeps them with lm-eval's answers, for a test that runs without lm-eval.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from hellaswag_throughput import run
from measuring import cores, machine, write_result

from ln_removal.evaluation.questions import Question, load_questions, write_jsonl
from ln_removal.files.resources import embedded_model_directory

RECORDED = Path(__file__).resolve().parent.parent / "tests" / "data" / "lm_eval_answers.json"
HARD_TEXT = (" [title] Foo [substeps]", " [step] x  y")
"""What WikiHow questions hold and the shared text form has lost: added to some questions, so that cleaning is compared too."""


def harder(questions: list[Question]) -> list[Question]:
    """Every seventh context and ending gets brackets and double spaces."""
    changed = []
    for number, question in enumerate(questions):
        if number % 7 == 1:
            added = question.ctx_a + HARD_TEXT[0]
            question = dataclasses.replace(question, ctx_a=added, ctx=f"{added} {question.ctx_b}".strip())
        if number % 7 == 0:
            question = dataclasses.replace(
                question, endings=(question.endings[0] + HARD_TEXT[1], *question.endings[1:])
            )
        changed.append(question)
    return changed


def from_documentation(count: int) -> list[Question]:
    """Sentences of README and docs cut in two, with the second halves of three others as wrong endings."""
    root = Path(__file__).resolve().parent.parent
    halves: list[tuple[str, str]] = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        for sentence in re.split(r"(?<=[.:;])\s+", path.read_text(encoding="utf-8")):
            words = sentence.split()
            if len(words) >= 12 and "|" not in words:
                halves.append((" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])))
    random = Random(0)
    questions = []
    for number in range(min(count, len(halves))):
        beginning, right = halves[number]
        others = [ending for _, ending in random.sample(halves[:number] + halves[number + 1 :], 3)]
        label = random.randrange(4)
        endings = (*others[:label], right, *others[label:])
        questions.append(Question(number, "Documentation", beginning, "", beginning, endings, label))
    return questions


def random_gpt2(directory: Path) -> Path:
    """A GPT-2 of 3 layers with large random weights and the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(embedded_model_directory())
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=512, n_embd=64, n_layer=3, n_head=4, bos_token_id=end, eos_token_id=end
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def compare(model: Path, data: Path, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both say, and how far they agree."""
    settings = {"data": str(data), "model": str(model), "threads": options.threads, "device": options.device}
    ours = run("ours", settings, options)
    theirs = run("lm-eval", {**settings, "batch_size": 16}, options)
    differing = sum(a != b for a, b in zip(ours["choices"], theirs["choices"], strict=True))
    gaps = [
        abs(a - b)
        for own, other in zip(ours["log_probs"], theirs["log_probs"], strict=True)
        for a, b in zip(own, other, strict=True)
    ]
    agreement = {
        "questions": len(ours["choices"]),
        "answered_differently": differing,
        "largest_log_probability_difference": max(gaps),
        "ours": {key: ours[key] for key in ("acc", "acc_norm")},
        "lm_eval": {key: theirs[key] for key in ("acc", "acc_norm")},
        "lm_eval_version": theirs["version"],
    }
    return agreement, theirs


def main() -> None:
    """Compare on all questions, write benchmarks/results/hellaswag_parity.json; or record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="questions: the official jsonl, or six lines a question")
    parser.add_argument("--lm-eval", type=Path, required=True, help="Python of an environment with lm-eval 0.4.13")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--record", type=int, metavar="N", help="record lm-eval's answers to N questions")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if (options.data is None) == (options.record is None):
        parser.error("give --data or --record")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = directory / "questions.jsonl"
        if options.record is not None:
            questions = harder(from_documentation(options.record))
            write_jsonl(questions, data)
            agreement, theirs = compare(embedded_model_directory(), data, options)
            kept = {key: theirs[key] for key in ("version", "acc", "acc_norm", "choices")}
            kept["questions"] = [question.to_json() for question in questions]
            kept["log_probs"] = [[round(value, 4) for value in row] for row in theirs["log_probs"]]
            RECORDED.parent.mkdir(exist_ok=True)
            RECORDED.write_text(json.dumps(kept) + "\n")
            print(json.dumps(agreement, indent=1))
            return
        questions = harder(load_questions(options.data)[: options.limit])
        write_jsonl(questions, data)
        found: dict[str, Any] = {}
        for label, model in (
            ("random GPT-2", random_gpt2(directory / "random")),
            ("tiny-gpt2", embedded_model_directory()),
        ):
            found[label], _ = compare(model, data, options)
            print(label, json.dumps(found[label]), file=sys.stderr, flush=True)
    result = {
        "protocol": "lm-eval",
        "data": {"file": options.data.name, "sha256": hashlib.sha256(options.data.read_bytes()).hexdigest()},
        "changed": "brackets and double spaces added to two questions in seven, for both",
        "models": found,
        "machine": machine(options.device, options.threads),
    }
    write_result("hellaswag_parity", result, options.out)


if __name__ == "__main__":
    main()
