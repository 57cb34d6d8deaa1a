"""Hugging Face Trainer: plain on GPT2LMHeadModel, or with the LayerNorms of removing-layer-norm wrapped by its own code.

The second imports `train` from a checkout of submarat/removing-layer-norm (setting `peer`) and calls its
`replace_layernorm_with_fake_layernorm` on the model, then trains as its `finetune` does without the auxiliary loss: a plain
Trainer with the arguments of its `main`. Left out, in its favour: wandb logging of 48 values a step, and the printing callback.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import types
from collections import defaultdict
from typing import Any

import torch
from pacing import Finished, Pace
from shapes import Shape, random_tokens
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

NEVER = 10**6


class PaceCallback(TrainerCallback):
    """A step boundary after each optimizer step."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.steps_done()


class RandomRows(torch.utils.data.Dataset):
    """Rows of random tokens, (T,) each; labels are the inputs, as a causal collator makes them."""

    def __init__(self, shape: Shape, rows: int) -> None:
        tokens = random_tokens(shape, rows * shape.context).astype("int64")
        self._rows = torch.from_numpy(tokens).view(rows, shape.context)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def main() -> None:
    """Settings: shape, precision, weights, dropout, compile, tokens_per_step, micro_batch, device, peer."""
    pace = Pace()
    settings = pace.settings
    shape = Shape(**settings["shape"])
    cuda = settings["device"].startswith("cuda")
    if cuda:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    dropout = settings.get("dropout", 0.0)
    # A GPT-NeoX has no dropout unless its configuration says so.
    dropouts = {f"{name}_pdrop": dropout for name in ("resid", "embd", "attn")} if shape.family == "gpt2" else {}
    model = shape.model(attn_implementation="sdpa", **dropouts).to(getattr(torch, settings["weights"]))
    if settings.get("peer"):
        _wrap_layer_norms(model, settings["peer"])
    sequences = settings["tokens_per_step"] // shape.context
    micro_batch = min(settings["micro_batch"], sequences)
    accumulation = sequences // micro_batch
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=directory,
                max_steps=NEVER,
                bf16=settings["precision"] == "bfloat16",
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation,
                learning_rate=6e-4,
                warmup_steps=20,
                weight_decay=0.01,
                max_grad_norm=1.0,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr": 3e-4},
                logging_steps=1 if settings.get("peer") else 10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_num_workers=4 if cuda else 0,
                dataloader_pin_memory=cuda,
                torch_compile=settings["compile"],
                use_cpu=not cuda,
            ),
            train_dataset=RandomRows(shape, max(1024, 2 * sequences)),
            callbacks=[PaceCallback(pace)],
        )
        pace.details = {"micro_batch": micro_batch, "accumulation": accumulation, "optimizer": str(trainer.args.optim)}
        try:
            trainer.train()
        except Finished:
            pace.close()
        except torch.OutOfMemoryError:
            pace.out_of_memory()


def _wrap_layer_norms(model: PreTrainedModel, peer: str) -> None:
    """Replace LayerNorms by the peer's FakeLayerNorm with the peer's own function."""
    missing = [
        name
        for name in ("datasets", "wandb", "devtools", "docopt", "jaxtyping")
        if importlib.util.find_spec(name) is None
    ]
    sys.modules.update({name: _Stub(name) for name in missing})
    # Imports transformer_lens.HookedTransformer, which TransformerLens 4 no longer has; a training step does not use it.
    sys.modules["pile_eval"] = _Stub("pile_eval")
    sys.path.insert(0, peer)
    os.chdir(peer)  # It opens files beside it.
    import train as removing_layer_norm  # type: ignore[import-not-found]

    for name in missing:  # so that transformers does not take them for the real ones
        del sys.modules[name]
    if not hasattr(model.config, "n_ctx"):
        model.config.n_ctx = model.config.n_positions  # transformers 5 dropped the second name
    model.to(removing_layer_norm.device)
    constants: defaultdict[str, float] = defaultdict(lambda: 1.0)
    removing_layer_norm.replace_layernorm_with_fake_layernorm(model, constants, constants, momentum=0.9)


class _Stub(types.ModuleType):
    """A module that has every name; for packages that the peer imports and its step does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()


class _Anything:
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return Any


if __name__ == "__main__":
    main()
