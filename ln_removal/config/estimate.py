"""Estimates of a run's parameters, memory and time from its sizes alone, without weights or network.

Memory is estimated as parameters, gradients and moments in float32, plus what the forward pass keeps for the backward
pass: for B sequences of T tokens, L layers of width D and a vocabulary of V,

    activations = B T (L c D + 12 D)  +  10 V min(B T, positions of one chunk)        [bytes]

(and with a teacher its weights in the run's precision and twice the last term; with the entropy penalty 15 B H T T L
for H heads; with `training.lora_rank` only the changes, biases and norms have gradients and moments), with c measured on a
GPT-2 (bytes kept by autograd per layer, token and unit of width, with dropout off and
fused attention): 40 compiled and 82 not in bfloat16 autocast, 76 and 140 in float32. Other families keep less when they are
not compiled, as `KEPT_NOT_COMPILED` says; compiled they are taken to keep less in the same proportion. Time is estimated
as tokens * (6 N + 12 L D T) FLOPs (N parameters, the second term for attention; a third more with a teacher) at an
assumed share of the device's peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from ln_removal.config.recipe import ArchitectureSpec, Recipe
from ln_removal.errors import UserError


def _published(n_layer: int, n_head: int, n_embd: int) -> ArchitectureSpec:
    return ArchitectureSpec(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=1024, vocab_size=50257)


def _pythia(n_layer: int, n_head: int, n_embd: int) -> ArchitectureSpec:
    return ArchitectureSpec(
        family="pythia", n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=2048, vocab_size=50304
    )


KNOWN_ARCHITECTURES = {
    "gpt2": _published(12, 12, 768),
    "distilgpt2": _published(6, 12, 768),
    "gpt2-medium": _published(24, 16, 1024),
    "gpt2-large": _published(36, 20, 1280),
    "gpt2-xl": _published(48, 25, 1600),
    "EleutherAI/pythia-70m": _pythia(6, 8, 512),
    "EleutherAI/pythia-160m": _pythia(12, 12, 768),
    "HuggingFaceTB/SmolLM2-135M": ArchitectureSpec(
        family="llama",
        n_layer=30,
        n_head=9,
        n_kv_head=3,
        n_embd=576,
        n_inner=1536,
        n_positions=8192,
        vocab_size=49152,
        tied=True,
    ),
    "Qwen/Qwen2.5-0.5B": ArchitectureSpec(
        family="qwen2",
        n_layer=24,
        n_head=14,
        n_kv_head=2,
        n_embd=896,
        n_inner=4864,
        n_positions=32768,
        vocab_size=151936,
        tied=True,
    ),
}
"""Published sizes. Planning a run of one of them needs no network."""

_OWNERS = ("openai-community/", "distilbert/")


def published_architecture(name: str) -> ArchitectureSpec | None:
    """The architecture of a published size, with its Hub owner or without; None for any other model."""
    for owner in _OWNERS:
        name = name.removeprefix(owner)
    return KNOWN_ARCHITECTURES.get(name)


@dataclass(frozen=True)
class DevicePeak:
    """A GPU's dense peak in FLOP/s, for bfloat16 and float16 inputs and for float32 ones (TensorFloat-32), and its memory in bytes."""

    bfloat16: float
    float32: float
    memory: int


DEVICE_PEAKS = {
    "H200": DevicePeak(989e12, 495e12, 141 * 10**9),
    "H100": DevicePeak(989e12, 495e12, 80 * 10**9),
    "A100": DevicePeak(312e12, 156e12, 80 * 10**9),
    "L40S": DevicePeak(362e12, 183e12, 48 * 10**9),
    "RTX 4090": DevicePeak(165e12, 82.6e12, 24 * 10**9),
    "RTX 3090": DevicePeak(71e12, 35.6e12, 24 * 10**9),
    "L4": DevicePeak(121e12, 60e12, 24 * 10**9),
}
"""By a part of the GPU's name, of which the first match counts. The numbers are those of the makers' data sheets."""

ASSUMED_UTILISATION = 0.30
"""Share of the peak. nanoGPT reaches this share with GPT-2 small on an A100 (107k tokens/s), llm.c 0.41 on an H100."""

KEPT_COMPILED = {"bfloat16": 40, "float32": 76}
"""c of the module's formula of a compiled GPT-2, by precision."""

