"""Before the first step: device, attention, micro-batch and compilation."""

from __future__ import annotations

import ctypes
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from ln_removal.errors import UserError
from ln_removal.models.attention import explicit_attention, fused_attention
from ln_removal.models.precision import autocast
from ln_removal.norms.freezable import FreezableNorm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ln_removal.config.recipe import Recipe
    from ln_removal.training.loss import Objective

TOKENS_IN_A_CPU_PASS = 4096
LARGEST_MICRO_BATCH = 128
COMPILE_FROM_TOKENS = 400_000
"""On a CPU, compiling costs about as much time as it saves over this many tokens (measured: docs/LOG.md)."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30
"""Freed memory stays in the process up to this size, and so does every block that is smaller."""

RANKS_WAIT = timedelta(hours=3)
"""How long a rank waits for another. The main process prepares a corpus and scores models while the others wait."""

EXPLICIT_UP_TO_CONTEXT = 128
"""On a CPU, a compiled step of six layers of width 192 takes 0.72 of the time with explicit attention at T = 128, and 1.12 of it at
T = 256."""


def build_accelerator(device: str) -> Accelerator:
    """An Accelerator on `device` ("auto", "cpu" or "cuda"), for the ranks alone: the loop does its own autocast.

    Raises:
        UserError: CUDA was asked for and there is none, or this process has already trained on another device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        found = "no CUDA build of it" if torch.version.cuda is None else "no usable GPU"
        raise UserError(
            f"--device cuda: PyTorch {torch.__version__} finds {found} on this machine; use --device cpu, or install a CUDA "
            "build of PyTorch on a machine with a GPU"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {device!r}; use auto, cpu or cuda")
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    changed = UserError(f"--device {device}: this process has already trained on another device; start a new one")
    try:
        accelerator = Accelerator(
            cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[InitProcessGroupKwargs(timeout=RANKS_WAIT)]
        )
    except ValueError as error:
        raise changed from error
    if device != "auto" and accelerator.device.type != device:
        raise changed
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    return accelerator


def _keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc; elsewhere do nothing.

    A step frees hundreds of megabytes and soon asks for them again. By default glibc gives them back to the system in between, which
    then has to clear every page of them: a tenth of a training step at tiny shape (measured: docs/performance.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, KEPT_BYTES)


def training_attention(model: PreTrainedModel, *, context: int, shown: bool = False) -> AbstractContextManager[None]:
    """The fastest attention for full windows or for rows of documents, or one that returns its probabilities.

    Args:
        context: T. On a CPU and with few positions the probabilities fit into the caches; computing them explicitly is then
            faster than PyTorch's fused kernel (measured: docs/LOG.md).
        shown: the loss needs the probabilities.
    """
    if shown or (model.device.type == "cpu" and context <= EXPLICIT_UP_TO_CONTEXT):
        return explicit_attention(model)
    return fused_attention(model)


def choose_micro_batch(recipe: Recipe, objective: Objective, accelerator: Accelerator) -> int:
    """Sequences of one forward pass: the recipe's number, or the largest that fits if the recipe says "auto".

    On a GPU it tries the divisors of the batch, from the largest down. If not even one sequence fits, it tries them once more
    with `checkpoint_activations`. On a CPU it takes 4,096 tokens, because more is not faster there.

    Raises:
        UserError: a single sequence does not fit into the GPU's memory, or the ranks do not divide the global batch.
    """
    context = recipe.data.context
    sequences = recipe.training.tokens_per_step // context
    ranks = accelerator.num_processes
    if sequences % ranks:
        raise UserError(
            f"{sequences} sequences a step do not divide among {ranks} processes; change training.tokens_per_step or the "
            "number of processes"
        )
    share = sequences // ranks
    if recipe.training.micro_batch != "auto":
        return min(share, recipe.training.micro_batch)
    divisors = [size for size in range(share, 0, -1) if share % size == 0]
    if accelerator.device.type != "cuda":
        return next((size for size in divisors if size * context <= TOKENS_IN_A_CPU_PASS), 1)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(objective.model)
        for size in divisors:
            if size <= LARGEST_MICRO_BATCH and _fits(objective, size, recipe, accelerator):
                return size
    raise UserError(
        f"one sequence of {context} tokens does not fit into the memory of {torch.cuda.get_device_name()}; lower data.context "
        "or use a larger GPU"
    )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only the input of each block for the backward pass, which then computes the block once more.

    A sequence then needs about 4 bytes for each layer, token and unit of width, instead of 40 (see config/estimate.py), and a step
    takes about a third longer. The norms see each batch twice and count it twice, which does not change their means.
    """
    # The second is its name in older versions of transformers.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _fits(objective: Objective, size: int, recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether a forward and backward pass of `size` sequences fits beside the optimizer's two moments."""
    tokens = torch.zeros(size, recipe.data.context + 1, dtype=torch.int64, device=accelerator.device)
    inputs = [tokens] if recipe.data.windows == "stream" else [tokens, torch.zeros_like(tokens)]
    moments: list[torch.Tensor] = []
    objective.train()
    for module in objective.modules():
        if isinstance(module, FreezableNorm):
            module.eval()  # keeps the probe out of the running statistics
    try:
        for parameter in objective.parameters():
            if parameter.requires_grad:  # a teacher has no moments
                moments += [torch.empty_like(parameter), torch.empty_like(parameter)]
        with autocast(accelerator.device, recipe.training.precision):
            loss = objective(*inputs).total
        loss.backward()
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        moments.clear()
        objective.forget()
        objective.zero_grad(set_to_none=True)
        objective.train()
        torch.cuda.empty_cache()


def compile_if_worthwhile(
    objective: Objective, setting: bool | Literal["auto"], *, tokens: int, device: torch.device
) -> bool:
    """Compile the forward and backward pass of a whole step in place; returns whether it did.

    "auto" compiles on CUDA, and on a CPU with a C++ compiler if the run is long enough to save more time than compiling takes.

    Raises:
        UserError: `setting` is True on a machine without a C++ compiler.
    """
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if setting is True and compiler is None:
        raise UserError(
            "training.compile = true needs a C++ compiler (g++ or clang++), none was found; install one or set false"
        )
    wanted = setting is True or (
        setting == "auto" and compiler is not None and (device.type == "cuda" or tokens >= COMPILE_FROM_TOKENS)
    )
    if wanted:
        # Graphs that this process compiled for an earlier model would count against the number that is kept.
        torch.compiler.reset()
        from torch._inductor import config

        # An exponential is faster on a CPU than the tanh of GPT-2's GELU. Older versions of PyTorch have no such option.
        options = {"cpp.use_decompose_tanh": True} if hasattr(config.cpp, "use_decompose_tanh") else None
        objective.compile(dynamic=False, options=options)
    return wanted


@contextmanager
def compiler_faults() -> Iterator[None]:
    """A block in which a fault of PyTorch's compiler becomes a UserError.

    A process that was killed while it compiled can leave half a library in the compiler's cache, on which every later run would fail.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        inner = getattr(error, "inner_exception", error)
        first = (str(inner).strip() or "no reason given").splitlines()[0]
        reason = f"{type(inner).__name__}: {first[:300]}"
        raise UserError(
            f"PyTorch could not compile the training step ({reason}); a run that was killed while it compiled may have damaged the "
            f"compiler's cache: delete {cache_dir()} and run again, or set training.compile = false"
        ) from error
