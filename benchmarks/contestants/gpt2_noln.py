"""gpt2_noLN's own train.py, run unchanged in a directory of links to its files, on random tokens.

Its step boundary is the line "iter N: ..." that it prints after each step. Its FakeLayerNorm puts constants on "cuda" whatever
the device setting, so without a GPU torch.ones is made to take the CPU; and it uses autocast on CUDA only, so a bfloat16 run on
a CPU puts its whole program under autocast.
"""

from __future__ import annotations

import io
import os
import pickle
import runpy
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from pacing import Finished, Pace
from shapes import Shape, random_tokens


class StepWatch(io.TextIOBase):
    """Standard output that counts the lines that begin with "iter "."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def write(self, text: str) -> int:
        if text.startswith("iter "):
            self._pace.steps_done()
        return sys.stderr.write(text)


def main() -> None:
    """Settings: shape, precision, tokens_per_step, micro_batch, device, peer."""
    pace = Pace()
    settings = pace.settings
    shape = Shape(**settings["shape"])
    cuda = settings["device"].startswith("cuda")
    sequences = settings["tokens_per_step"] // shape.context
    micro_batch = min(settings["micro_batch"], sequences)
    pace.details = {"micro_batch": micro_batch, "accumulation": sequences // micro_batch}
    ambient: Any = nullcontext()
    if not cuda:
        ones = torch.ones
        torch.ones = lambda *args, device=None, **kwargs: ones(*args, **kwargs)  # type: ignore[assignment]
        ambient = torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings["precision"] == "bfloat16")
    with tempfile.TemporaryDirectory() as name, ambient:
        directory = Path(name)
        _lay_out(directory, Path(settings["peer"]), shape)
        os.chdir(directory)
        sys.path.insert(0, str(directory))
        sys.argv = ["train.py", *_arguments(shape, settings, micro_batch, sequences // micro_batch)]
        sys.stdout = StepWatch(pace)  # type: ignore[assignment]
        try:
            runpy.run_path("train.py", run_name="__main__")
        except Finished:
            pace.close()
        except torch.OutOfMemoryError:
            pace.out_of_memory()


def _lay_out(directory: Path, peer: Path, shape: Shape) -> None:
    """Links to the peer's modules beside a data set of random tokens, where train.py looks for one."""
    for path in peer.glob("*.py"):
        (directory / path.name).symlink_to(path)
    data = directory / "data" / "random"
    data.mkdir(parents=True)
    random_tokens(shape, 2**21).tofile(data / "train.bin")
    random_tokens(shape, 2**16).tofile(data / "val.bin")
    if shape.vocab_size != 50257:  # its own default is 50304, GPT-2's vocabulary padded
        with (data / "meta.pkl").open("wb") as file:
            pickle.dump({"vocab_size": shape.vocab_size}, file)


def _arguments(shape: Shape, settings: dict[str, Any], micro_batch: int, accumulation: int) -> list[str]:
    """Those of its config/finetune_openwebtext.py (compile is False there), but from scratch and without wandb."""
    values = {
        "dataset": "random",
        "init_from": "scratch",
        "remove_layer_norm": True,
        "bias": True,
        "compile": False,
        "eval_interval": 10**9,
        "gradient_accumulation_steps": accumulation,
        "batch_size": micro_batch,
        "block_size": shape.context,
        "n_layer": shape.n_layer,
        "n_head": shape.n_head,
        "n_embd": shape.n_embd,
        "learning_rate": 6e-4,
        "warmup_iters": 100,
        "max_iters": 10**6,
        "device": "cuda" if settings["device"].startswith("cuda") else "cpu",
        "dtype": settings["precision"],
    }
    return [f"--{key}={value}" for key, value in values.items()]


if __name__ == "__main__":
    main()