KEPT_NOT_COMPILED = {
    "bfloat16": {"gpt2": (82, 0), "pythia": (53, 0), "llama": (35, 8), "qwen2": (35, 8), "qwen3": (47, 8)},
    "float32": {"gpt2": (140, 0), "pythia": (91, 0), "llama": (45, 16), "qwen2": (45, 16), "qwen3": (69, 16)},
}
"""c of a model that is not compiled, by precision and family: a constant, and what comes for each multiple of the width that the MLP
has inside. GPT-2's activation is written as eight operations, each of which keeps its input."""

# The same numbers as in training/cross_entropy.py and training/setup.py. Those import torch, which planning does without.
POSITIONS_IN_A_CHUNK = 8192  # on a GPU
CPU_TOKENS_IN_A_PASS = 4096
LARGEST_AUTOMATIC_MICRO_BATCH = 128


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device at the peak of a training step."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    teacher: int = 0

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.teacher


def count_parameters(shape: ArchitectureSpec) -> int:
    """Parameters of a model of this architecture, with a tied unembedding counted once.

    The published GPT-2 has V D + P D + L (12 D^2 + 13 D) + 2 D with P positions. Pythia has 2 V D in place of V D + P D. A Llama
    with H heads of width K, G heads of keys and values and an MLP of width I has L (2 H K D + 2 G K D + 3 I D + 2 D) + D beside its
    embeddings, and Qwen2 L (H + 2 G) K biases more. A model without norms lacks theirs; with the paper's biases a layer has 2 D
    in place of 9 D biases.
    """
    layer = block_matrices(shape) + _biases(shape) + 2 * _norm(shape, shape.block_norm)
    layer += 2 * shape.width_of_head if shape.parts.norms_of_heads or shape.qk_norm else 0
    layer += 2 if shape.residual_gain == "learned" else 0
    count = _embeddings(shape) + shape.n_layer * layer + _norm(shape, shape.final_norm)
    if shape.activation == "learnable_leaky_relu":
        count += shape.n_layer if shape.slopes == "layer" else 1
    return count


def _embeddings(shape: ArchitectureSpec) -> int:
    """Parameters of the embeddings, and of the unembedding if it is not one of them."""
    rows = shape.vocab_size * (1 if shape.is_tied else 2) + (shape.n_positions if shape.parts.learned_positions else 0)
    return rows * shape.n_embd


def block_matrices(shape: ArchitectureSpec) -> int:
    """Weights of the linear maps of one block."""
    return sum(inputs * outputs for inputs, outputs in _maps(shape))


def _maps(shape: ArchitectureSpec) -> list[tuple[int, int]]:
    """Inputs and outputs of each matrix of one block: attention's with its projection, then the MLP's."""
    width, inside = shape.n_embd, shape.width_of_mlp
    queries, keys = _attention_widths(shape)
    # GPT-2 and Pythia have one matrix for queries, keys and values.
    readers = [queries, keys, keys] if shape.parts.gated else [queries + 2 * keys]
    into_mlp = 2 if shape.parts.gated else 1
    return [*((width, reader) for reader in readers), (queries, width), *[(width, inside)] * into_mlp, (inside, width)]


def _attention_widths(shape: ArchitectureSpec) -> tuple[int, int]:
    """Width of all queries, and of all keys, which is that of all values."""
    return shape.n_head * shape.width_of_head, (shape.n_kv_head or shape.n_head) * shape.width_of_head


def _biases(shape: ArchitectureSpec) -> int:
    """Biases of the linear maps of one block."""
    if shape.biases == "paper":
        return 2 * shape.n_embd
    parts, (queries, keys) = shape.parts, _attention_widths(shape)
    attention = parts.attention_biases
    if shape.attention_bias is not None:
        attention = "all" if shape.attention_bias else "none"
    count = 0 if attention == "none" else queries + 2 * keys
    count += shape.n_embd if attention == "all" else 0
    if parts.mlp_biases if shape.mlp_bias is None else shape.mlp_bias:
        count += shape.width_of_mlp * (2 if parts.gated else 1) + shape.n_embd
    return count


def _norm(shape: ArchitectureSpec, kind: str) -> int:
    """Parameters of one norm, or of what is in its place: an RMSNorm has no bias, DyT and Derf have one and two scalars."""
    vectors, scalars = {"layernorm": (2, 0), "rmsnorm": (1, 0), "none": (0, 0), "dyt": (2, 1), "derf": (2, 2)}[kind]
    return vectors * shape.n_embd + scalars


