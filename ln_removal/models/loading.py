"""Load a model, its configuration and its tokenizer: the embedded `tiny`, a local directory, or a Hub id.

A Hub id is fetched file by file into the Hub client's cache and then read as a local directory, so that every kind of
damage is found, and worded, in one place. Only safetensors are read, and no code from a model directory is ever run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ln_removal.errors import UserError
from ln_removal.files.hub import (
    HUB_SECONDS,
    first_answer,
    hub_error,
    is_hub_id,
    is_known_hub_id,
    is_unreachable,
    one_line,
    say_if_hidden,
)
from ln_removal.files.run_directory import RECIPE_FILE
from ln_removal.models.checks import (
    RUNTIME_FLAGS,
    as_in_file,
    check_causal,
    check_finite,
    check_no_look_ahead,
    check_size_of_weights,
    check_sizes,
    check_tensors,
    reset_generation_flags,
    reset_runtime_flags,
)
from ln_removal.models.families import known_family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "tiny"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja"),
)
NO_LIMIT = 1 << 30
"""Positions of a model whose configuration names no limit, such as one without positions."""

_POSITION_FIELDS = ("max_position_embeddings", "seq_length", "max_seq_len", "n_ctx", "max_seq_length")
"""Under one of these names a configuration has the longest text that the model reads."""
ADAPTER = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

logger = logging.getLogger(__name__)


class NoTokenizerError(UserError):
    """A model without a tokenizer beside it."""


@dataclass(frozen=True)
class LoadedModel:
    """A language model in evaluation mode, the tokenizer that belongs to it, and the name it was asked for by."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_model(
    name: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    tokenizer_from: str | Path | None = None,
) -> LoadedModel:
    """Load a causal language model that transformers or this project knows, and its tokenizer.

    Args:
        name: `tiny`, a directory in Hugging Face format, or a Hub id, which may have a commit or a branch: `gpt2@main`.
        device: where to put the weights, such as `cpu` or `cuda`.
        dtype: floating-point type of the weights; float32 by default, whatever the file holds.
        tokenizer_from: a model to take the tokenizer from, for one that has none of its own.

    Raises:
        UserError: when there is no such model, the Hub is out of reach, a file is missing or damaged, the weights are
            only there as a pickle, it is no causal language model, the device does not exist, or the tokenizer has
            more entries than the model's embedding.
    """
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was asked for, but PyTorch sees no CUDA GPU; pass --device cpu")
    directory = model_directory(name, weights=True, tokenizer=tokenizer_from is None)
    config = _read_config(directory)
    check_size_of_weights(config, directory, _check_weight_files(directory))
    tokenizer = _read_tokenizer(directory) if tokenizer_from is None else load_tokenizer(tokenizer_from)
    check_tokenizer(config, tokenizer)
    model = _read_weights(directory, config, dtype or torch.float32)
    check_finite(model, directory)
    if known_family(config) is None:
        check_no_look_ahead(model, directory)
    return LoadedModel(model.to(device).eval(), tokenizer, str(name))


