"""Write models to disk: folded and verified first, then under a temporary name and renamed, so nothing is half there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError

from ln_removal.atomic_directory import written_whole
from ln_removal.disk_space import check_room, is_full, shortage
from ln_removal.errors import UserError
from ln_removal.export.modelling_file import add_modelling_file
from ln_removal.export.normfree_gpt2 import NormFreeGPT2LMHeadModel, from_folded
from ln_removal.export.stock import to_stock
from ln_removal.export.verify import TOLERANCE, ExportError, logits_error, verify_export
from ln_removal.models import quiet_transformers
from ln_removal.surgery import fold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.recipe import ExportSpec

Format = Literal["normfree", "stock"]
DIRECTORIES: dict[Format, str] = {"normfree": "model", "stock": "stock"}

BESIDE_WEIGHTS = 1 << 22
"""Bytes of a model's directory that are not weights, generously: the tokenizer of GPT-2 takes 3.6 MB."""


def write_exports(
    frozen: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    held_out: npt.NDArray[np.int64],
    export: ExportSpec,
) -> NormFreeGPT2LMHeadModel:
    """Fold a frozen model, check the result on held-out text, and write it in every format of the recipe.

    Args:
        frozen: with freezable norms, all frozen and special constants dropped; moved to the CPU in float32.
        tokenizer: saved beside the weights.
        out: run directory; `out/model` and `out/stock` are written.
        held_out: token ids (B, T) for the check.
        export: formats and precision.

    Raises:
        ExportError: the folded or stock model does not compute what the frozen one does; nothing is written.
        UserError: a directory cannot be written.
    """
    frozen = frozen.to(device="cpu", dtype=torch.float32).eval()
    tokens = torch.from_numpy(held_out)
    folded = from_folded(frozen.config, fold(frozen))
    verify_export(frozen, folded, tokens)
    for form in export.formats:
        write_format(folded, tokenizer, out / DIRECTORIES[form], form=form, tokens=tokens, dtype=export.dtype)
    return folded


def write_format(
    folded: NormFreeGPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    form: Format,
    tokens: torch.Tensor,
    dtype: str = "float32",
    with_code: bool = False,
) -> None:
    """Write an LN-free model in one format; the stock form is compared with it first.

    Args:
        with_code: put the modelling file beside a normfree model; the stock form needs none.

    Raises:
        ExportError: the stock form's logits differ.
        UserError: the directory cannot be written.
    """
    if form == "normfree":
        save_model(folded, tokenizer, directory, dtype=dtype, with_code=with_code)
        return
    stock = to_stock(folded)
    error = logits_error(folded, stock, tokens)
    if not error <= TOLERANCE:
        # Huge activations magnify float32 rounding; what counts then is whether the form is right in float64.
        wide = copy.deepcopy(folded).double()
        error = logits_error(wide, to_stock(wide), tokens)
    if not error <= TOLERANCE:
        raise ExportError(
            f"the stock form's logits differ from the LN-free model's by {error:.2e} relative, more than {TOLERANCE:.0e}; if the "
            "model was trained further after its norms were folded, it has no stock form; use --format normfree"
        )
    save_model(stock, tokenizer, directory, dtype=dtype)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    dtype: str = "float32",
    with_code: bool = False,
) -> None:
    """Save in Hugging Face format: into a temporary directory beside the target, which then takes its place.

    Args:
        with_code: also save the modelling file; for an LN-free model.

    Raises:
        UserError: the disk is full or the directory cannot be written; what was there before stays as it was.
    """
    wanted = getattr(torch, dtype)
    needed = export_bytes(model, dtype)
    try:
        check_room(directory, needed)
        # A copy, because .to() would change the caller's model.
        written = model if model.dtype == wanted else copy.deepcopy(model).to(dtype=wanted)
        with written_whole(directory) as temporary:
            with quiet_transformers():
                written.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            if with_code:
                add_modelling_file(temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        room = f"; {shortage(directory, needed)}" if is_full(error) else ""
        raise UserError(
            f"cannot write {directory}: {reason}{room}; free some space and run this again (a training: with --resume), or choose "
            "another --out"
        ) from error


def export_bytes(model: PreTrainedModel, dtype: str = "float32") -> int:
    """What `save_model` is going to write, in bytes; at most a few megabytes too high."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return count * getattr(torch, dtype).itemsize + BESIDE_WEIGHTS
