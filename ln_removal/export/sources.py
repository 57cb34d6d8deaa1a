"""What can be exported: a run of ln-remove, an LN-free model's directory, or a published LN-free model.

A run that was not exported yet is folded from its newest checkpoint; a published model (disarmed LayerNorms, here or on
the Hub) is converted to one without norms.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ln_removal.errors import UserError
from ln_removal.export.normfree_gpt2 import NormFreeGPT2LMHeadModel, from_folded
from ln_removal.export.published import check_conversion, from_disarmed, has_disarmed_norms
from ln_removal.export.verify import logits_error, verify_export
from ln_removal.export.writing import Format, write_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CHECK_TOKENS = 256
"""Positions of the random token sequences on which the written form is compared with its source."""


def export_model(
    source: Path | str,
    out: Path,
    *,
    form: Format,
    dtype: str = "float32",
    tokenizer: str | None = None,
    with_code: bool = False,
) -> float:
    """Write `source` to `out` in a format, and load it back to compare.

    Args:
        source: a run of `ln-remove`, an LN-free model's directory, or a published LN-free model: its directory or Hub id.
        out: a directory that does not exist yet, or is empty.
        form: "normfree" or "stock".
        dtype: precision of the weights written.
        tokenizer: a model to take the tokenizer from; default: the source's own.
        with_code: put the modelling file beside a normfree model, for users without ln-removal.

    Returns:
        The largest relative difference between the logits of what was written and of the source in float32.

    Raises:
        UserError: `source` is none of these, its sites are not all frozen, it has no tokenizer, or `out` is in use.
    """
    from ln_removal.models import load_model

    if with_code and form != "normfree":
        raise UserError("the stock form needs no code of its own; leave out --with-code, or use --format normfree")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already in use; choose another --out")
    model, own_tokenizer = open_source(source, tokenizer=tokenizer)
    tokens = _check_tokens(model, rows=4)
    reference = from_folded(model.config, model.state_dict()).float()
    write_format(model, own_tokenizer, out, form=form, tokens=tokens, dtype=dtype, with_code=with_code)
    return logits_error(reference, load_model(str(out)).model, tokens)


def open_source(
    source: Path | str, *, tokenizer: str | None = None
) -> tuple[NormFreeGPT2LMHeadModel, PreTrainedTokenizerBase]:
    """The LN-free model of a run, a directory or a Hub id, with its tokenizer.

    Args:
        source: as for `export_model`.
        tokenizer: a model to take the tokenizer from; default: the source's own.

    Raises:
        UserError: there is none: not a run, not an LN-free model, or a run that is not frozen yet.
    """
    from ln_removal.models import EMBEDDED_MODEL, NoTokenizerError, load_model, load_tokenizer
    from ln_removal.run_directory import RECIPE_FILE

    name, path = str(source), Path(source)
    if not path.is_dir() and name != EMBEDDED_MODEL and not _looks_like_a_hub_id(name):
        raise UserError(
            f"no such directory: {name}; give a run of ln-remove, the directory of an LN-free model, or the Hub id "
            "(OWNER/NAME) of a published one"
        )
    if (path / RECIPE_FILE).is_file():
        if (path / "model" / "config.json").is_file():
            return open_source(path / "model", tokenizer=tokenizer)
        folded, own = _fold_checkpoint(path)
        return folded, own if tokenizer is None else load_tokenizer(tokenizer)
    try:
        loaded = load_model(name, tokenizer_from=tokenizer)
    except NoTokenizerError as error:
        raise UserError(f"{error}, or name a model that has the same with --tokenizer (such as gpt2)") from error
    if isinstance(loaded.model, NormFreeGPT2LMHeadModel):
        # A configuration of our own, without a modelling file's entries.
        return from_folded(loaded.model.config, loaded.model.state_dict()), loaded.tokenizer
    if loaded.model.config.model_type != "gpt2":
        raise UserError(
            f"{name} is a {loaded.model.config.model_type} model, which nothing is left to be folded in; it loads as it is, see "
            "its README.md"
        )
    if not has_disarmed_norms(loaded.model):
        raise UserError(
            f"{name} is a {loaded.model.config.model_type} model with its LayerNorms, not an LN-free one; remove them first "
            f"with ln-remove --model {name}"
        )
    try:
        converted = from_disarmed(loaded.model)
        check_conversion(loaded.model, converted, _check_tokens(converted, rows=32, length=16))
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error
    return converted, loaded.tokenizer


def _looks_like_a_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    return bool(owner and model) and "/" not in model and not name.startswith((".", "~")) and not Path(owner).is_dir()


def _check_tokens(model: NormFreeGPT2LMHeadModel, *, rows: int, length: int = CHECK_TOKENS) -> Tensor:
    """(rows, T) random tokens, T as asked for or the model's context."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        model.config.vocab_size, (rows, min(length, model.config.max_position_embeddings)), generator=generator
    )


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
    verify_export(loaded.model, folded, _check_tokens(folded, rows=2))
    return folded, loaded.tokenizer
