"""What is checked of a model's files when they are loaded: configuration, weights and tokenizer.

transformers passes over some of what it finds there, and some of it breaks a training at its end. Each function here says so when
the model is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}
"""Prefixes of names of tensors, with what puts them there."""

ADAPTED = ("base_model.model.", ".base_layer.", "lora_")
"""Parts of the names that peft gives to the tensors of a model with an adapter."""

RUNTIME_FLAGS: dict[str, Any] = {
    "attn_implementation": None,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
"""Entries of a configuration that say how a model was run and not what it is, as they are loaded whatever config.json says.

Such a flag changes what a forward pass returns, or how it is computed, and transformers may refuse to save a training's result
with it.
"""

logger = logging.getLogger(__name__)


# -------------------------------------------------------------------------------------------------------- configuration


def check_activation(config: PretrainedConfig, path: Path) -> None:
    """Make sure that transformers knows the activation of a GPT-2 or GPT-NeoX.

    Raises:
        UserError: it does not; the message names the field of `path`.
    """
    from transformers.activations import ACT2FN

    field, usual = ("hidden_act", "gelu") if hasattr(config, "hidden_act") else ("activation_function", "gelu_new")
    if (activation := getattr(config, field)) not in ACT2FN:
        raise UserError(
            f"{path} is not a valid GPT-2 configuration: {field} is {activation!r}, which transformers does not know; the usual "
            f"one is {usual!r}, and the others are {', '.join(sorted(set(ACT2FN) - {usual}))}"
        )


def reset_runtime_flags(config: PretrainedConfig) -> None:
    """Reset what else says how a model was run: RUNTIME_FLAGS by other names."""
    config._attn_implementation = None
    if getattr(config, "gradient_checkpointing", False):
        config.gradient_checkpointing = False


def reset_generation_flags(model: PreTrainedModel) -> None:
    """Reset RUNTIME_FLAGS in settings for generation that transformers took from config.json, not from a file of their own."""
    settings = model.generation_config
    if settings is None or not settings._from_model_config:
        return
    usual = type(settings)()
    for flag in ("output_attentions", "output_hidden_states", "return_dict_in_generate"):
        if getattr(settings, flag) != getattr(usual, flag):  # an unchanged object is saved unchecked
            setattr(settings, flag, getattr(usual, flag))


# -------------------------------------------------------------------------------------------------------------- weights


def check_tensors(directory: Path, config: PretrainedConfig, report: dict[str, Any]) -> None:
    """Check that the weight files hold the tensors of the configuration. What they hold besides is left out with a warning.

    Args:
        directory: of the model.
        config: its configuration.
        report: the loading info of transformers' `from_pretrained`.

    Raises:
        UserError: tensors have other shapes, are missing, or are of an adapter.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise UserError(
            f"{directory}: config.json does not fit {len(mismatched)} of the weights, such as {key}: {tuple(found)} in "
            f"the file, {tuple(expected)} by config.json; use the config.json that the weights were saved with"
        )
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if adapted := [name for name in unexpected if any(part in name for part in ADAPTED)]:
        raise UserError(
            f"{directory}: the weights are of a model with an adapter, whose tensors GPT-2 does not have, such as {adapted[0]}; "
            "merge the adapter (with peft: model = model.merge_and_unload()) and save that model with save_pretrained"
        )
    if missing:
        raise UserError(
            f"{directory}: the weights lack {len(missing)} tensors of a {config.num_hidden_layers}-layer {config.model_type}, "
            f"such as {missing[0]}; {_found_instead(missing, unexpected)}"
        )
    if unexpected:
        left_out = f"{len(unexpected)} tensors unknown to {config.model_type}, such as {unexpected[0]}"
        logger.warning("%s: left out %s", directory, left_out)


