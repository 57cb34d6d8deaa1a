"""Answer the same questions with lm-evaluation-harness; runs in an environment that has it. Argument: JSON as for ours.

The task is its hellaswag (processing, metrics) on a local file. `seconds` is the time inside its model class alone, tokenisation
included; `seconds_whole` is all of its evaluation.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.hellaswag.utils import preprocess, process_docs
from transformers import AutoModelForCausalLM, AutoTokenizer


class TimedModel(HFLM):
    """HFLM with a clock around its scoring."""

    seconds = 0.0

    def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = super().loglikelihood(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return found


def main() -> None:
    """Load, answer, print one JSON line."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    model = model.to(settings["device"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    harness = TimedModel(
        pretrained=model, tokenizer=tokenizer, batch_size=settings["batch_size"], device=settings["device"]
    )
    config = {
        "task": "hellaswag_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": settings["data"]}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "process_docs": process_docs,
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    task = ConfigurableTask(config=config)
    lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0, limit=4)
    harness.seconds = 0.0
    began = time.perf_counter()
    results = lm_eval.simple_evaluate(harness, tasks=[task], bootstrap_iters=0, log_samples=True)
    whole = time.perf_counter() - began
    scores = results["results"]["hellaswag_local"]
    samples = sorted(results["samples"]["hellaswag_local"], key=lambda sample: sample["doc_id"])
    choices, log_probs = [], []
    for sample in samples:
        found = np.array([float(answer[0]) for answer in sample["filtered_resps"]])
        lengths = np.array([len(preprocess(ending)) for ending in sample["doc"]["endings"]], dtype=float)
        choices.append([int(found.argmax()), int((found / lengths).argmax())])
        log_probs.append(found.tolist())
    print(
        json.dumps(
            {
                "seconds": harness.seconds,
                "seconds_whole": whole,
                "questions": len(samples),
                "acc": scores["acc,none"],
                "acc_norm": scores["acc_norm,none"],
                "choices": choices,
                "log_probs": log_probs,
                "version": lm_eval.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
