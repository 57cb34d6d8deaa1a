"""The faults of a recipe: one line for each, with its key, what was found and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ln_removal.config.family_parts import FAMILY_PARTS, LADDER_CHOICES, REVIVAL_CHOICES, SHAPE_CHOICES

REMOVED_KEYS = {
    "schedule.layers": "first to last",
    "schedule.constant": "mean",
    "schedule.adaptive": None,
    "training.rewarm_steps": 0,
    "training.distillation_until": 1.0,
    "training.residual_matching": 0.0,
}
"""Keys that version 0.2.0 removed, with the value that switched each one off.

Version 0.1 wrote every default into recipe.toml, so the recipe of any of its runs has these keys (but not `adaptive`, whose off
value was to be absent).
"""


def without_removed_keys(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's nested dictionary without the removed keys that were off; with any other value they stay, and are faults."""
    kept = dict(document)
    for key, off in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        table = kept.get(section)
        if isinstance(table, Mapping) and name in table and table[name] == off:
            kept[section] = {other: value for other, value in table.items() if other != name}
    return kept


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean 'gpt2'?" for the closest candidate, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def all_faults(errors: Iterable[ErrorDetails], document: Mapping[str, Any], schema: type[BaseModel]) -> list[str]:
    """One line for each fault of a document that pydantic refused.

    Args:
        errors: what pydantic found, which is only about single fields: it skips checks across fields once any is wrong.
        document: the recipe as read.
        schema: the Recipe class; its fields that are models themselves are the sections.
    """
    sections = sections_of(schema)
    messages: dict[str, list[str]] = {}
    for error in errors:
        if error["loc"]:  # an error without a place is a check across fields, repeated below
            key = _dotted(error["loc"], document, sections)
            messages.setdefault(key, []).append(_message(error, key, schema, sections))
    # A union complains once for each of its members; that is still one fault.
    faults = [f"{key}: {' or '.join(dict.fromkeys(texts))}{_found(key, document)}" for key, texts in messages.items()]

    def sound(key: str) -> Any:
        """What the document says under a key that is not faulty, or else the schema's default."""
        section, _, name = key.partition(".")
        if key in messages or section in messages:
            return None
        table = document.get(section)
        if not name or not isinstance(table, Mapping):
            return None if name else table
        return table[name] if name in table else sections[section].model_fields[name].get_default()

    return faults + cross_field_faults(sound)