def _read_weights(directory: Path, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory whose files are in order; UserError where its weights do not fit its configuration."""
    import transformers

    generation = directory / GENERATION
    if generation.is_file() and not isinstance(_read_json(generation), dict):  # transformers would pass over it
        raise UserError(f"{generation} holds no JSON object with settings; copy or download it again, or delete it")
    loader: Any = transformers.AutoModelForCausalLM
    try:
        with quiet_transformers():
            model, report = loader.from_pretrained(
                directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with the names
            )
    except Exception as error:
        raise UserError(
            f"{directory} does not load as {config.model_type}: {one_line(error)}; save the model again with save_pretrained"
        ) from error
    check_tensors(directory, config, report)
    reset_generation_flags(model)
    return cast("PreTrainedModel", model)


def load_config(name: str | Path) -> PretrainedConfig:
    """The configuration of a model, without its weights (of a Hub id only config.json is fetched).

    Raises:
        UserError: as `load_model`.
    """
    return _read_config(model_directory(name))


def positions_of(config: PretrainedConfig) -> int:
    """The longest text that a model reads, in tokens; NO_LIMIT where its configuration does not say."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITION_FIELDS)
    return next((size for size in found if type(size) is int and size > 0), NO_LIMIT)


def trainable_positions(config: PretrainedConfig) -> int:
    """The longest text that a model of a known family reads as it was trained to, without a sliding window that forgets.

    The attention of a training has no window, and up to its length neither has the model's own.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return min(positions_of(config), NO_LIMIT if window is None else window)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of a directory or Hub repository that holds only a tokenizer.

    Raises:
        UserError: as `load_model`.
    """
    return _read_tokenizer(model_directory(name, config=False, tokenizer=True))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over what decides how text becomes ids: vocabulary, merges, normalizer, pre-tokenizer, added tokens.

    Truncation and padding, which calls switch on and off, and the decoder are left out.

    Raises:
        UserError: when it is not a fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer; load one that has a tokenizer.json")
    state = json.loads(backend.to_str())
    model = state["model"]
    if "merges" in model:  # two notations for the same merges
        model["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    kept = {key: state[key] for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def check_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that every id the tokenizer can give has a row in the model's embedding.

    Raises:
        UserError: when the vocabulary is larger than the embedding.
    """
    entries, rows = max(tokenizer.get_vocab().values(), default=-1) + 1, config.get_text_config().vocab_size
    if entries > rows:
        raise UserError(
            f"the tokenizer has {entries} entries and the model's embedding {rows} rows; use the "
            "tokenizer that the model was trained with"
        )


def model_directory(name: str | Path, *, config: bool = True, weights: bool = False, tokenizer: bool = False) -> Path:
    """The directory that holds what is asked for, fetched first when `name` is a Hub id.

    Raises:
        UserError: there is no such directory, or the Hub does not have it.
    """
    name = str(name)
    if name == EMBEDDED_MODEL:
        from ln_removal.files.resources import embedded_model_directory

        return embedded_model_directory()
    path = Path(name).expanduser()
    if path.is_dir():
        say_if_hidden(name, path)
        return path
    if path.exists():
        raise UserError(f"{name} is a file; give the directory that holds config.json and {WEIGHTS}")
    if not is_hub_id(name):
        raise UserError(f"no such directory: {name}; give one with config.json and {WEIGHTS}, or a Hub id such as gpt2")
    repo_id, _, revision = name.partition("@")
    return _fetch(repo_id, revision or None, config=config, weights=weights, tokenizer=tokenizer)


def _fetch(repo_id: str, revision: str | None, *, config: bool, weights: bool, tokenizer: bool) -> Path:
    """Fetch the named kinds of files of a Hub model into the client's cache; the directory they lie in, named after the commit."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    short = Path(repo_id).name
    advice = (
        f"download on another machine with `hf download {repo_id} --local-dir {short}`, copy that folder here and "
        + (f"pass --model ./{short}" if config else f"name ./{short} in its place")
    )
    try:
        info = first_answer(lambda: HfApi().model_info(repo_id, revision=revision, timeout=HUB_SECONDS - 2))
    except HFValidationError:
        raise UserError(f"{repo_id!r} is no directory and no valid Hub id; give ./DIRECTORY or OWNER/NAME") from None
    except Exception as error:
        names = ("config.json", *TOKENIZER_FILES)
        cached = (try_to_load_from_cache(repo_id, name, revision=revision) for name in names)
        copy = next((Path(path) for path in cached if isinstance(path, str)), None)
        is_pinned = (
            copy is not None and copy.parent.name == revision
        )  # a commit does not change, whatever became of the repository
        if copy is not None and (is_pinned or is_unreachable(error)):
            logger.warning("the Hub is out of reach; using the copy of %s that was downloaded before", repo_id)
            return copy.parent
        raise hub_error(error, "model", repo_id, advice) from error

    files = {sibling.rfilename for sibling in info.siblings or ()}
    wanted = [_required("config.json", files, repo_id)] if config else []
    if tokenizer:
        _require_tokenizer(files, repo_id)
        wanted += [name for name in TOKENIZER_FILES if name in files]
    sharded = weights and WEIGHTS not in files and WEIGHTS_INDEX in files
    if weights:
        wanted.append(WEIGHTS_INDEX if sharded else _required(WEIGHTS, files, repo_id))
        wanted += [GENERATION] if GENERATION in files else []
    try:
        # The first file notes in the cache what the main branch is now; the others come from the same commit.
        directory = Path(hf_hub_download(repo_id, wanted[0], revision=revision)).parent
        for name in wanted[1:]:
            hf_hub_download(repo_id, name, revision=directory.name)
        for name in _shards(directory / WEIGHTS_INDEX) if sharded else ():
            hf_hub_download(repo_id, name, revision=directory.name)
    except UserError:
        raise
    except Exception as error:
        raise hub_error(error, "model", repo_id, advice) from error
    return directory


def _read_config(directory: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if (directory / RECIPE_FILE).is_file() and (directory / "model" / "config.json").is_file():
        hub = f", or {directory}@main for the Hub's" if is_known_hub_id(str(directory)) else ""
        raise UserError(f"{directory} is a run, not a model; give its model, {directory / 'model'}{hub}")
    path = directory / _required("config.json", _names(directory), str(directory))
    raw = _read_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds no JSON object with the settings of a model; copy or download it again")
    check_causal(raw, directory)
    kind = str(raw["model_type"])
    try:
        loader: Any = AutoConfig
        config: PretrainedConfig = loader.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **RUNTIME_FLAGS
        )
    except Exception as error:
        raise UserError(f"{path} is not a valid {kind} configuration: {one_line(error)}; correct it") from error
    check_sizes(config, path)
    reset_runtime_flags(config)
    return config


def _read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    _require_tokenizer(_names(directory), str(directory))
    loader: Any = AutoTokenizer
    try:
        with quiet_transformers():
            tokenizer = loader.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            return as_in_file(tokenizer, directory)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the tokenizer in {directory} does not load: {one_line(error)}; save it again") from error


def _check_weight_files(directory: Path) -> int:
    """Open every safetensors header, so that a truncated or foreign file is named before transformers trips over it.

    Returns:
        How many numbers the files hold.
    """
    from safetensors import SafetensorError, safe_open

    names = _names(directory)
    if ADAPTER in names and names & {WEIGHTS, WEIGHTS_INDEX}:
        raise UserError(  # with the package peft installed, transformers would load the model that it names instead
            f"{directory} holds the weights of a model and {ADAPTER}, the configuration of an adapter, which other tools may load "
            f"in its place; if the adapter is merged into the weights, delete {ADAPTER}"
        )
    count = 0
    for file in weight_files(directory):
        path = directory / file
        try:
            with safe_open(path, framework="pt") as opened:
                held = opened.keys()
                count += sum(math.prod(opened.get_slice(name).get_shape()) for name in held)
        except (SafetensorError, OSError) as error:
            found = f"{path.stat().st_size:,} bytes; {one_line(error)}" if file in names else "no such file"
            raise UserError(f"{path} is not a whole safetensors file ({found}); copy or download it again") from error
    return count


def weight_files(directory: Path) -> list[str]:
    """The names of the files in a model's directory that hold its weights, sorted.

    Raises:
        UserError: there are none, or their index is damaged.
    """
    names = _names(directory)
    sharded = WEIGHTS not in names and WEIGHTS_INDEX in names
    return _shards(directory / WEIGHTS_INDEX) if sharded else [_required(WEIGHTS, names, str(directory))]


def _shards(index: Path) -> list[str]:
    """The weight files that an index names: files beside it, wherever else it may point."""
    raw = _read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{index} names no weight files; copy or download it again")
    if outside := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise UserError(f"{index} names {outside[0]!r}, no safetensors file beside it; do not use this model")
    return sorted(set(names))


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


def _required(name: str, files: set[str], where: str) -> str:
    """`name`, when it is among `files`; otherwise an error that says what is there instead."""
    if name in files:
        return name
    pickles = sorted(file for file in files if file.endswith(PICKLE_SUFFIXES) and "training" not in file)
    if name == WEIGHTS and pickles:
        folder = where if Path(where).is_dir() else Path(where).name
        download = "" if folder == where else f"run `hf download {where} --local-dir {folder}` and, "
        raise UserError(
            f"{where} has no {WEIGHTS}, only {pickles[0]}, a pickle, which can run code and is never loaded; {download}"
            'if you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    if ADAPTER in files:
        raise UserError(f"{where} holds an adapter ({ADAPTER}), not a model; merge it into its model and save that")
    raise UserError(f"{where} has no {name}; found: {_listing(files)}")


def _require_tokenizer(files: set[str], where: str) -> None:
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise NoTokenizerError(
            f"{where} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); found: {_listing(files)}; save "
            "one there with tokenizer.save_pretrained"
        )


def _listing(files: set[str], limit: int = 6) -> str:
    more = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(sorted(files)[:limit]) + more if files else "nothing"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({one_line(error)}); copy or download it again") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading report and progress bar; what matters in the report is checked and raised here."""
    import transformers

    messages: Any = transformers.logging
    verbosity, bars = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()
