"""The LN-free model of a run in TransformerLens 4: a cache, the direct effects of all heads, two interventions.

python examples/with_transformer_lens.py checkpoints/demo
"""

import sys

import torch
from transformer_lens.model_bridge import TransformerBridge

import ln_removal  # noqa: F401  (registers the model class)

run, text = sys.argv[1], "def add(a, b):\n    return a +"
torch.set_grad_enabled(False)
bridge = TransformerBridge.boot_transformers(f"{run}/model", device="cpu")
tokens = bridge.to_tokens(text, prepend_bos=False)

# A cache. Nothing stands between the residual stream and the unembedding, so the stream times W_U is the logits.
logits, cache = bridge.run_with_cache(tokens)
final = cache["ln_final.hook_in"]  # (1, T, D)
assert torch.allclose(final @ bridge.W_U + bridge.b_U, logits, rtol=1e-4, atol=1e-4)
token = int(logits[0, -1].argmax())
print(f"{text!r} -> {bridge.tokenizer.decode([token])!r}")

# The direct effect of every head on the logit of that token, at the last position.
z = torch.stack([cache[f"blocks.{layer}.attn.hook_z"] for layer in range(bridge.cfg.n_layers)])  # (L, 1, T, H, K)
heads = torch.einsum("lnthk,lhkd->lhntd", z, bridge.W_O)  # what each head writes
direct = heads[:, :, 0, -1] @ bridge.W_U[:, token]  # (L, H), logits
for layer, row in enumerate(direct):
    print(f"layer {layer}:", "  ".join(f"{value:+8.3f}" for value in row))
layer, head = divmod(int(direct.abs().argmax()), bridge.cfg.n_heads)


# The first intervention takes this head out of the final stream only. The logit falls by the direct effect, exactly.
def without_path(stream: torch.Tensor, hook: object) -> torch.Tensor:
    return stream - heads[layer, head]


# The second one takes it out of the model, so that later layers do without it, too.
def without_head(values: torch.Tensor, hook: object) -> torch.Tensor:
    values[:, :, head] = 0
    return values


cut = bridge.run_with_hooks(tokens, fwd_hooks=[("ln_final.hook_in", without_path)])
ablated = bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", without_head)])
changes = [float((logits - other)[0, -1, token]) for other in (cut, ablated)]
print(
    f"L{layer}H{head}: direct effect {direct[layer, head]:+.4f}; without its path {changes[0]:+.4f}, without it {changes[1]:+.4f}"
)
assert abs(changes[0] - float(direct[layer, head])) < 1e-3