def sections_of(schema: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """The schema's sections: field name to model, for fields of the form `Spec` or `Spec | None`."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in schema.model_fields.items():
        for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                found[name] = candidate
    return found


def follow(root: object, dotted: str) -> Any:
    """The value under a dotted key of a model or of nested dictionaries; None where there is none."""
    value = root
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value


def cross_field_faults(value: Callable[[str], Any]) -> list[str]:
    """Contradictions between fields, one line each.

    Args:
        value: gives the value under a dotted key, or None where it is unset or wrong in itself; a check that lacks one
            of its values is left out.
    """
    faults: list[str] = []
    removal, pretraining = value("schedule") is not None, value("architecture") is not None
    if removal and pretraining:
        faults.append("schedule: a pretraining recipe, one with [architecture], has none; drop one of the two tables")
    if not removal and not pretraining:
        faults.append("schedule: missing; add [schedule] for a removal or [architecture] for pretraining")

    def at_most(low: str, high: str) -> None:
        smaller, larger = value(low), value(high)
        if smaller is not None and larger is not None and smaller > larger:
            faults.append(f"{low}: must be at most {high} ({larger:g}), found {smaller:g}; lower it")

    at_most("training.warmup_steps", "training.steps")
    at_most("training.warmup_steps", "training.decay_steps")
    at_most("training.minimum_learning_rate", "training.learning_rate")
    at_most("data.context", "architecture.n_positions")
    faults += _batch_faults(value("training.tokens_per_step"), value("data.context"), value("training.micro_batch"))
    faults += _trapezoid_faults(value)
    if value("data.corpus") == "generated" and value("data.weights"):  # now, not after an hour of writing
        faults.append("data.weights: names sources of another corpus, generated text has one; set data.weights={}")
    faults += _pretraining_faults(value) if pretraining else _removal_faults(value)
    return faults


def _batch_faults(tokens: int | None, context: int | None, micro_batch: int | str | None) -> list[str]:
    """A step must be a whole number of sequences, and of micro-batches."""
    if tokens is None or context is None:
        return []
    if tokens % context:
        nearest = max(context, round(tokens / context) * context)
        found = f"found {tokens}; try {nearest}"
        return [f"training.tokens_per_step: must be a multiple of data.context ({context}), {found}"]
    sequences = tokens // context
    if isinstance(micro_batch, int) and sequences % micro_batch:
        fitting = max(size for size in range(1, min(micro_batch, sequences) + 1) if sequences % size == 0)
        rule = f"must divide the {sequences} sequences of a step ({tokens} tokens / context {context})"
        return [f"training.micro_batch: {rule}, found {micro_batch}; try {fitting}"]
    return []


ROTARY = ("llama", "qwen2", "qwen3")
"""Families of [architecture] whose heads are rotated as a whole."""

ONLY_IN_REMOVALS = (
    "data.odd_text",
    "training.auxiliary_weight",
    "training.outlier_weight",
    "training.distillation",
    "training.lora_rank",
)


def _pretraining_faults(value: Callable[[str], Any]) -> list[str]:
    """Keys that only removals have, and choices that have no effect because of another one."""
    faults = [
        f"{key}: a pretraining recipe, one with [architecture], has none; leave it out"
        for key in ONLY_IN_REMOVALS
        if value(key)
    ]
    faults += _shape_faults(value)
    activation = value("architecture.activation")
    if value("architecture.slopes") == "network" and activation not in (None, "learnable_leaky_relu"):
        rule = "has no effect unless activation is 'learnable_leaky_relu'"
        faults.append(
            f"architecture.slopes: {rule}, found activation {activation!r}; leave it out, or learn the slopes"
        )
    if value("architecture.negative_slope") not in (None, 0.01) and activation in ("gelu", "relu"):
        rule = "has no effect unless activation is 'leaky_relu' or 'learnable_leaky_relu'"
        faults.append(f"architecture.negative_slope: {rule}, found activation {activation!r}; leave it out")
    return faults


def _shape_faults(value: Callable[[str], Any]) -> list[str]:
    """Sizes of [architecture] that no model can have, and choices that its family does not have."""
    faults: list[str] = []
    family, width, heads = (value(f"architecture.{key}") for key in ("family", "n_embd", "n_head"))
    own, groups = value("architecture.head_width"), value("architecture.n_kv_head")
    if width is not None and heads is not None and own is None and width % heads:
        faults.append(f"architecture.n_embd: must be a multiple of n_head ({heads}), found {width}")
    elif width is not None and heads is not None and family == "pythia" and width // heads % 8:
        rule = f"must be a multiple of 8 n_head ({8 * heads}): a quarter of each head is rotated, in pairs"
        faults.append(f"architecture.n_embd: {rule}; found {width}")
    elif width is not None and heads is not None and family in ROTARY and (own or width // heads) % 2:
        rule = "the width of a head must be even, because it is rotated in pairs"
        faults.append(
            f"architecture.{'n_embd' if own is None else 'head_width'}: {rule}; found {own or width // heads}"
        )
    if heads is not None and groups is not None and heads % groups:
        faults.append(f"architecture.n_kv_head: must divide n_head ({heads}), found {groups}")
    return faults + _family_faults(value, family)


def _family_faults(value: Callable[[str], Any], family: str | None) -> list[str]:
    """Keys of [architecture] that its family does not take, with a value that is not the family's own."""
    if family is None:
        return []
    parts = FAMILY_PARTS[family]
    own = {"block_norm": parts.norm, "final_norm": parts.norm, "activation": parts.activation}
    faults = []
    for key in SHAPE_CHOICES:
        if (found := value(f"architecture.{key}")) is not None and key not in parts.choices:
            faults.append(f"architecture.{key}: {family!r} has no such choice, found {found!r}; leave it out")
    for key, off in LADDER_CHOICES.items():
        if key not in parts.choices and (found := value(f"architecture.{key}")) not in (None, off):
            rule = f"can be chosen for 'gpt2' only, and the family is {family!r}"
            faults.append(f"architecture.{key}: {rule}; found {found!r}; leave it out, or change the family")
    for key in REVIVAL_CHOICES:
        found = value(f"architecture.{key}")
        usual = own.get(key, {"biases": "all", "negative_slope": 0.01, "slopes": "layer"}.get(key))
        if key not in parts.choices and found not in (None, usual):
            rule = f"norms, biases and activations can be chosen for 'gpt2' and 'pythia' only, and the family is {family!r}"
            faults.append(f"architecture.{key}: {rule}; found {found!r}; leave it out, or change the family")
        elif key in parts.choices and found in ("rmsnorm", "silu"):
            faults.append(
                f"architecture.{key}: {family!r} has no {found!r}, which 'llama' and 'qwen2' have; leave it out"
            )
    return faults


def _removal_faults(value: Callable[[str], Any]) -> list[str]:
    """Details of something that is switched off, and what only pretraining has.

    A weight that the recipe gives as 0 is no fault, so that a recipe can be tried without one of its terms.
    """
    faults: list[str] = []
    training = value("training")
    written = training.model_fields_set if isinstance(training, BaseModel) else training or ()
    if value("training.auxiliary_weight") == 0 and "auxiliary_weight" not in written:
        for key, usual in (("training.auxiliary_target", "batch"), ("training.auxiliary_sites", "ln_f")):
            if (found := value(key)) not in (None, usual):
                advice = "give that, or leave this out"
                faults.append(f"{key}: has no effect without training.auxiliary_weight, found {found!r}; {advice}")
    if (target := value("training.auxiliary_target")) != "constants":
        rule = f"has an effect only with training.auxiliary_target = 'constants', found {target!r}; change one of them"
        for key, default in (("training.outlier_weight", 0.0), ("training.auxiliary_early", 1.0)):
            if value(key) not in (None, default):
                faults.append(f"{key}: {rule}")
    ratio = value("training.outlier_ratio")
    if ratio not in (None, 1.5) and value("training.outlier_weight") == 0 and "outlier_weight" not in written:
        advice = "give that, or leave this out"
        faults.append(f"training.outlier_ratio: has no effect without training.outlier_weight, found {ratio}; {advice}")
    if value("schedule.cap") is None:
        faults += [
            f"schedule.{key}: has no effect without schedule.cap, found {found}; give that, or leave this out"
            for key in ("cap_after", "cap_taper")
            if (found := value(f"schedule.{key}"))
        ]
    for key in ("training.entropy_weight", "training.spectral_cap"):
        if value(key):
            faults.append(f"{key}: a removal, a recipe with [schedule], has none; leave it out")
    share, end = value("training.distillation"), value("training.distillation_end")
    if share == 0 and end:
        advice = "set that above 0, or leave this out"
        faults.append(
            f"training.distillation_end: has no effect while training.distillation is 0, found {end}; {advice}"
        )
    return faults


def _trapezoid_faults(value: Callable[[str], Any]) -> list[str]:
    """The warm-up and the final decay of a trapezoid must not overlap."""
    fraction, warmup = value("training.decay_fraction"), value("training.warmup_steps")
    end = value("training.decay_steps") or value("training.steps")
    if value("training.decay") != "trapezoid" or fraction is None or warmup is None or end is None:
        return []
    falling = round(fraction * end)
    if warmup + falling <= end:
        return []
    overlap = f"the decay ({falling} steps) and the warm-up ({warmup}) overlap within {end} steps"
    return [f"training.decay_fraction: {overlap}; lower one of them"]


def _message(error: ErrorDetails, key: str, schema: type[BaseModel], sections: Mapping[str, type[BaseModel]]) -> str:
    """The fault in words, without the key."""
    if error["type"] == "extra_forbidden" and key in REMOVED_KEYS:
        return "this option was removed in version 0.2.0; leave it out, or use version 0.1"
    if error["type"] == "extra_forbidden":
        return "unknown key" + _suggestion(key, schema, sections)
    if error["type"] == "missing" and len(error["loc"]) <= key.count(".") + 1:
        return "missing; add it"
    if error["type"] == "missing":  # below a key: a list that is too short
        return "should have one more item"
    if error["type"] in ("model_type", "model_attributes_type"):
        return f"should be a table; write [{key}]"
    return error["msg"].removeprefix("Input ").removeprefix("Value error, ")


def _found(key: str, document: Mapping[str, Any]) -> str:
    """ ", found 'x'" for a key whose value fits in a line."""
    value = follow(document, key)
    return "" if value is None or isinstance(value, Mapping) else f", found {value!r}"


def _dotted(
    location: tuple[int | str, ...], document: Mapping[str, Any], sections: Mapping[str, type[BaseModel]]
) -> str:
    """The key in the file for a pydantic location, which also names union members and list positions (dropped here)."""
    parts = [str(part) for part in location]
    if parts[0] not in sections:
        return parts[0]
    inside_a_table = isinstance(follow(document, ".".join(parts[:2])), Mapping)
    return ".".join(parts[:3] if inside_a_table else parts[:2])


def _suggestion(key: str, schema: type[BaseModel], sections: Mapping[str, type[BaseModel]]) -> str:
    """Where an unknown key probably belongs, or which keys there are."""
    section, dot, name = key.partition(".")  # the first: a quoted key may have dots of its own
    if not dot:
        section, name = "", key
    known = sections[section].model_fields if section in sections else schema.model_fields
    close = did_you_mean(name, known, prefix=f"{section}." if section else "")
    if close:
        return close
    elsewhere = [f"{other}.{name}" for other, spec in sections.items() if name in spec.model_fields]
    return f"; did you mean {elsewhere[0]!r}?" if elsewhere else f"; known here: {', '.join(known)}"