def flops_per_token(shape: ArchitectureSpec, context: int) -> int:
    """Training FLOPs of one token: 6 N + 12 L H K T (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    return 6 * count_parameters(shape) + 12 * shape.n_layer * shape.n_head * shape.width_of_head * context


def estimate_memory(recipe: Recipe, shape: ArchitectureSpec, micro_batch: int) -> Memory:
    """Bytes at the peak of a training step with `micro_batch` sequences a pass (formula: see the module's text)."""
    count = count_parameters(shape)
    training = recipe.training
    matrices = shape.n_layer * block_matrices(shape)
    own, trained, in_matrices = count, count, matrices
    if training.lora_rank is not None:
        # The change of a matrix has rank (in + out) parameters.
        in_matrices = shape.n_layer * training.lora_rank * sum(map(sum, _maps(shape)))
        own += in_matrices
        trained = in_matrices + count - matrices - _embeddings(shape)
    # AdamW keeps two moments of every trained parameter, Muon one of those in matrices inside the blocks.
    moments = 2 * trained - (in_matrices if training.optimizer == "muon" else 0)
    tokens = micro_batch * recipe.data.context
    kept = activation_bytes(shape, training.precision, compiled=training.compile is not False)
    activations = round(tokens * (shape.n_layer * kept + 12) * shape.n_embd)
    # bfloat16 logits, their float32 copy and its gradient, for one chunk at a time.
    logits = 10 * min(tokens, POSITIONS_IN_A_CHUNK) * shape.vocab_size
    activations += logits
    if training.entropy_weight > 0:  # scores, probabilities and their gradients, (B, H, T, T) in float32
        activations += tokens * shape.n_layer * shape.n_head * recipe.data.context * 15
    teacher = 0
    if has_teacher(recipe):
        teacher = (4 if training.precision == "float32" else 2) * count
        activations += logits
    if training.precision != "float32":
        activations += 2 * matrices  # autocast's copies of the weights
    elif training.lora_rank is not None:
        activations += 4 * matrices  # the changed weights, which the backward pass needs
    return Memory(
        parameters=4 * own, gradients=4 * trained, optimizer=4 * moments, activations=activations, teacher=teacher
    )


def activation_bytes(shape: ArchitectureSpec, precision: str, *, compiled: bool) -> float:
    """c of the module's formula for a family."""
    width = "float32" if precision == "float32" else "bfloat16"
    constant, inside = KEPT_NOT_COMPILED[width][shape.family]
    kept = constant + inside * shape.width_of_mlp / shape.n_embd
    return kept * KEPT_COMPILED[width] / KEPT_NOT_COMPILED[width]["gpt2"][0] if compiled else kept


def has_teacher(recipe: Recipe) -> bool:
    return recipe.schedule is not None and recipe.training.distillation > 0


def peak_of(device: str) -> DevicePeak | None:
    """The peak of a GPU by its name; None for a CPU and for a GPU that is not in the table."""
    return next((peak for name, peak in DEVICE_PEAKS.items() if name.lower() in device.lower()), None)


def micro_batch_of(recipe: Recipe, shape: ArchitectureSpec, peak: DevicePeak | None, processes: int) -> int:
    """The recipe's micro-batch, or for "auto" the largest divisor of a process's share that should fit into memory."""
    context = recipe.data.context
    sequences = recipe.training.tokens_per_step // context
    if sequences % processes:
        raise UserError(
            f"{sequences} sequences a step do not divide among {processes} processes; "
            "change training.tokens_per_step or the number of processes"
        )
    share = sequences // processes
    if recipe.training.micro_batch != "auto":
        return min(share, recipe.training.micro_batch)
    divisors = [size for size in range(min(share, LARGEST_AUTOMATIC_MICRO_BATCH), 0, -1) if share % size == 0]
    if peak is None:
        return next((size for size in divisors if size * context <= CPU_TOKENS_IN_A_PASS), 1)
    return next((size for size in divisors if estimate_memory(recipe, shape, size).total <= 0.9 * peak.memory), 1)


def assumed_rate(peak: DevicePeak, recipe: Recipe) -> float:
    """FLOP/s that a run is assumed to reach on one GPU."""
    return ASSUMED_UTILISATION * (peak.float32 if recipe.training.precision == "float32" else peak.bfloat16)


def memory_assumption(recipe: Recipe) -> str:
    compiled = "not compiled" if recipe.training.compile is False else "compiled"
    return f"memory for a {compiled} model in {recipe.training.precision}, float32 weights and moments; estimate"


def readable_duration(seconds: float) -> str:
    """A number of seconds in a unit that suits it, such as "12 min"; days from two of them on."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    days = seconds / 86400
    return f"{days:,.0f} days" if days >= 10 else f"{days:.1f} days"
