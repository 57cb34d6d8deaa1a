"""The sites of a model: who reads each of its norms. And whether a model is one whose norms can be removed.

A Pre-LN block has a norm in front of attention and one in front of the MLP; the last norm comes before the unembedding. They have
the names of GPT-2's in every family (`families.py` has the modules). ln_1 has two kinds of reader that can lose the norm at
different times: queries and keys (which decide where attention looks) and values (which decide what it moves). So a model with L
layers has 3L + 1 sites:

    ln_2.i      read by the MLP of layer i        norm "ln_2.i", reader 0
    ln_1_qk.i   read by its queries and keys      norm "ln_1.i", reader 0
    ln_1_v.i    read by its values                norm "ln_1.i", reader 1
    ln_f        read by the unembedding           norm "ln_f",   reader 0

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ln_removal.errors import UserError
from ln_removal.models.families import FAMILIES, Family, family_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

SITE_KINDS = ("ln_2", "ln_1_qk", "ln_1_v", "ln_f")
"""Kinds of site, in the order in which a removal takes them."""

SPECIALS = ("eot", "first")
"""Special positions, whose constants a removal drops last: end-of-text tokens and position 0."""

_NORM_OF_KIND = {"ln_2": "ln_2", "ln_1_qk": "ln_1", "ln_1_v": "ln_1", "ln_f": "ln_f"}
_READER_OF_KIND = {"ln_2": 0, "ln_1_qk": 0, "ln_1_v": 1, "ln_f": 0}

DISARMING_EPSILON = 1e6
"""Least epsilon that is taken to disarm a norm: the usual one is 1e-5, the published models have 1e12."""


MERGE_FIRST = "merge it first (with peft: model = model.merge_and_unload())"


@dataclass(frozen=True, order=True, slots=True)
class Site:
    """One reading path of one LayerNorm.

    Attributes:
        kind: one of SITE_KINDS.
        layer: index of the block, from 0; None for ln_f, which belongs to no block.
    """

    kind: str
    layer: int | None = None

    def __post_init__(self) -> None:
        assert self.kind in SITE_KINDS, f"unknown site kind {self.kind!r}"
        assert (self.layer is None) == (self.kind == "ln_f"), f"{self.kind} with layer {self.layer}"
        assert self.layer is None or self.layer >= 0, f"negative layer {self.layer}"

    def __str__(self) -> str:
        return self.kind if self.layer is None else f"{self.kind}.{self.layer}"

    @property
    def norm(self) -> str:
        """Name of the norm that this site reads: "ln_1.7", "ln_2.7" or "ln_f"."""
        name = _NORM_OF_KIND[self.kind]
        return name if self.layer is None else f"{name}.{self.layer}"

    @property
    def reader(self) -> int:
        """Which of its norm's readers this site is: 1 for values, 0 for all others."""
        return _READER_OF_KIND[self.kind]


def parse_site(text: str) -> Site:
    """Read a site from its written form, the inverse of `str(site)`.

    Args:
        text: "ln_2.3", "ln_1_qk.0", "ln_1_v.11" or "ln_f".

    Raises:
        UserError: the text names no site.
    """
    kind, dot, layer = text.partition(".")
    if kind == "ln_f" and not dot:
        return Site("ln_f")
    # isascii and isdigit: int() would also take "+3", " 3" and "1_0", which never come out of str(site)
    if kind in SITE_KINDS and kind != "ln_f" and layer.isascii() and layer.isdigit():
        return Site(kind, int(layer))
    raise UserError(f"{text!r} is not a site; write ln_f, or ln_2.N, ln_1_qk.N or ln_1_v.N with the layer N from 0")


def all_sites(n_layer: int) -> list[Site]:
    """All 3 * n_layer + 1 sites of a model, in removal order: every ln_2, every ln_1_qk, every ln_1_v, ln_f.

    Raises:
        UserError: n_layer is less than 1.
    """
    if n_layer < 1:
        raise UserError(f"a model has at least one layer, found n_layer = {n_layer}; check the model's config.json")
    blocks = [Site(kind, layer) for kind in SITE_KINDS if kind != "ln_f" for layer in range(n_layer)]
    return [*blocks, Site("ln_f")]