def _found_instead(missing: Sequence[str], unexpected: Sequence[str]) -> str:
    """What the file has in place of missing tensors, and what to do; a wrapper of the model gives longer names to all of them."""
    for name in missing:
        for found in unexpected:
            prefix = found.removesuffix(name)
            if prefix != found and prefix.endswith("."):
                wrapper = next(
                    (wrapper for part, wrapper in WRAPPERS.items() if part in prefix), "a wrapper of the model"
                )
                return (
                    f"the file has {found} instead, with the prefix {prefix!r} of {wrapper}; save the model inside of the wrapper "
                    "with save_pretrained, or take the prefix off the names"
                )
    others = f"the file has {len(unexpected)} others, such as {unexpected[0]}; " if unexpected else ""
    return f"{others}save the model again with save_pretrained"


def check_finite(model: PreTrainedModel, directory: Path) -> None:
    """Raises UserError when a weight is NaN or infinite, because then every figure of a long run would be."""
    for name, weight in model.named_parameters():
        broken = weight.numel() - int(weight.isfinite().sum())
        if broken:
            raise UserError(
                f"{directory}: {broken:,} of the {weight.numel():,} weights in {name} are NaN or infinite; save the model again "
                "from a sound checkpoint"
            )


# ------------------------------------------------------------------------------------------------------------ tokenizer


def as_in_file(tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that tokenizer.json describes: `tokenizer`, or, where it is another one, one that is read from the file.

    transformers builds the tokenizers of some classes (GPT2Tokenizer among them) anew from vocabulary and merges. The normalizer
    and the pre-tokenizer are then those of the class, whatever the file says, and text becomes other ids.

    Args:
        tokenizer: what transformers' AutoTokenizer loaded.
        directory: where it was loaded from; without a tokenizer.json there is nothing to compare with.

    Raises:
        UserError: read from the file by itself it is still another one.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = directory / "tokenizer.json"
    if not path.is_file() or getattr(tokenizer, "backend_tokenizer", None) is None:
        return tokenizer
    file = Tokenizer.from_file(str(path))
    if not (changed := _differences(tokenizer, file)):
        return tokenizer
    vocabulary = file.get_vocab(with_added_tokens=True)
    # A class may know special tokens, such as the end of text, that the files do not name.
    named = {role: token for role, token in tokenizer.special_tokens_map.items() if str(token) in vocabulary}
    loader: Any = PreTrainedTokenizerFast
    read: PreTrainedTokenizerBase = loader.from_pretrained(directory, local_files_only=True, **named)
    if left := _differences(read, file):
        raise UserError(
            f"{path}: transformers reads its {left[0]} as another one, so text would become other tokens than by the file; save the "
            "tokenizer again with PreTrainedTokenizerFast(tokenizer_file=...).save_pretrained"
        )
    logger.warning(
        "%s: tokenizer_config.json names the class %s, which has a %s of its own; the tokenizer is the one of tokenizer.json",
        directory,
        type(tokenizer).__name__,
        " and a ".join(changed),
    )
    return read


def _differences(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> list[str]:
    """Which parts of a loaded tokenizer make other ids than the tokenizer of the file."""
    loaded: Tokenizer = tokenizer.backend_tokenizer
    ours, theirs = json.loads(loaded.to_str()), json.loads(file.to_str())
    parts = [part for part in ("normalizer", "pre_tokenizer") if ours[part] != theirs[part]]
    if _settings(ours["model"]) != _settings(theirs["model"]):
        parts.append("model")
    added = {token["content"]: token for token in ours["added_tokens"]}
    same = ("id", "single_word", "lstrip", "rstrip")
    if any(
        token["content"] not in added or any(added[token["content"]][key] != token[key] for key in same)
        for token in theirs["added_tokens"]
    ):
        parts.append("list of added tokens")
    explicit = {"add_bos_token", "add_eos_token"} & set(tokenizer.init_kwargs)
    if not explicit and tokenizer("", verbose=False)["input_ids"] != file.encode("").ids:
        parts.append("post_processor")
    return parts


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    """What a tokenizer's model consists of; None, "" and false say the same: nothing."""
    return {key: value for key, value in model.items() if value not in (None, "", False)}
