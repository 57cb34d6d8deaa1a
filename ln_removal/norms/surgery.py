"""Install freezable norms in a model, steer them, and fold them away.

`install` replaces modules and leaves every forward method alone: a FreezableNorm stands in the place of each norm. Queries and
keys can lose the norm before values do. So where one map makes all three (GPT-2, GPT-NeoX), a projection that owns the norm takes
that map's place and an identity the norm's; where each has a map of its own (Llama), each map reads its part of what the norm
gives. Through `NormSites` a training loop sets mixes and special constants and updates running statistics.

`fold` moves frozen norms into the weights that read them. A frozen norm in front of a linear map, W (in, out) and
b (out,), is linear; with one constant sigma,

    ((x - mean(x)) / sigma * gamma + beta) W + b  =  x W' + b'
    W' = C diag(gamma / sigma) W        b' = b + beta W

where C = I - 11^T / D subtracts, of each column, its mean over the input dimension (x - mean(x) = x C, C symmetric). For an
RMSNorm C is the identity and beta is 0.

Shapes: B batch, T positions, D model width, V vocabulary, L layers, R readers of a norm, K position classes (3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ln_removal.errors import UserError
from ln_removal.models.families import Family, blocks_of, family_of, final_norm_of
from ln_removal.models.layout import SPECIALS, Site, all_sites, check_plain, check_supported, parse_site
from ln_removal.norms.embedding import CappedEmbedding, cap_embedding
from ln_removal.norms.freezable import (
    END_OF_TEXT,
    FIRST,
    ORDINARY,
    FreezableNorm,
    NormedProjection,
    PositionClasses,
    ReadingProjection,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CLASS_OF_SPECIAL = dict(zip(SPECIALS, (END_OF_TEXT, FIRST), strict=True))


def install(
    model: PreTrainedModel,
    *,
    eot_token_id: int | None,
    bos_token_id: int | None = None,
    median: bool = False,
    cap: float | None = None,
    embedding_cap: float | None = None,
    keep: Sequence[str] = (),
) -> NormSites:
    """Replace every norm of `model`, in place, by a freezable norm at mix 0. Its outputs stay the same.

    Parameters keep their identity (the same nn.Parameter objects, weights still tied). Names change only where one map makes
    queries, keys and values: the weight and bias of ln_1 are then under that map's norm (attn.c_attn.norm of a GPT-2).

    Args:
        model: of a known family (`models.families`), with its norms.
        eot_token_id: id of the end-of-text token, whose positions get a constant of their own until it is dropped;
            None when the vocabulary has none.
        bos_token_id: id of the token that begins every text, if it is another one: it shares the constant of position 0.
        median: the constants are running medians of the stds, not running means; see `FreezableNorm`.
        cap: bound of what every norm gives, as a multiple of its usual size, until `NormSites.lift_cap`; None for norms
            without one.
        embedding_cap: bound of the std of an embedding's row, as a multiple of the first norm's constant, from the moment at which
            its queries and keys begin to freeze. Unlike `cap` it stays, and folds. Not for a model with position embeddings.
        keep: norms that stay as they are, which a family may require: ("qk-norms",) for a Qwen3.

    Raises:
        UserError: the model is of no known family, it has norms that would stay without being named in `keep`, its norms are
            already replaced, a linear map holds an adapter or is quantised, a module that is replaced has hooks, or an
            embedding_cap is given for a model with position embeddings.
    """
    family = check_supported(model, keep=keep)
    _check_no_hooks(model, family)
    classes = PositionClasses(eot_token_id, bos_token_id)
    classes.watch(model.base_model)

    def freezable(norm: nn.Module, readers: int = 1) -> FreezableNorm:
        weight, bias = norm.get_parameter("weight"), norm.get_parameter("bias") if family.centred else None
        eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        assert isinstance(eps, float), eps
        return FreezableNorm(weight, bias, eps, classes=classes, readers=readers, median=median, cap=cap)

    for block in blocks_of(model):
        norm = freezable(block.get_submodule(family.attention_norm), readers=2)
        block.set_submodule(family.attention_norm, nn.Identity() if family.joint else norm)
        heads = model.config.num_attention_heads if family.joint == "heads" else None
        for number, path in enumerate(family.qkv):
            _read_parts(block, path, norm, joint=bool(family.joint), heads=heads, reader=int(number == 2))
        block.set_submodule(family.mlp_norm, freezable(block.get_submodule(family.mlp_norm)))
    model.base_model.set_submodule(family.final_norm, freezable(final_norm_of(model)))
    if embedding_cap is not None:
        cap_embedding(model, embedding_cap)
    model.train(model.training)  # New modules start in training mode.
    return NormSites.of(model)


class NormSites:
    """All freezable norms of one model, addressed by site.

    `install` returns it, and `NormSites.of` finds it in a model whose norms are installed. All its state is in the model's
    buffers, so loading a state dict restores it.

    Attributes:
        sites: every site, in removal order.
        norms: the norms by name, in the order in which the residual stream meets them: "ln_1.0", "ln_2.0", ...,
            "ln_f".
        embedding: of a model whose embedding has a cap.
    """

    def __init__(self, norms: dict[str, FreezableNorm], embedding: CappedEmbedding | None = None) -> None:
        self.norms = norms
        self.embedding = embedding
        self.sites: list[Site] = all_sites(n_layer=(len(norms) - 1) // 2)
        assert {site.norm for site in self.sites} == set(norms), sorted(norms)
        # Sites known to have had statistics when they left mix 0. Only spares repeated look-ups on the device.
        self._checked: set[Site] = set()

    @classmethod
    def of(cls, model: nn.Module) -> NormSites:
        """Find the freezable norms of a model.

        Raises:
            UserError: there are none.
        """
        if not any(isinstance(module, FreezableNorm) for module in model.modules()):
            raise UserError(f"this {type(model).__name__} has no freezable norms; call install(model) first")
        config: Any = model.config
        family = family_of(config)
        paths = family.norms(config.num_hidden_layers)
        if family.joint:  # the projection owns ln_1
            paths |= {
                f"ln_1.{layer}": f"{family.block(layer)}.{family.qkv[0]}.norm"
                for layer in range(config.num_hidden_layers)
            }
        embedding = model.get_submodule(family.embedding)
        return cls(
            {name: _as_freezable(model.get_submodule(path)) for name, path in paths.items()},
            embedding if isinstance(embedding, CappedEmbedding) else None,
        )

    def set_mix(self, site: Site | str, value: float) -> None:
        """Set the mix of one site.

        When a site leaves mix 0 the running stds become its constants, and stay so until it is back at 0. Takes effect
        in the next forward pass. Waits for the device once, when a site first leaves 0.

        Args:
            site: which one, as a Site or as text ("ln_1_v.7").
            value: 0 (LayerNorm) to 1 (frozen).

        Raises:
            UserError: no such site, a value outside [0, 1], or no statistics to freeze at.
        """
        site = self._known(site)
        _check_fraction(value, f"mix of {site}")
        norm = self.norms[site.norm]
        if value == 0:
            self._checked.discard(site)
        elif site not in self._checked:
            if not norm.running_initialized[ORDINARY] and norm.mix[site.reader] == 0:
                raise UserError(
                    f"no statistics yet for {site}, so there is no constant to freeze it at; run a forward pass in "
                    "training mode and update_running() before freezing"
                )
            self._checked.add(site)
        norm.write_mix(site.reader, value)
        if self.embedding is not None and (site.kind, site.layer) == ("ln_1_qk", 0):
            self.embedding.write_limit(norm.captured_std[site.reader, ORDINARY] if value > 0 else None)

    def set_special(self, which: str, dropped: float) -> None:
        """Move the constants of one special class, at all sites, towards the ordinary ones.

        The constant is exp((1 - d) log(special) + d log(ordinary)), of the values captured when the site was frozen;
        so the result depends on `dropped` alone, not on the values it had before.

        Args:
            which: "eot" (end-of-text tokens) or "first" (position 0).
            dropped: d, 0 (a constant of their own) to 1 (the ordinary constant).

        Raises:
            UserError: no such class, or a value outside [0, 1].
        """
        if which not in SPECIALS:
            raise UserError(f"{which!r} is not a special position class; use one of: {', '.join(SPECIALS)}")
        _check_fraction(dropped, f"dropped share of {which!r}")
        for norm in self.norms.values():
            norm.write_dropped(_CLASS_OF_SPECIAL[which], dropped)

    def lift_cap(self, share: float) -> None:
        """Lift the cap of one norm after the other, in the order of the residual stream: at 0 none is lifted, at 1 all are.

        With N norms that of norm i, from 0, is cap / (1 - v) with v = share * N - i, limited to [0, 1]. The norms behind still have
        their caps, so what grows without one is bounded, and the pulls see it. Norms without a cap stay as they are.

        Raises:
            UserError: the share is outside [0, 1].
        """
        _check_fraction(share, "lifted share of the cap")
        for number, norm in enumerate(self.norms.values()):
            if norm.cap is not None:
                norm.cap_lifted.fill_(min(1.0, max(0.0, share * len(self.norms) - number)))

    def has_cap(self) -> bool:
        """Whether a cap may still act. Waits for the device."""
        return any(norm.cap is not None and bool(norm.cap_lifted < 1) for norm in self.norms.values())

    def over_cap(self) -> dict[str, int]:
        """At how many positions and readers of each norm the cap acted in training since the last call. Waits for the device."""
        capped = {name: norm for name, norm in self.norms.items() if norm.cap is not None}
        found = {name: int(norm.over_cap) for name, norm in capped.items()}
        for norm in capped.values():
            norm.over_cap.zero_()
        return found

    def update_running(self, momentum: float, discard: Tensor | None = None) -> None:
        """Fold the statistics gathered since the last call into the running stds; call once an optimizer step.

        See `FreezableNorm.update_running`. Does not wait for the device.
        """
        for norm in self.norms.values():
            norm.update_running(momentum, discard)

    @torch.no_grad()
    def average_over_ranks(self) -> None:
        """Make the statistics of all ranks of a distributed run equal, in one all-reduce.

        Sums and counts not yet folded in are added up, so that the next `update_running` sees the mean over every
        rank's positions; running stds become the mean over the ranks that have one. Call it before `update_running`,
        on every rank: at each step, or at least before a site leaves mix 0, so that all ranks freeze it at the same
        constant. Does nothing without torch.distributed.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
            return
        norms = list(self.norms.values())
        known = [norm.running_initialized.to(norm.running_std.dtype) for norm in norms]
        pending = [torch.stack((norm.std_sum, norm.std_count)) for norm in norms]
        running = [torch.stack((norm.running_std * seen, seen)) for norm, seen in zip(norms, known, strict=True)]
        table = torch.stack([torch.cat(pair) for pair in zip(pending, running, strict=True)])  # (norms, 4, K)
        distributed.all_reduce(table)
        for norm, (std_sum, std_count, running_sum, ranks) in zip(norms, table.unbind(), strict=True):
            norm.std_sum.copy_(std_sum)
            norm.std_count.copy_(std_count)
            norm.running_std.copy_(torch.where(ranks > 0, running_sum / ranks.clamp(min=1), norm.running_std))
            norm.running_initialized.copy_(ranks > 0)

    def mixes(self) -> dict[str, float]:
        """Mix of every site, by its written form. Waits for the device: for logs and checks."""
        values = {name: norm.mix.tolist() for name, norm in self.norms.items()}
        return {str(site): values[site.norm][site.reader] for site in self.sites}

    def frozen_constants(self) -> dict[str, list[float]]:
        """The K constants (ordinary, end of text, position 0) of every site, whether in use yet or not.

        Residual stream units; 1.0 for a site that has never left mix 0. Waits for the device.
        """
        values = {name: norm.frozen_std.tolist() for name, norm in self.norms.items()}
        return {str(site): values[site.norm][site.reader] for site in self.sites}

    def running_stds(self) -> dict[str, list[float]]:
        """The K running stds of every norm, residual stream units; NaN for a class never seen. Waits for the device."""
        nan = float("nan")
        return {
            name: torch.where(norm.running_initialized, norm.running_std, nan).tolist()
            for name, norm in self.norms.items()
        }

    def unfrozen(self) -> list[Site]:
        """The sites whose mix is not 1, in removal order. Waits for the device."""
        mixes = self.mixes()
        return [site for site in self.sites if mixes[str(site)] != 1]

    def all_frozen(self) -> bool:
        """Whether every site's mix is 1. Waits for the device."""
        return not self.unfrozen()

    def special_dropped(self) -> bool:
        """Whether each site has one constant for all positions. Waits for the device."""
        return all(bool((norm.frozen_std == norm.frozen_std[:, :1]).all()) for norm in self.norms.values())

    def _known(self, site: Site | str) -> Site:
        site = parse_site(site) if isinstance(site, str) else site
        if site.norm not in self.norms:
            raise UserError(f"{site} is not a site of this model, whose layers are 0 to {len(self.norms) // 2 - 1}")
        return site


