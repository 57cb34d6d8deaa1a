"""The LN-free model of a run in circuit-tracer 0.5: an attribution graph whose edges are exact also when nothing is frozen.

circuit-tracer needs an environment of its own, without ln-removal (docs/interpretability.md). The transcoders here are random, so
the features mean nothing. What is shown holds for any transcoders, because the graph has a node for the error of each.

python examples/with_circuit_tracer.py checkpoints/demo
"""

import sys

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from transformer_lens import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import convert_hf_model_config
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

run, text = sys.argv[1], "def add(a, b):\n    return a +"
stock = f"{run}/stock"
plain = AutoModelForCausalLM.from_pretrained(stock).eval()
tokenizer = AutoTokenizer.from_pretrained(stock)
assert plain.config.layer_norm_epsilon > 1e10, f"{stock} is not the stock form of an LN-free model"

# HookedTransformer loads by name only names that it knows. Its own conversions of configuration and weights take a directory.
context = {"n_ctx": plain.config.n_positions, "device": "cpu"}
config = HookedTransformerConfig.from_dict(convert_hf_model_config(stock) | context)
torch.manual_seed(0)
layers, width, features = config.n_layers, config.d_model, 64
transcoders = {}
for layer in range(layers):
    one = SingleLayerTranscoder(width, features, torch.relu, layer, device=torch.device("cpu"), dtype=torch.float32)
    torch.nn.init.normal_(one.W_enc, std=width**-0.5)
    torch.nn.init.normal_(one.W_dec, std=width**-0.5)
    transcoders[layer] = one
reads_and_writes = ("hook_resid_mid", "hook_mlp_out")
model = TransformerLensReplacementModel.from_config(
    config, TranscoderSet(transcoders, *reads_and_writes), tokenizer=tokenizer
)
named = {
    name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed."): value
    for name, value in convert_gpt2_weights(plain, config).items()
}
assert not model.load_state_dict(named, strict=False).unexpected_keys

# The same logits as the plain model. circuit-tracer gives no node to the first position, so the end-of-text token stands there.
tokens = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
with torch.no_grad():
    logits, cache = model.run_with_cache(tokens.unsqueeze(0))
    expected = plain(tokens.unsqueeze(0)).logits
difference = float((logits - expected).abs().max())
token = int(logits[0, -1].argmax())
print(f"{text!r} -> {tokenizer.decode([token])!r}; largest difference of the logits {difference:.1e}")
assert difference < 1e-3

# The graph: edges from features, errors and tokens to the logit, which circuit-tracer centres over the vocabulary.
graph = attribute(tokens, model, max_n_logits=1, desired_logit_prob=0.0, batch_size=64)
edges = graph.adjacency_matrix[-1]
active = graph.active_features[graph.selected_features]  # (features, 3): layer, position, index


def centred(values: torch.Tensor) -> torch.Tensor:
    return values[0, -1, token] - values[0, -1].mean()


# What has no node: positions, biases of attention and of the final norm, and the MLPs at the first position.
kept = {}
sites = ["hook_pos_embed", *(f"blocks.{i}.{name}" for i in range(layers) for name in ("hook_attn_out", "hook_mlp_out"))]


def keep(value: torch.Tensor, hook: object) -> None:
    kept[hook.name] = value
    value.requires_grad_() if value.is_leaf else value.retain_grad()


with model.hooks([(site, keep) for site in sites]):
    centred(model(tokens.unsqueeze(0))).backward()
with torch.no_grad():
    constant = (kept["hook_pos_embed"].grad * kept["hook_pos_embed"]).sum()
    for layer, block in enumerate(model.blocks):
        bias = block.attn.b_O + torch.einsum("hk,hkd->d", block.attn.b_V, block.attn.W_O)
        constant += (kept[f"blocks.{layer}.hook_attn_out"].grad @ bias).sum()
        constant += (kept[f"blocks.{layer}.hook_mlp_out"].grad * kept[f"blocks.{layer}.hook_mlp_out"])[0, 0].sum()
    read = model.unembed.W_U[:, token] - model.unembed.W_U.mean(dim=1)
    constant += model.ln_final.b @ read
total, exact = float(edges.sum() + constant), float(centred(logits))
print(f"edges and constants sum to the centred logit: {total:+.4f}, {exact:+.4f}")

# A feature of the last layer is taken out of the model, and nothing is frozen. The logit falls by the edge, exactly.
last = [i for i, one in enumerate(active.tolist()) if one[0] == layers - 1 and one[1] == len(tokens) - 1]
chosen = max(last, key=lambda i: abs(float(edges[i])))
layer, position, feature = active[chosen].tolist()
without, _ = model.feature_intervention(tokens, [(layer, position, feature, 0.0)], freeze_attention=False)
effect, change = float(edges[chosen]), float(centred(logits) - centred(without))
print(f"feature {feature} of layer {layer}: edge to the logit {effect:+.4f}; without it {change:+.4f}")
assert abs(change - effect) < 1e-3
