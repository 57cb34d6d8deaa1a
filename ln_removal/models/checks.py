"""What is checked of a model's files when they are loaded: configuration, weights and tokenizer.

transformers passes over some of what it finds there, and some of it breaks a training at its end. Each function here says so when
the model is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ln_removal.errors import UserError
from ln_removal.files.hub import one_line
from ln_removal.models.families import FAMILIES, SIZES, known_families, known_family
from ln_removal.models.registration import MODEL_CLASSES

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


def check_causal(raw: Mapping[str, Any], directory: Path) -> None:
    """Make sure that a config.json is of a causal language model of transformers or of this project.

    No code from the directory is ever run, so a model that brings its own class is not one of these. An encoder such as BERT is not
    one either, although transformers can load it as one.

    Args:
        raw: the contents of config.json.
        directory: of the model.

    Raises:
        UserError: it is not.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    kind, named = raw.get("model_type"), raw.get("architectures")
    described = f"config.json says model_type {kind!r}, architectures {named}"
    if kind in MODEL_CLASSES:
        return
    if not isinstance(kind, str) or kind not in KNOWN:
        raise UserError(
            f"{directory} is not a causal language model that transformers knows: {described}; name one, such as a "
            f"{known_families()} (code that comes with a model is never run)"
        )
    expected = KNOWN[kind] if isinstance(KNOWN[kind], str) else KNOWN[kind][0]
    if kind not in FAMILIES and isinstance(named, list) and named and expected not in named:
        raise UserError(
            f"{directory} is not a causal language model: {described}, where {expected} would be one; name one that predicts "
            "each token from those before it"
        )


def check_sizes(config: PretrainedConfig, path: Path) -> None:
    """Make sure that the sizes of a configuration are whole numbers above 0, its heads fit, and its activation is known.

    Of a model outside of the known families only the vocabulary is looked at: others have other fields.

    Raises:
        UserError: the message names the field of `path`.
    """
    text = config.get_text_config()
    known = known_family(config)
    kind = config.model_type if known is None else known.title

    def fault(what: str) -> UserError:
        return UserError(f"{path} is not a valid {kind} configuration: {what}")

    fields = ["vocab_size"] if known is None else list(SIZES.values())
    for name in fields:
        size = getattr(text, name, None)
        if type(size) is not int or size < 1:
            shown = next(ours for ours, theirs in SIZES.items() if theirs == name) if kind == "GPT-2" else name
            raise fault(f"{shown} is {size!r}; it must be a whole number above 0")
    if known is None:
        return
    width, heads, groups = text.hidden_size, text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    names = ("n_embd", "n_head") if kind == "GPT-2" else ("hidden_size", "num_attention_heads")
    if width % heads and getattr(text, "head_dim", None) in (None, width // heads):
        raise fault(f"{names[0]} {width} is no multiple of {names[1]} {heads}; correct it")
    if groups is not None and (type(groups) is not int or groups < 1 or heads % groups):
        raise fault(f"num_key_value_heads is {groups!r}, which does not divide the {heads} heads; correct it")
    from transformers.activations import ACT2FN

    field = known.activation_field
    if (activation := getattr(config, field)) not in ACT2FN:
        usual = {"GPT-2": "gelu_new", "GPT-NeoX": "gelu"}.get(kind, "silu")
        raise fault(
            f"{field} is {activation!r}, which transformers does not know; the usual one is {usual!r}, and the others are "
            f"{', '.join(sorted(set(ACT2FN) - {usual}))}"
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


def check_size_of_weights(config: PretrainedConfig, directory: Path, found: int) -> None:
    """Raises UserError when config.json is of a far larger model than the weight files are.

    transformers would fill up what is missing with random numbers, in all of the memory that this takes.

    Args:
        found: how many numbers the weight files hold.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:  # several weights in a number
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # noqa: BLE001  # of an unknown family; loading it says more
        return
    expected = sum(parameter.numel() for parameter in model.parameters())
    if found < expected / 2:
        raise UserError(
            f"{directory}: config.json is of a {config.model_type} ({type(model).__name__}) with {expected:,} parameters, and the "
            f"weight files hold {found:,}; use the config.json that the weights were saved with"
        )


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
            f"{directory}: the weights are of a model with an adapter, and have tensors that the model lacks, such as {adapted[0]}; "
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


def check_no_look_ahead(model: PreTrainedModel, directory: Path) -> None:
    """Raises UserError when a prediction depends on what comes behind it, or the model does not read plain text.

    Such a model would have a loss that means nothing. Those of the known families need no such test.
    """
    import torch

    length, vocabulary = 12, model.config.get_text_config().vocab_size
    tokens = torch.arange(2 * length).remainder(vocabulary).view(2, length)
    tokens[1, : length // 2] = tokens[0, : length // 2]
    try:
        with torch.inference_mode():
            one, other = (model(row[None], use_cache=False).logits[0, : length // 2].float() for row in tokens)
    except Exception as error:
        raise UserError(
            f"{directory}: this {type(model).__name__} cannot read a text by itself ({one_line(error)}); name a language model that "
            "needs token ids alone"
        ) from error
    rounding = 1e-4 if model.dtype == torch.float32 else 1e-2
    if not torch.allclose(one, other, rtol=rounding, atol=rounding * float(one.abs().max())):
        raise UserError(
            f"{directory}: the predictions of this {type(model).__name__} depend on the text behind them, so its loss would mean "
            "nothing; name a causal language model"
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
        "%s: transformers takes the class %s, by tokenizer_config.json or by the kind of model, which has a %s of its own; the "
        "tokenizer is the one of tokenizer.json",
        directory,
        type(tokenizer).__name__,
        " and a ".join(changed),
    )
    return read


def begins_texts(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a tokenizer puts in front of every text by itself, as that of Llama 3 does; None if there is none.

    Nothing here asks a tokenizer for it: corpora are streams of documents with an end-of-text token behind each, and questions and
    prompts are text. What reads position 0 as a class of its own has to know it.
    """
    ids = tokenizer("a", verbose=False)["input_ids"]
    first = tokenizer.bos_token_id
    return first if isinstance(first, int) and ids[:1] == [first] and first != tokenizer.eos_token_id else None


def first_token(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """The token with which a model's texts begin: what `norms.surgery.install` takes as `bos_token_id`.

    It is the one of `begins_texts`, or the special token that config.json names, if that is not the end-of-text token. Else None.
    """
    found, named = begins_texts(tokenizer), getattr(config, "bos_token_id", None)
    if found is None and named != tokenizer.eos_token_id and named in tokenizer.all_special_ids:
        found = named
    return found


def say_what_is_left_out(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Warn that a token which the tokenizer would put in front of every text is left out."""
    if (first := begins_texts(tokenizer)) is not None:
        logger.warning(
            "the tokenizer of %s puts %s in front of every text; here it is left out, and each document has %s behind it",
            name,
            tokenizer.convert_ids_to_tokens(first),
            tokenizer.eos_token,
        )


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