def fold_affine(
    weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor | None, sigma: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Fold one frozen norm into the linear map behind it.

    Args:
        weight: (D, out) input-first weight of the map.
        bias: (out,) its bias, None for none.
        gamma: (D,) weight of the norm.
        beta: (D,) bias of the norm; None for an RMSNorm, which does not subtract the mean either.
        sigma: the constant: a scalar, or (out,) one for each output column.

    Returns:
        (D, out) weight and (out,) bias in float64. Behind a LayerNorm each column of the weight has mean zero; behind an RMSNorm
        a map without a bias gets none (None).
    """
    wide = weight.double()
    scaled = gamma.double().unsqueeze(1) * wide / sigma.double()
    if beta is None:
        return scaled, None if bias is None else bias.double()
    shift = beta.double() @ wide
    return scaled - scaled.mean(dim=0, keepdim=True), shift if bias is None else bias.double() + shift


def fold_into(
    reader: nn.Module, gamma: Tensor, beta: Tensor | None, sigma: Tensor, *, input_first: bool
) -> dict[str, Tensor]:
    """The parameters of a linear map after `fold_affine`: "weight", and "bias" if it has one then.

    Args:
        reader: has a `weight`, (D, out) if `input_first` (a Conv1D), else (out, D), and a `bias`, (out,) or None.
        gamma, beta, sigma: as for `fold_affine`.

    Returns:
        New contiguous tensors of the weight's shape and of its dtype.
    """
    own, bias = reader.get_parameter("weight"), cast("Tensor | None", reader.bias)
    weight, shift = fold_affine(own if input_first else own.T, bias, gamma, beta, sigma)
    folded = {"weight": weight if input_first else weight.T}
    if shift is not None:
        folded["bias"] = shift
    return {part: value.detach().to(own.dtype, copy=True).contiguous() for part, value in folded.items()}


@torch.no_grad()
def fold(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the LN-free model that computes what `model` computes.

    Queries and keys get the constant of ln_1_qk, values that of ln_1_v. ln_f folds into the unembedding, which thereby
    stops being the embedding, and gets a bias from a LayerNorm. Arithmetic is in float64.

    Args:
        model: with freezable norms, every site frozen and the special constants dropped. Not changed.

    Returns:
        State dict of the family's LN-free class (`models.norm_free`): new tensors in the dtype and on the device of the model's
        parameters.

    Raises:
        UserError: norms are not installed, a site is not frozen, special positions still have their own constant, the norms
            have a cap, or a linear map holds an adapter or is quantised.
    """
    sites = NormSites.of(model)
    if left := sites.unfrozen():
        raise UserError(
            f"cannot fold: {len(left)} of {len(sites.sites)} sites are not frozen ({_some(left)}); "
            "finish the removal schedule, or set their mix to 1"
        )
    if not sites.special_dropped():
        raise UserError(
            "cannot fold: position 0 or end-of-text tokens still have a constant of their own; "
            "call set_special('eot', 1) and set_special('first', 1), or let the schedule do it"
        )
    if sites.has_cap():
        raise UserError("cannot fold: the norms still have a cap; call lift_cap(1), or let the schedule do it")
    family = family_of(model.config)
    norms = [name for name, module in model.named_modules() if isinstance(module, FreezableNorm)]
    check_plain(model, norms=norms, replaced=(NormedProjection, ReadingProjection, CappedEmbedding))
    readers = family.readers(model.config.num_hidden_layers)
    replaced = tuple(f"{path}." for path in (*readers, *norms))
    state = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if not name.startswith(replaced)
    }
    for path, name in readers.items():
        norm, reader = sites.norms[name], model.get_submodule(path)
        folded = fold_into(
            reader, norm.weight, norm.bias, _sigma(norm, reader), input_first=family.is_input_first(path)
        )
        state |= {f"{path}.{part}": value for part, value in folded.items()}
    if sites.embedding is not None:
        del state[f"{family.embedding}.limit"]
        state[f"{family.embedding}.weight"] = sites.embedding.folded()
    return state


