"""The LN-free model of a run in nnsight: saved activations, the direct effects of all heads, two interventions.

python examples/with_nnsight.py checkpoints/demo
"""

import sys

import nnsight
import torch

import ln_removal  # noqa: F401  (registers the model class)

run, text = sys.argv[1], "def add(a, b):\n    return a +"
torch.set_grad_enabled(False)
model = nnsight.LanguageModel(f"{run}/model", device_map="cpu", dispatch=True)
blocks, config = model.transformer.h, model.config
tokens = model.tokenizer(text, return_tensors="pt").input_ids

# Activations, in the order in which they are computed. Nothing stands between the final stream and the unembedding.
with model.trace(tokens):
    z = nnsight.save([block.attn.c_proj.input for block in blocks])  # L times (1, T, D)
    final = model.transformer.ln_f.output.save()  # (1, T, D)
    logits = model.lm_head.output.save()
unembedding = model.lm_head.weight.T  # (D, V)
assert torch.allclose(final @ unembedding + model.lm_head.bias, logits, rtol=1e-4, atol=1e-4)
token = int(logits[0, -1].argmax())
print(f"{text!r} -> {model.tokenizer.decode([token])!r}")

# The direct effect of every head on the logit of that token, at the last position.
z = torch.stack(z).unflatten(-1, (config.n_head, -1))  # (L, 1, T, H, K)
W_O = torch.stack([block.attn.c_proj.weight for block in blocks]).unflatten(1, (config.n_head, -1))  # (L, H, K, D)
heads = torch.einsum("lnthk,lhkd->lhntd", z, W_O)  # what each head writes
direct = heads[:, :, 0, -1] @ unembedding[:, token]  # (L, H), logits
for layer, row in enumerate(direct):
    print(f"layer {layer}:", "  ".join(f"{value:+8.3f}" for value in row))
layer, head = divmod(int(direct.abs().argmax()), config.n_head)

# The first intervention takes this head out of the final stream only. The logit falls by the direct effect, exactly.
with model.trace(tokens):
    model.transformer.ln_f.output[:] -= heads[layer, head]
    cut = model.lm_head.output.save()

# The second one takes it out of the model, so that later layers do without it, too.
width = config.n_embd // config.n_head
with model.trace(tokens):
    blocks[layer].attn.c_proj.input[:, :, head * width : (head + 1) * width] = 0
    ablated = model.lm_head.output.save()
changes = [float((logits - other)[0, -1, token]) for other in (cut, ablated)]
print(
    f"L{layer}H{head}: direct effect {direct[layer, head]:+.4f}; without its path {changes[0]:+.4f}, without it {changes[1]:+.4f}"
)
assert abs(changes[0] - float(direct[layer, head])) < 1e-3
