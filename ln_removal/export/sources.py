"""What can be exported: a finished run, a run whose checkpoint is fully frozen, or the directory of an LN-free model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ln_removal.errors import UserError
from ln_removal.export.normfree_gpt2 import NormFreeGPT2LMHeadModel, from_folded
from ln_removal.export.verify import logits_error, verify_export
from ln_removal.export.writing import Format, write_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHECK_TOKENS = 256
"""Positions of the random token sequences on which the written form is compared with its source."""


def export_model(source: Path, out: Path, *, form: Format, dtype: str = "float32") -> float:
    """Write `source` to `out` in a format, and load it back to compare.

    Args:
        source: a run of `ln-remove`, or an LN-free model's directory.
        out: a directory that does not exist yet, or is empty.
        form: "normfree" or "stock".
        dtype: precision of the weights written.

    Returns:
        The largest relative difference between the logits of what was written and of the source in float32.

    Raises:
        UserError: `source` is neither, its sites are not all frozen, or `out` is in use.
    """
    from ln_removal.models import load_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already in use; choose another --out")
    model, tokenizer = open_source(source)
    generator = torch.Generator().manual_seed(0)
    length = min(CHECK_TOKENS, model.config.n_positions)
    tokens = torch.randint(model.config.vocab_size, (4, length), generator=generator)
    reference = from_folded(model.config, model.state_dict()).float()
    write_format(model, tokenizer, out, form=form, tokens=tokens, dtype=dtype)
    return logits_error(reference, load_model(str(out)).model, tokens)


def open_source(source: Path) -> tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The LN-free model of a run or a directory, with its tokenizer.

    Raises:
        UserError: there is none: not a run, not an LN-free model, or a run that is not frozen yet.
    """
    from ln_removal.models import EMBEDDED_MODEL, load_model
    from ln_removal.run_directory import RECIPE_FILE

    if not source.is_dir() and str(source) != EMBEDDED_MODEL:
        raise UserError(f"no such directory: {source}; give a run of ln-remove, or the directory of an LN-free model")
    if (source / RECIPE_FILE).is_file():
        if (source / "model" / "config.json").is_file():
            return open_source(source / "model")
        return _fold_checkpoint(source)
    loaded = load_model(str(source))
    if not isinstance(loaded.model, NormFreeGPT2LMHeadModel):
        raise UserError(
            f"{source} is a {loaded.model.config.model_type} model with its LayerNorms, not an LN-free one; remove them first "
            f"with ln-remove --model {source}"
        )
    return loaded.model, loaded.tokenizer


def _fold_checkpoint(run: Path) -> tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]:
    from ln_removal.evaluation.run_models import recipe_of
    from ln_removal.models import load_model
    from ln_removal.surgery import fold, install
    from ln_removal.training.state import load_newest

    recipe = recipe_of(run)
    if recipe.schedule is None:
        raise UserError(f"{run} is a run of ln-pretrain; only what ln-remove has made LN-free can be exported")
    loaded = load_model(recipe.model)
    install(loaded.model, eot_token_id=loaded.tokenizer.eos_token_id)
    state, faults = load_newest(run / "state", loaded.model, None)
    if state is None:
        raise UserError(f"{run} has no checkpoint yet; continue it with ln-remove --out {run} --resume")
    for fault in faults:
        logger.warning("passed over: %s", fault)
    loaded.model.eval()
    folded = from_folded(loaded.model.config, fold(loaded.model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(
        folded.config.vocab_size, (2, min(CHECK_TOKENS, folded.config.n_positions)), generator=generator
    )
    verify_export(loaded.model, folded, tokens)
    return folded, loaded.tokenizer
