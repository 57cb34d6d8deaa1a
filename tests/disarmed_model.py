"""A GPT-2 in the form in which others published their LN-free models: LayerNorms disarmed by a huge epsilon."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import GPT2LMHeadModel

EPSILON = 1e12


def norms_of(model: GPT2LMHeadModel) -> list[nn.LayerNorm]:
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


@torch.no_grad()
def disarm(model: GPT2LMHeadModel, *, seed: int = 0) -> GPT2LMHeadModel:
    """A copy whose norms have epsilon 10^12 and weights 10^6 gamma / sigma, one sigma between 0.17 and 17 a norm."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    for norm in norms_of(model):
        sigma = float(0.17 * 100 ** torch.rand((), generator=generator))
        norm.weight.mul_(EPSILON**0.5 / sigma)
        norm.eps = EPSILON
    model.config.layer_norm_epsilon = EPSILON
    return model


def faithful(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    """What a disarmed model is meant to compute: all its epsilons 10^12, in float64."""
    wide = copy.deepcopy(model).double()
    for norm in norms_of(wide):
        norm.eps = EPSILON
    return wide