def _sigma(norm: FreezableNorm, reader: nn.Module) -> Tensor:
    """The constant for each output of a linear map: that of ln_1_qk for queries and keys, that of ln_1_v for values."""
    constants = norm.frozen_std[:, ORDINARY]
    if isinstance(reader, ReadingProjection):
        return constants[reader.reader]
    if not isinstance(reader, NormedProjection):
        return constants[0]
    width, heads = norm.weight.shape[0], reader.heads or 1  # a GPT-2's columns are those of one head
    for_qk, for_v = constants
    return torch.cat((for_qk.expand(2 * width // heads), for_v.expand(width // heads))).repeat(heads)


def _read_parts(
    block: nn.Module, path: str, norm: FreezableNorm, *, joint: bool, heads: int | None, reader: int
) -> None:
    """Let a map behind the attention's norm read the part that is for it: a joint map both parts, queries and keys 0, values 1."""
    own = block.get_submodule(path)
    weight, bias = own.get_parameter("weight"), None if own.bias is None else own.get_parameter("bias")
    if joint:
        assert bias is not None, path
        block.set_submodule(path, NormedProjection(norm, weight, bias, heads=heads))
    else:
        block.set_submodule(path, ReadingProjection(weight, bias, reader=reader))


def _check_no_hooks(model: PreTrainedModel, family: Family) -> None:
    """Raises UserError when a module that `install` replaces has hooks, which would be gone with it."""
    layers = model.config.num_hidden_layers
    maps = [f"{family.block(layer)}.{path}" for layer in range(layers) for path in family.qkv]
    for path in sorted({*family.norms(layers).values(), *maps, family.embedding}):
        module = model.get_submodule(path)
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            raise UserError(
                f"{path} has a hook, and this module is replaced; remove the hook, and register it after install on what "
                "NormSites.norms holds"
            )


def _some(sites: list[Site], most: int = 4) -> str:
    names = [str(site) for site in sites[:most]]
    return ", ".join(names) + (", ..." if len(sites) > most else "")


def _as_freezable(module: nn.Module) -> FreezableNorm:
    assert isinstance(module, FreezableNorm), type(module)
    return module


def _check_fraction(value: float, what: str) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"the {what} must be a share from 0 to 1, found {value}")
