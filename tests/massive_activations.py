"""A GPT-2 of random weights with massive activations at position 0, made the way GPT-2 makes them: by an early MLP.

In GPT-2 small the residual stream at position 0 has a norm of about 3,000 from the third layer on, nearly all of it in
a few coordinates, against about 100 at other positions; the norms behind it hardly let these coordinates through.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from ln_removal.models.norm_free import from_folded
from ln_removal.models.normfree_gpt2 import NormFreeGPT2LMHeadModel
from ln_removal.norms.surgery import fold, install

CHANNELS = (138, 378, 447)
"""The coordinates of GPT-2 small's massive activations."""

SHARES = (0.3, 0.35, 0.89)
"""How they share the norm; the sum of their squares is 1."""

NORM = 6000.0
"""Of the residual stream at position 0 while the LayerNorms are there; about half of it is left when they are frozen."""

MAKER = 2
"""The layer whose MLP makes them."""


@torch.no_grad()
def gpt2_with_massive_activations(
    *, n_layer: int = 12, vocab_size: int = 2048, n_positions: int = 64, seed: int = 0
) -> GPT2LMHeadModel:
    """A GPT-2 of GPT-2 small's width and heads, in evaluation mode, float32, end-of-text the last token.

    Position 0 is told by its position embedding, as in GPT-2; neurons of layer MAKER's MLP that respond to it alone
    write the massive activations.
    """
    config = GPT2Config(
        n_embd=768,
        n_layer=n_layer,
        n_head=12,
        vocab_size=vocab_size,
        n_positions=n_positions,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = model.to_empty(device="cpu").eval()  # every weight is set below
    model.tie_weights()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # Sizes of GPT-2 small: embeddings of std 0.14, blocks that each write about as much as the stream holds.
    model.transformer.wte.weight.normal_(0, 0.14, generator=generator)
    model.transformer.wpe.weight.normal_(0, 0.02, generator=generator)
    mark = randn(768)
    mark -= mark.mean()
    mark[list(CHANNELS)] = 0
    mark /= mark.norm()
    for i, block in enumerate(model.transformer.h):
        block.attn.c_attn.weight.normal_(0, 0.1, generator=generator)
        block.attn.c_proj.weight.normal_(0, 0.06, generator=generator)
        block.mlp.c_fc.weight.normal_(0, 0.08, generator=generator)
        block.mlp.c_proj.weight.normal_(0, 0.03, generator=generator)
        for norm in (block.ln_1, block.ln_2):
            norm.weight.copy_(0.3 + 0.05 * randn(768))
            norm.bias.copy_(0.02 * randn(768))
            if i > MAKER:
                norm.weight[list(CHANNELS)] = 0.01
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            block.get_submodule(name).bias.copy_(0.1 * randn(block.get_submodule(name).bias.shape[0]))
    model.transformer.ln_f.weight.copy_(1.5 + 0.3 * randn(768))
    model.transformer.ln_f.weight[list(CHANNELS)] = 0.01
    model.transformer.ln_f.bias.copy_(0.05 * randn(768))
    # Nothing else writes along the mark before the maker reads it.
    _remove_direction(model.transformer.wte.weight, mark)
    _remove_direction(model.transformer.wpe.weight, mark)
    for block in model.transformer.h[: MAKER + 1]:
        for name in ("attn.c_proj", "mlp.c_proj"):
            _remove_direction(block.get_submodule(name).weight, mark)
            _remove_direction(block.get_submodule(name).bias, mark)
    model.transformer.wpe.weight[0] += 10 * mark
    _add_maker(model, mark)
    return model


def _remove_direction(rows: Tensor, direction: Tensor) -> None:
    rows -= (rows @ direction).unsqueeze(-1) * direction


def _add_maker(model: GPT2LMHeadModel, mark: Tensor) -> None:
    """Give eight neurons of layer MAKER's MLP the position embedding of position 0 to look for, and CHANNELS to write."""
    block = model.transformer.h[MAKER]
    neurons = slice(0, 8)
    block.mlp.c_fc.weight[:, neurons] = (2 * mark / block.ln_2.weight).unsqueeze(1)
    block.mlp.c_fc.bias[neurons] = -4.0
    written = torch.zeros(768)
    written[list(CHANNELS)] = torch.tensor(SHARES)
    block.mlp.c_proj.weight[neurons] = written
    # What the neurons put out at position 0, on a few texts, decides how strongly they write.
    outputs: list[Tensor] = []
    handle = block.mlp.act.register_forward_hook(lambda module, args, output: outputs.append(output[:, 0, neurons]))
    tokens = torch.randint(0, model.config.vocab_size, (8, 8), generator=torch.Generator().manual_seed(1))
    model(tokens, use_cache=False)
    handle.remove()
    block.mlp.c_proj.weight[neurons] *= NORM / outputs[0].sum(dim=1).mean()


@torch.no_grad()
def freeze_in_order(model: GPT2LMHeadModel, tokens: Tensor) -> NormFreeGPT2LMHeadModel:
    """The LN-free model after freezing every site without training, and without special constants.

    From the first layer to the last, each at the statistics behind the sites frozen before it, as in a removal: frozen
    all at once, an untrained model's constants would not fit its activations.
    """
    sites = install(model, eot_token_id=model.config.eos_token_id)
    order = [site for i in range(model.config.n_layer) for site in (f"ln_1_qk.{i}", f"ln_1_v.{i}", f"ln_2.{i}")]
    for special in ("eot", "first"):
        sites.set_special(special, 1)
    for site in [*order, "ln_f"]:
        if not site.startswith("ln_1_v"):  # the same norm as ln_1_qk
            model.train()
            model.transformer(tokens, use_cache=False)
            model.eval()
            sites.update_running(0.0)
        sites.set_mix(site, 1)
    return from_folded(model.config, fold(model))


@torch.no_grad()
def residual_norms(model: GPT2LMHeadModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Norm of the residual stream after each block: (L,) at position 0, and (L,) the mean over other positions."""
    streams: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: streams.append(output))
        for block in model.transformer.h
    ]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    norms = torch.stack([stream.norm(dim=-1) for stream in streams])  # (L, B, T)
    return norms[:, :, 0].mean(dim=1), norms[:, :, 1:].mean(dim=(1, 2))
