"""ReLU's Revival's blocks under its own Trainer class, with the arguments of its run_clm.py, on random tokens.

Its `compute_loss` is written for the Trainer of transformers 4.30, which passes no count of items, and reads `args.past_index`,
which is gone. It reports at every hundredth step: here at every step, or at none, so that a sample has the cost of the one or the
other. In its favour: no dropout, positions and mask buffers for the context only, no attention mask of ones, and transformers'
present default, the fused AdamW of PyTorch, for the AdamW that transformers no longer has.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from hf_trainer import NEVER, PaceCallback, RandomRows
from pacing import Finished, Pace
from revival_peer import LOG_EVERY, PeerModel, peer_module
from shapes import Shape
from transformers import TrainingArguments


def trainer_class(train_utils: ModuleType, *, reports: bool) -> type[Any]:
    """The peer's Trainer, which reports at every step or at none."""

    class Paced(train_utils.MyTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            step = self.state.global_step
            self.state.global_step = LOG_EVERY * (step + 1) if reports else LOG_EVERY * step + 1
            try:
                return super().compute_loss(model, inputs, return_outputs)
            finally:
                self.state.global_step = step

    return Paced


def main() -> None:
    """Settings: shape, precision, tokens_per_step, micro_batch, device, peer, attentions, reports."""
    pace = Pace()
    settings = pace.settings
    shape = Shape(**settings["shape"])
    cuda = settings["device"].startswith("cuda")
    if cuda:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    checkout = Path(settings["peer"])
    train_utils = peer_module(checkout, "train_utils")
    model = PeerModel(
        peer_module(checkout, "model_utils"),
        shape.sizes,
        norm="free",
        activation="relu",
        output_attentions=settings["attentions"],
    )
    sequences = settings["tokens_per_step"] // shape.context
    micro_batch = settings["micro_batch"]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=NEVER,
            bf16=settings["precision"] == "bfloat16",
            fp16=settings["precision"] == "float16",
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=sequences // micro_batch,
            learning_rate=1e-3,
            warmup_steps=100,
            weight_decay=0.1,
            max_grad_norm=1.0,
            lr_scheduler_type="polynomial",
            logging_steps=500,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not cuda,
        )
        arguments.past_index = -1
        trainer = trainer_class(train_utils, reports=settings["reports"])(
            model=model,
            args=arguments,
            train_dataset=RandomRows(shape, max(1024, 2 * sequences)),
            callbacks=[PaceCallback(pace)],
        )
        trainer.entropy_logging_callback = train_utils.EntropyLoggingCallback(f"{directory}/entropy", shape.n_layer)
        trainer.nan_count_logging_callback = train_utils.NaNCountLoggingCallback(f"{directory}/nans", shape.n_layer)
        pace.details = {"micro_batch": micro_batch, "optimizer": str(arguments.optim)}
        try:
            trainer.train()
        except Finished:
            pace.close()
        except torch.OutOfMemoryError:
            pace.out_of_memory()


if __name__ == "__main__":
    main()
