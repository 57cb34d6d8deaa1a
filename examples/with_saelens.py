"""The LN-free model of a run in SAELens 6: its activations, a small sparse autoencoder, the exact direct effect of a feature.

SAELens needs an environment of its own, without ln-removal (docs/interpretability.md).

python examples/with_saelens.py checkpoints/demo
"""

import argparse
import ast
import dataclasses
import difflib
import doctest
import inspect
import sys

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.load_model import load_model

run, text = sys.argv[1], "def add(a, b):\n    return a +"
stock = f"{run}/stock"

# SAELens hooks the modules of a transformers model. The output of the last block is the final residual stream.
model = load_model("AutoModelForCausalLM", stock, device="cpu")
config, tokenizer = model.model.config, model.tokenizer
assert config.layer_norm_epsilon > 1e10, f"{stock} is not the stock form of an LN-free model"
site = f"transformer.h.{config.n_layer - 1}"

# A small autoencoder, trained for a few steps on some of Python's own library. Take more text and tokens for a real one.
context = min(64, config.n_positions)
texts = [inspect.getsource(module) for module in (argparse, ast, dataclasses, difflib, doctest, inspect)]
training = LanguageModelSAERunnerConfig(
    sae=StandardTrainingSAEConfig(d_in=config.n_embd, d_sae=4 * config.n_embd, l1_coefficient=0.1),
    model_name=stock,
    model_class_name="AutoModelForCausalLM",
    hook_name=site,
    context_size=context,
    training_tokens=64 * 512,
    train_batch_size_tokens=8 * context,
    store_batch_size_prompts=8,
    n_batches_in_buffer=8,
    prepend_bos=False,
    is_dataset_tokenized=False,
    streaming=False,
    lr=1e-3,
    logger=LoggingConfig(log_to_wandb=False),
    checkpoint_path=None,
    output_path=None,
    device="cpu",
)
runner = LanguageModelSAETrainingRunner(
    training, override_dataset=Dataset.from_dict({"text": texts}), override_model=model
)
sae = runner.run()
torch.set_grad_enabled(False)

# The norms have a constant scale, so the final one and the unembedding are one matrix. Its rows lose their mean, as the norm
# takes it from the stream.
tokens = tokenizer(text, return_tensors="pt")["input_ids"]
logits, cache = model.run_with_cache(tokens)
final = cache[site]  # (1, T, D)
weight, norm = model.model.lm_head.weight, model.model.transformer.ln_f
read = (weight - weight.mean(dim=1, keepdim=True)).T * norm.weight[:, None] / norm.eps**0.5  # (D, V)
constant = weight @ norm.bias  # (V,), the logit bias
assert torch.allclose(final @ read + constant, logits, rtol=1e-4, atol=1e-4)
token = int(logits[0, -1].argmax())
print(f"{text!r} -> {tokenizer.decode([token])!r}")

# What the autoencoder writes is a sum over features, and so is its share of the logit.
features = sae.encode(final)  # (1, T, F)
lost = final - sae.decode(features)
print(f"variance that the autoencoder explains: {1 - float(lost.var() / final.var()):.2f}")
direct = features[0, -1] * (sae.W_dec @ read[:, token])  # (F,), logits
total = float(direct.sum() + (sae.b_dec + lost[0, -1]) @ read[:, token] + constant[token])
exact = float(logits[0, -1, token])
print(f"features, bias and error sum to the logit: {total:+.4f}, {exact:+.4f}")
feature = int(direct.abs().argmax())
effect = float(direct[feature])


# Without the feature the logit falls by its direct effect, exactly.
def without_feature(stream: torch.Tensor, hook: object) -> torch.Tensor:
    return stream - features[..., feature, None] * sae.W_dec[feature]


cut = model.run_with_hooks(tokens, fwd_hooks=[(site, without_feature)])
change = float((logits - cut)[0, -1, token])
print(f"feature {feature}: direct effect {effect:+.4f}; without it {change:+.4f}")
assert abs(change - effect) < 1e-3