def check_supported(model: nn.Module, *, keep: Sequence[str] | None = None) -> Family:
    """Check that `model` is a language model of a known family whose norms are all still there; returns the family.

    Args:
        keep: the norms that the caller knows to stay when the others are removed: "qk-norms" for a Qwen3. None: nothing is removed.

    Raises:
        UserError: another architecture, cross-attention, norms that a removal would leave without being told so, norms that are
            already replaced or gone, or a module that computes something else than the family's; see `check_plain`.
    """
    config = getattr(model, "config", None)
    classes = {kind.__name__ for kind in type(model).__mro__}
    families = [family for family in FAMILIES.values() if family.model_class in classes]
    if not families or config is None:
        adapter = f"; {MERGE_FIRST}" if hasattr(model, "merge_and_unload") else ""
        raise UserError(
            f"{type(model).__name__} is not supported{adapter}; pass one of "
            f"{', '.join(family.model_class for family in FAMILIES.values())}"
        )
    family, loaded = families[0], cast("PreTrainedModel", model)
    if getattr(config, "add_cross_attention", False):
        raise UserError(
            "the model has cross-attention, whose LayerNorms have no site; pass a decoder-only GPT-2 "
            "(add_cross_attention false in its config.json)"
        )
    if unknown := [name for name in keep or () if name != family.kept_as]:
        raise UserError(f"a {family.title} has no {', '.join(unknown)} to keep; leave that out")
    if family.kept and keep is not None and not keep:
        raise UserError(
            f"a {family.title} also has norms of queries and keys, which cannot be removed yet; with --keep {family.kept_as} (in a "
            f'recipe: schedule.keep = ["{family.kept_as}"]) all others are removed and these stay'
        )
    layers = config.num_hidden_layers
    if family.centred and (
        lacking := [path for path in family.readers(layers) if path != "lm_head" and _lacks_bias(loaded, path)]
    ):
        raise UserError(
            f"{lacking[0]} has no bias, which the fold of a LayerNorm needs; such a {family.title} is not supported"
        )
    norms = family.norms(layers)
    if any(type(module).__name__ == "FreezableNorm" for module in loaded.modules()):
        raise UserError(
            "the freezable norms are already installed in this model; load it afresh, "
            "or get at them with NormSites.of(model)"
        )
    for path in norms.values():
        norm = loaded.get_submodule(path)
        if not _is_norm(norm, family):
            raise UserError(
                f"{path} is of type {type(norm).__name__}, not {family.norm_name}; pass a {family.title} that still has its norms"
            )
        if getattr(norm, "weight", None) is None or (family.centred and getattr(norm, "bias", None) is None):
            raise UserError(f"{path} has no weight or no bias; pass a {family.title} whose norms have both")
    check_plain(loaded, norms=list(norms.values()))
    return family


def _lacks_bias(model: PreTrainedModel, path: str) -> bool:
    return getattr(model.get_submodule(path), "bias", 0) is None


def _is_norm(module: nn.Module, family: Family) -> bool:
    """Whether a module is the kind of norm that the family has, unchanged."""
    from torch import nn

    if family.centred:
        return isinstance(module, nn.LayerNorm)
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def check_plain(model: PreTrainedModel, *, norms: Sequence[str], replaced: Sequence[type[nn.Module]] = ()) -> None:
    """Check that the weights which a fold reads are all that the modules between the norms compute with.

    An adapter or a quantised layer has a `weight` too, which is not what it multiplies with.

    Args:
        model: of a known family.
        norms: paths of its norms.
        replaced: classes of modules that `install` has put in the place of transformers' own and that the fold knows.

    Raises:
        UserError: a linear map or an embedding is of another class, its weights are no plain parameters, an activation is not
            the one of the configuration, or the model has parameters that its family does not have.
    """
    from torch import nn
    from transformers.activations import ACT2FN

    family = family_of(model.config)
    expected = _expected_maps(model, family)
    activation = getattr(model.config, family.activation_field)
    for layer in range(model.config.num_hidden_layers):
        name = f"{family.block(layer)}.{family.activation}"
        if type(found := model.get_submodule(name)) is not type(ACT2FN[activation]):
            raise UserError(
                f"{name} is of type {type(found).__name__}, but the configuration has {family.activation_field} {activation!r}; an "
                "export is built from the configuration, so pass a model whose activations are the ones that it names"
            )
    for name, kind in expected.items():
        module = model.get_submodule(name)
        if isinstance(module, tuple(replaced)):
            continue
        weight = getattr(module, "weight", None)
        odd = type(module) is kind and weight is not None and type(weight) is not nn.Parameter
        if type(module) is not kind or odd:
            described = (
                f"{type(module).__name__} with a weight of type {type(weight).__name__}"
                if odd
                else type(module).__name__
            )
            raise UserError(
                f"{name} is of type {described}, not a plain {kind.__name__}, and what it does besides would be lost; if it holds "
                f"an adapter, {MERGE_FIRST}; if it is quantised, load the model in float32"
            )
    known = {*norms, *expected, *family.kept_norms(model.config.num_hidden_layers)}
    if added := [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in known]:
        raise UserError(
            f"the model has {len(added)} parameters that a {family.title} does not have, such as {added[0]}, which would be lost; "
            f"if they are of an adapter, {MERGE_FIRST}"
        )


def _expected_maps(model: PreTrainedModel, family: Family) -> dict[str, type[nn.Module]]:
    """The class of each embedding and linear map of a model, by path."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kind: type[nn.Module] = Conv1D if family.input_first else nn.Linear
    expected: dict[str, type[nn.Module]] = {f"{family.body}.{name}": nn.Embedding for name in family.embeddings}
    for layer in range(model.config.num_hidden_layers):
        expected |= {f"{family.block(layer)}.{path}": kind for path in (*family.mlp, *family.others)}
        for path in family.qkv:
            name = f"{family.block(layer)}.{path}"
            if getattr(model.config, "split_qkv", False):
                expected |= {f"{name}.{part}": nn.Linear for part in "qkv"}
            else:
                expected[name] = kind
    return expected | {"lm_head": nn.Linear}


def is_disarmed(config: PretrainedConfig) -> bool:
    """Whether a configuration is of a stock form, ours or a published one: its epsilon disarms the norms."""
    return float(getattr(config, family_of(config).epsilon, 0.0)) >= DISARMING_EPSILON
