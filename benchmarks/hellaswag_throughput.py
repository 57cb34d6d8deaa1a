"""Questions per second of evaluate-hellaswag against lm-evaluation-harness, on the same model and questions, and equal
choices.

    python benchmarks/hellaswag_throughput.py --data hellaswag_val.jsonl --limit 200 --model gpt2 --lm-eval /tmp/lmeval-venv/bin/python

Protocol lm-eval, float32, one device. lm-eval runs in its own environment (`--lm-eval`, its Python; see README.md), with
its own default batch size of 1 and with each of `--batch-sizes`. Every run is a process of its own, all of them in turns;
loading is not counted, and of lm-eval only the time inside its model class. Without `--model` a GPT-2 small with random
weights answers, with a tokenizer trained on the questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import cores, device_label, machine, spread, table, write_result

HERE = Path(__file__).parent


def main() -> None:
    """Run both and write benchmarks/results/hellaswag_throughput-<model>-<device>.json."""
    from ln_removal.evaluation.questions import load_questions, write_jsonl

    options = _parse()
    questions = load_questions(options.data)[: options.limit]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = directory / "questions.jsonl"
        write_jsonl(questions, data)
        model = str(options.model) if options.model else random_model(questions, directory / "model")
        settings = {"data": str(data), "model": model, "threads": options.threads, "device": options.device}
        ways = {"ours": settings} | {f"lm-eval, batch {n}": {**settings, "batch_size": n} for n in options.batch_sizes}
        samples: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for _ in range(options.samples):
            for way, given in ways.items():
                samples[way].append(run(way, given, options))
                print(f"{way}: {samples[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    result = summary(samples)
    print(report(result))
    result |= {
        "model": Path(options.model).name if options.model else "GPT-2 small, random weights",
        "protocol": "lm-eval",
        "questions": len(questions),
        "data": {"file": options.data.name, "sha256": hashlib.sha256(options.data.read_bytes()).hexdigest()},
        "machine": machine(options.device, options.threads),
    }
    label = Path(options.model).name if options.model else "random-gpt2"
    name = f"hellaswag_throughput-{label}-{len(questions)}-{device_label(options.device)}"
    write_result(name, result, options.out)


def run(way: str, settings: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """One evaluation in a process of its own."""
    python, script = (
        (sys.executable, "hellaswag_ours.py") if way == "ours" else (options.lm_eval, "hellaswag_lm_eval.py")
    )
    done = subprocess.run(
        [str(python), str(HERE / "contestants" / script), json.dumps(settings)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(options.threads),
            "PYTHONPATH": str(HERE.parent),
        },
    )
    if done.returncode != 0:
        sys.exit(f"{way} failed:\n" + "\n".join(done.stderr.strip().splitlines()[-12:]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def summary(samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Speeds, scores, and how far the two agree on single questions."""
    ours = samples["ours"][0]
    found: dict[str, Any] = {}
    for way, runs in samples.items():
        first = runs[0]
        differing = [a != b for a, b in zip(first["choices"], ours["choices"], strict=True)]
        gaps = [
            abs(a - b)
            for theirs, own in zip(first["log_probs"], ours["log_probs"], strict=True)
            for a, b in zip(theirs, own, strict=True)
        ]
        found[way] = {
            "questions_per_second": spread(len(first["choices"]) / run["seconds"] for run in runs),
            "seconds": [run["seconds"] for run in runs],
            "acc": first["acc"],
            "acc_norm": first["acc_norm"],
            "questions_answered_differently_from_ours": sum(differing),
            "largest_log_probability_difference_from_ours": max(gaps),
        }
        if "seconds_whole" in first:
            found[way]["seconds_whole"] = [run["seconds_whole"] for run in runs]
            found[way]["version"] = first["version"]
    return {"ways": found}


def report(result: dict[str, Any]) -> str:
    """The comparison as a text table."""
    ours = result["ways"]["ours"]["questions_per_second"]["median"]
    rows = [["", "questions/s", "ours is", "acc", "acc_norm", "other choices"]]
    for way, found in result["ways"].items():
        speed = found["questions_per_second"]["median"]
        rows.append(
            [
                way,
                f"{speed:.2f}",
                f"{ours / speed:.2f} x",
                f"{found['acc']:.4f}",
                f"{found['acc_norm']:.4f}",
                str(found["questions_answered_differently_from_ours"]),
            ]
        )
    return table(rows)


def random_model(questions: list[Any], directory: Path) -> str:
    """A GPT-2 small with random weights and a tokenizer of a few thousand words, trained on the questions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{q.ctx} {' '.join(q.endings)}" for q in questions), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(directory)
    torch.manual_seed(0)
    # GPT-2's vocabulary size, so that the unembedding costs what it costs there.
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
    model.save_pretrained(directory)
    return str(directory)


def _parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="questions: the official jsonl, or six lines a question"
    )
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--model", help="directory of a model and its tokenizer; default: GPT-2 small, random weights")
    parser.add_argument("--lm-eval", type=Path, required=True, help="Python of an environment with lm-eval 0.4.13")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="of lm-eval")
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, help="result file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
