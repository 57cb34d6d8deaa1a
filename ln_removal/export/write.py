"""Write LN-free models to disk: folded and verified first, then under a temporary name and renamed, so nothing is half there.

A model comes from a training that has just ended, from a run (folded from its newest checkpoint where it was not exported
yet), from a model that ln-pretrain trained without any norm, from an LN-free model's directory, or from a published LN-free model
with disarmed norms, here or on the Hub.

`ln-export --with-code` puts the model's code beside its weights, for a transformers without ln-removal. transformers runs such
a file only when the user passes trust_remote_code=True. With ln-removal imported it is not needed, and what is loaded is the
installed class.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from ln_removal.errors import UserError
from ln_removal.export.convert import check_conversion, from_disarmed, has_disarmed_norms
from ln_removal.export.stock import check_stock_form, stock_config, to_stock
from ln_removal.export.verify import TOLERANCE, ExportError, logits_error, verify_export
from ln_removal.files.atomic import check_room, is_full, shortage, written_whole
from ln_removal.files.hub import is_hub_id, one_line
from ln_removal.models.families import family_of, is_norm_choice, is_norm_free
from ln_removal.models.loading import quiet_transformers
from ln_removal.models.norm_free import from_folded, from_norm_choice, norm_free_config
from ln_removal.models.precision import export_bytes
from ln_removal.models.registration import MODEL_CLASSES
from ln_removal.norms.surgery import fold

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ln_removal.config.recipe import ExportSpec

Format = Literal["normfree", "stock"]
DIRECTORIES: dict[Format, str] = {"normfree": "model", "stock": "stock"}
CONFIGURATION: dict[Format, Callable[[PretrainedConfig], PretrainedConfig]] = {
    "normfree": norm_free_config,
    "stock": stock_config,
}

logger = logging.getLogger(__name__)

CHECK_TOKENS = 256
"""Positions of the random token sequences on which the written form is compared with its source."""


def add_modelling_file(directory: Path) -> None:
    """Copy the source of an LN-free model's classes beside its weights and name them in config.json.

    The file is called modeling_ and the name of the module, as transformers calls such files.

    Raises:
        OSError: the directory cannot be written.
    """
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    module, config_class, model_class = MODEL_CLASSES[config["model_type"]]
    name = f"modeling_{module.rpartition('.')[2]}"
    (directory / f"{name}.py").write_text(inspect.getsource(import_module(module)), encoding="utf-8")
    config["auto_map"] = {"AutoConfig": f"{name}.{config_class}", "AutoModelForCausalLM": f"{name}.{model_class}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_tokenizer_for_all(directory: Path) -> None:
    """Call a tokenizer that is only a tokenizer.json by the name that transformers 4 and 5 know.

    transformers 5 writes "TokenizersBackend", which tools that need transformers 4 cannot load.

    Raises:
        OSError: the directory cannot be written.
    """
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_savable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    formats: Sequence[Format] = (),
    *,
    dtype: str = "float32",
) -> None:
    """Save, once before a training, all that its result consists of besides weights, so that no mistake in it shows at the end.

    Args:
        model: what is trained; its configuration and generation configuration are saved, to a temporary directory.
        tokenizer: saved beside it.
        formats: also save the configurations of these forms of a model of a known family.
        dtype: precision of the weights of these forms.

    Raises:
        UserError: transformers refuses to save one of them, or one is wrong in `dtype`.
    """
    if "stock" in formats:
        check_stock_form(model.config, dtype)

    def save(part: str, place: str) -> None:
        if part == "config.json":
            for config in (model.config, *(CONFIGURATION[form](model.config) for form in formats)):
                config.save_pretrained(place)
        elif part == "tokenizer":
            tokenizer.save_pretrained(place)
        elif model.generation_config is not None:
            model.generation_config.save_pretrained(place)

    with TemporaryDirectory() as temporary, quiet_transformers():
        for part in ("config.json", "generation_config.json", "tokenizer"):
            try:
                save(part, temporary)
            except OSError:  # no file of the model is at fault
                raise
            except Exception as error:
                raise UserError(
                    f"the {part} of the model cannot be saved again, so nothing made from the model could be: {one_line(error)}; "
                    "correct it in the model's directory first"
                    + (
                        " (without this file, the settings are those of config.json)"
                        if part.startswith("generation")
                        else ""
                    )
                ) from error


def write_exports(
    frozen: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    held_out: npt.NDArray[np.int64],
    export: ExportSpec,
) -> PreTrainedModel:
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
    folded = from_folded(frozen.config, fold(frozen), frozen.generation_config)
    verify_export(frozen, folded, tokens)
    for form in export.formats:
        write_format(folded, tokenizer, out / DIRECTORIES[form], form=form, tokens=tokens, dtype=export.dtype)
    return folded


def write_format(
    folded: PreTrainedModel,
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
            f"the stock form's logits differ from the LN-free model's by {error:.2e} relative, more than {TOLERANCE:.0e}; where "
            "the model was trained further after its norms were folded, or has a residual stream above 10^4, there is no stock form; "
            "use --format normfree"
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
            name_tokenizer_for_all(temporary)
            if with_code:
                add_modelling_file(temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        room = f"; {shortage(directory, needed)}" if is_full(error) else ""
        raise UserError(
            f"cannot write {directory}: {reason}{room}; free some space and run this again (a training: with --resume), or choose "
            "another --out"
        ) from error


def export_model(
    source: Path | str,
    out: Path | str,
    *,
    form: Format,
    dtype: str = "float32",
    tokenizer: str | Path | None = None,
    with_code: bool = False,
    split_qkv: bool = False,
) -> float:
    """Write `source` to `out` in a format, and load it back to compare.

    Args:
        source: a run of `ln-remove`, an LN-free model's directory, or a published LN-free model: its directory or Hub id.
        out: a directory that does not exist yet, or is empty.
        form: "normfree" or "stock".
        dtype: precision of the weights written.
        tokenizer: a model to take the tokenizer from; default: the source's own.
        with_code: put the modelling file beside a normfree model, for users without ln-removal.
        split_qkv: write queries, keys and values of a normfree model as linear maps of their own.

    Returns:
        The largest relative difference between the logits of what was written and of the source in float32.

    Raises:
        UserError: `source` is none of these, its sites are not all frozen, it has no tokenizer, or `out` is in use.
    """
    from ln_removal.models.loading import load_model

    out = Path(out)
    if with_code and form != "normfree":
        raise UserError("the stock form needs no code of its own; leave out --with-code, or use --format normfree")
    if split_qkv and form != "normfree":
        raise UserError("a stock GPT-2 has one matrix for q, k and v; leave out --split-qkv, or use --format normfree")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already in use; choose another --out")
    model, own_tokenizer = open_source(source, tokenizer=tokenizer)
    family = family_of(model.config)
    if split_qkv and family.joint != "columns":
        has = "" if family.joint else ", and this one has a linear map for each already"
        raise UserError(f"--split-qkv is for GPT-2; this is a {family.title}{has}; leave it out")
    check_savable(model, own_tokenizer, [form], dtype=dtype)
    tokens = _check_tokens(model, rows=4)
    reference = from_folded(model.config, model.state_dict()).float()
    if split_qkv:
        model = from_folded(model.config, model.state_dict(), split_qkv=True)
    write_format(model, own_tokenizer, out, form=form, tokens=tokens, dtype=dtype, with_code=with_code)
    return logits_error(reference, load_model(str(out)).model, tokens)


def open_source(
    source: Path | str, *, tokenizer: str | Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The LN-free model of a run, a directory or a Hub id, with its tokenizer.

    Args:
        source: as for `export_model`.
        tokenizer: a model to take the tokenizer from; default: the source's own.

    Raises:
        UserError: there is none: not a run, not an LN-free model, or a run that is not frozen yet.
    """
    from ln_removal.files.run_directory import RECIPE_FILE
    from ln_removal.models.loading import EMBEDDED_MODEL, NoTokenizerError, load_model, load_tokenizer

    name, path = str(source), Path(source)
    if not path.exists() and name != EMBEDDED_MODEL and not ("/" in name and is_hub_id(name)):
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
    model_type, family = loaded.model.config.model_type, family_of(loaded.model.config)
    if is_norm_free(loaded.model.config):
        # A configuration of our own, without a modelling file's entries.
        model = loaded.model
        return from_folded(model.config, model.state_dict(), model.generation_config), loaded.tokenizer
    if is_norm_choice(loaded.model.config):
        converter = _trained_without_norms
    elif model_type != family.model_type:
        raise UserError(
            f"{name} is a {model_type} model, which has nothing left to fold; load it as it is (its README.md says how)"
        )
    elif not has_disarmed_norms(loaded.model):
        raise UserError(
            f"{name} is a {model_type} model with its {family.norm_name}s, not an LN-free one; remove them first "
            f"with ln-remove --model {name}"
        )
    else:
        converter = _with_disarmed_norms
    try:
        return converter(loaded.model), loaded.tokenizer
    except UserError as error:
        raise type(error)(f"{name}: {error}") from error


