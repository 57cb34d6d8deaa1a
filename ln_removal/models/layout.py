"""Where a GPT-2 keeps its LayerNorms and who reads each one.

A Pre-LN GPT-2 block applies ln_1 before attention and ln_2 before the MLP; ln_f comes before the unembedding. ln_1 has
two kinds of reader that can lose the norm at different times: queries and keys (which decide where attention looks) and
values (which decide what it moves). So a model with L layers has 3L + 1 sites:

    ln_2.i      read by the MLP of layer i        norm "ln_2.i", reader 0
    ln_1_qk.i   read by its queries and keys      norm "ln_1.i", reader 0
    ln_1_v.i    read by its values                norm "ln_1.i", reader 1
    ln_f        read by the unembedding           norm "ln_f",   reader 0

Importing this module needs neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import GPT2LMHeadModel, PretrainedConfig

SITE_KINDS = ("ln_2", "ln_1_qk", "ln_1_v", "ln_f")
"""Kinds of site, in the order in which a removal takes them."""

SPECIALS = ("eot", "first")
"""Special positions, whose constants a removal drops last: end-of-text tokens and position 0."""

_NORM_OF_KIND = {"ln_2": "ln_2", "ln_1_qk": "ln_1", "ln_1_v": "ln_1", "ln_f": "ln_f"}
_READER_OF_KIND = {"ln_2": 0, "ln_1_qk": 0, "ln_1_v": 1, "ln_f": 0}

DISARMING_EPSILON = 1e6
"""Least layer_norm_epsilon that is taken to disarm a LayerNorm: the usual one is 1e-5, the published models have 1e12."""


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


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a Hugging Face causal language model of GPT-2's or GPT-NeoX's layout, first to last."""
    body: Any = model.base_model
    return list(body.h if hasattr(body, "h") else body.layers)


def attention_of(block: nn.Module) -> nn.Module:
    """The attention module of one of `blocks_of`: its forward returns (output, probabilities or None)."""
    found: Any = block.attn if hasattr(block, "attn") else block.attention
    return cast("nn.Module", found)


def mlp_norm_of(block: nn.Module) -> nn.Module:
    """The norm, or what replaced it, in front of the MLP of one of `blocks_of`. In a parallel block it reads the block's input."""
    found: Any = block.ln_2 if hasattr(block, "ln_2") else block.post_attention_layernorm
    return cast("nn.Module", found)


def final_norm_of(model: nn.Module) -> nn.Module:
    """The norm, or what replaced it, in front of the unembedding."""
    body: Any = model.base_model
    return cast("nn.Module", body.ln_f if hasattr(body, "ln_f") else body.final_layer_norm)


def check_supported(model: nn.Module) -> None:
    """Check that `model` is a GPT-2 language model whose norms are all LayerNorms with a weight and a bias.

    Raises:
        UserError: another architecture, cross-attention, norms that are already replaced or gone, or a module that computes
            something else than GPT-2's; see `check_plain`.
    """
    from torch import nn
    from transformers import GPT2LMHeadModel

    if not isinstance(model, GPT2LMHeadModel):
        adapter = f"; {MERGE_FIRST}" if hasattr(model, "merge_and_unload") else ""
        raise UserError(
            f"{type(model).__name__} is not supported{adapter}; pass a GPT2LMHeadModel "
            "(GPT-2 small to XL, distilgpt2 or another checkpoint of that architecture)"
        )
    if model.config.add_cross_attention:
        raise UserError(
            "the model has cross-attention, whose LayerNorms have no site; pass a decoder-only GPT-2 "
            "(add_cross_attention false in its config.json)"
        )
    for name, norm in _named_norms(model):
        if isinstance(norm, nn.LayerNorm):
            if norm.weight is None or norm.bias is None:
                raise UserError(f"{name} has no weight or no bias; pass a GPT-2 whose LayerNorms have both")
            continue
        if hasattr(model.get_submodule("transformer.h.0.attn.c_attn"), "norm"):
            raise UserError(
                "the freezable norms are already installed in this model; load it afresh, "
                "or get at them with NormSites.of(model)"
            )
        raise UserError(
            f"{name} is of type {type(norm).__name__}, not LayerNorm; pass a GPT-2 that still has its LayerNorms"
        )
    check_plain(model, norms=[name for name, _ in _named_norms(model)])


def check_plain(model: GPT2LMHeadModel, *, norms: Sequence[str], projection: type[nn.Module] | None = None) -> None:
    """Check that the weights which a fold reads are all that the modules between the norms compute with.

    An adapter or a quantised layer has a `weight` too, which is not what it multiplies with.

    Args:
        model: a GPT-2.
        norms: paths of its norms.
        projection: class of each c_attn; default: transformers' Conv1D.

    Raises:
        UserError: a linear map or an embedding is of another class, its weights are no plain parameters, an activation is not
            the one of the configuration, or the model has parameters that GPT-2 does not have.
    """
    from torch import nn
    from transformers.activations import ACT2FN
    from transformers.pytorch_utils import Conv1D

    expected: dict[str, type[nn.Module]] = {"transformer.wte": nn.Embedding, "transformer.wpe": nn.Embedding}
    activation = model.config.activation_function
    for block in (f"transformer.h.{i}" for i in range(model.config.n_layer)):
        expected |= {f"{block}.{name}": Conv1D for name in ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
        expected[f"{block}.mlp.act"] = type(ACT2FN[activation])
        if getattr(model.config, "split_qkv", False):
            expected |= {f"{block}.attn.c_attn.{part}": nn.Linear for part in "qkv"}
        else:
            expected[f"{block}.attn.c_attn"] = projection or Conv1D
    expected["lm_head"] = nn.Linear
    for name, kind in expected.items():
        module = model.get_submodule(name)
        if type(module) is not kind and name.endswith("mlp.act"):
            raise UserError(
                f"{name} is of type {type(module).__name__}, but the configuration has activation_function {activation!r}; an "
                "export is built from the configuration, so pass a model whose activations are the ones that it names"
            )
        weight = getattr(module, "weight", None)
        odd = type(module) is kind and weight is not None and type(weight) is not nn.Parameter
        if type(module) is not kind or odd:
            found = (
                f"{type(module).__name__} with a weight of type {type(weight).__name__}"
                if odd
                else type(module).__name__
            )
            raise UserError(
                f"{name} is of type {found}, not a plain {kind.__name__}, and what it does besides would be lost; if it holds an "
                f"adapter, {MERGE_FIRST}; if it is quantised, load the model in float32"
            )
    known = {*norms, *(name for name in expected if not name.endswith("mlp.act"))}
    if added := [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in known]:
        raise UserError(
            f"the model has {len(added)} parameters that a GPT-2 does not have, such as {added[0]}, which would be lost; if they "
            f"are of an adapter, {MERGE_FIRST}"
        )


def _named_norms(model: GPT2LMHeadModel) -> list[tuple[str, nn.Module]]:
    """(module path, module) of ln_1 and ln_2 of each block and of ln_f."""
    names = [f"transformer.h.{i}.{ln}" for i in range(model.config.n_layer) for ln in ("ln_1", "ln_2")]
    return [(name, model.get_submodule(name)) for name in [*names, "transformer.ln_f"]]


def is_disarmed(config: PretrainedConfig) -> bool:
    """Whether a GPT-2 configuration is of a stock form, ours or a published one: its epsilon disarms LayerNorm."""
    return bool(getattr(config, "layer_norm_epsilon", 0.0) >= DISARMING_EPSILON)