def _with_disarmed_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The LN-free form of a model with disarmed norms, compared with it."""
    converted = from_disarmed(model)
    check_conversion(model, converted, _check_tokens(converted, rows=32, length=16))
    return converted


def _trained_without_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The LN-free form of a model that ln-pretrain trained without any norm, compared with it."""
    converted = from_norm_choice(model)
    wide, own = (copy.deepcopy(one).double() for one in (model, converted))
    error = logits_error(wide, own, _check_tokens(converted, rows=2))
    if not error <= TOLERANCE:
        raise ExportError(f"the LN-free form's logits differ from the model's by {error:.2e} relative")
    return converted


def _check_tokens(model: PreTrainedModel, *, rows: int, length: int = CHECK_TOKENS) -> Tensor:
    """(rows, T) random tokens, T as asked for or the model's context."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        model.config.vocab_size, (rows, min(length, model.config.max_position_embeddings)), generator=generator
    )


def _fold_checkpoint(run: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from ln_removal.evaluation.scoring import recipe_of
    from ln_removal.models.checks import first_token
    from ln_removal.models.identity import model_of_run
    from ln_removal.models.loading import load_model
    from ln_removal.norms.surgery import install
    from ln_removal.training.checkpoint import load_newest
    from ln_removal.training.low_rank import adapt, merge

    recipe = recipe_of(run)
    if recipe.schedule is None:
        raise UserError(
            f"{run} is a run of ln-pretrain; only what ln-remove has made LN-free can be exported: name such a run"
        )
    loaded = load_model(model_of_run(run, recipe.model))
    install(
        loaded.model,
        eot_token_id=loaded.tokenizer.eos_token_id,
        bos_token_id=first_token(loaded.tokenizer, loaded.model.config),
        **recipe.freezing,
    )
    if recipe.training.lora_rank is not None:
        adapt(loaded.model, recipe.training.lora_rank)
    state, faults = load_newest(run / "state", loaded.model, None)
    if state is None:
        raise UserError(f"{run} has no checkpoint yet; continue it with ln-remove --out {run} --resume")
    for fault in faults:
        logger.warning("passed over: %s", fault)
    merge(loaded.model)
    loaded.model.eval()
    folded = from_folded(loaded.model.config, fold(loaded.model), loaded.model.generation_config)
    verify_export(loaded.model, folded, _check_tokens(folded, rows=2))
    return folded, loaded.tokenizer
