"""The dry run: what a recipe will do to a model, how much memory it takes and how long, without weights or network.

Memory is estimated as parameters, gradients and moments in float32, plus what the forward pass keeps for the backward
pass: for B sequences of T tokens, L layers of width D and a vocabulary of V,

    activations = B T (L c D + 12 D)  +  10 V min(B T, positions of one chunk)        [bytes]

(and with a teacher its weights in the run's precision and twice the last term; with the entropy penalty 15 B H T T L
for H heads), with c measured on this project's model (bytes kept by autograd per layer, token and unit of width, with
dropout off and fused attention): 40 compiled and 82 not in bfloat16 autocast, 76 and 140 in float32. Time is estimated
as tokens * (6 N + 12 L D T) FLOPs (N parameters, the second term for attention; a third more with a teacher) at an
assumed share of the device's peak.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ln_removal.errors import UserError
from ln_removal.recipe import ArchitectureSpec, Recipe, dump_toml
from ln_removal.schedule import RemovalSchedule, expand

if TYPE_CHECKING:
    from rich.console import Console


def _published(n_layer: int, n_head: int, n_embd: int) -> ArchitectureSpec:
    return ArchitectureSpec(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=1024, vocab_size=50257)


KNOWN_ARCHITECTURES = {
    "gpt2": _published(12, 12, 768),
    "distilgpt2": _published(6, 12, 768),
    "gpt2-medium": _published(24, 16, 1024),
    "gpt2-large": _published(36, 20, 1280),
    "gpt2-xl": _published(48, 25, 1600),
}
"""Published sizes, so that planning them needs neither weights nor network."""

REMOVABLE = ("gpt2", "normfree_gpt2")
"""Model types that a removal may be planned for; the latter is refused later, with what it is."""

_OWNERS = ("openai-community/", "distilbert/")


@dataclass(frozen=True)
class DevicePeak:
    """A GPU's dense peak in FLOP/s, for bfloat16 or float16 and for float32 inputs (TensorFloat-32), and its memory in bytes."""

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
"""From the makers' data sheets; the part of a name that identifies the GPU, the first match counts."""

ASSUMED_UTILISATION = 0.30
"""Share of the peak: nanoGPT reaches it with GPT-2 small on an A100 (107k tokens/s), llm.c reaches 0.41 on an H100."""

ACTIVATION_BYTES = {("bfloat16", True): 40, ("bfloat16", False): 82, ("float32", True): 76, ("float32", False): 140}
"""c of the module's formula, by (precision, compiled)."""

# The same numbers as in linear_cross_entropy.py and training/setup.py, which import torch: planning answers without it.
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


@dataclass(frozen=True)
class Plan:
    """What a run will be.

    Attributes:
        recipe: resolved, defaults and overrides applied.
        architecture: of the model that the recipe names.
        schedule: None for pretraining.
        device: as asked for: "cpu", or a GPU's name.
        micro_batch: sequences of one forward pass, chosen as training would where the recipe says "auto".
        parameters: of the model, the tied unembedding counted once.
        memory: estimate for one device.
        seconds: estimate for the whole run, its control included if planned; None where only a run can tell.
        seconds_elsewhere: the same on one GPU of other kinds, by name.
        assumptions: sentences that say what the estimates rest on.
    """

    recipe: Recipe
    architecture: ArchitectureSpec
    schedule: RemovalSchedule | None
    device: str
    micro_batch: int
    parameters: int
    memory: Memory
    seconds: float | None
    seconds_elsewhere: dict[str, float]
    assumptions: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of the run, without its control."""
        return self.recipe.tokens

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.training.steps

    def to_json(self) -> dict[str, object]:
        """A dictionary of plain values: what `--dry-run --json` prints."""
        tokens_per_step = self.recipe.training.tokens_per_step
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "architecture": self.architecture.model_dump(mode="json"),
            "schedule": [] if self.schedule is None else self.schedule.to_json(tokens_per_step),
            "tokens": self.tokens,
            "steps": self.steps,
            "micro_batch": self.micro_batch,
            "parameters": self.parameters,
            "memory_bytes": self.memory.total,
            "memory": asdict(self.memory),
            "device": self.device,
            "seconds": self.seconds,
            "seconds_elsewhere": self.seconds_elsewhere,
            "assumptions": list(self.assumptions),
        }

    def render(self, console: Console) -> None:
        """Print the resolved recipe, the schedule as a table and a timeline, and the estimates."""
        from rich.rule import Rule
        from rich.table import Table

        def plain(text: str) -> None:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

        console.print(Rule(f"recipe {self.recipe.name}"))
        plain(dump_toml(self.recipe).rstrip())
        if self.schedule is not None:
            console.print(Rule("schedule: the optimizer step at which each site freezes"))
            header, *rows = self.schedule.table()
            table = Table(*header, box=None, header_style="bold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print(Rule("timeline"))
            plain(self.schedule.timeline(min(console.width, 120)))
            plain("(. LayerNorm or special constant kept   - + = in between   # constant)")
        console.print(Rule("plan"))
        summary = Table(box=None, show_header=False)
        summary.add_column(no_wrap=True)
        summary.add_column(overflow="fold")
        for label, value in self._summary():
            summary.add_row(label, value)
        console.print(summary, markup=False, highlight=False)

    def _summary(self) -> list[tuple[str, str]]:
        """Label and value of each line below the timeline."""
        shape = self.architecture
        training = self.recipe.training
        lines = [
            (
                "model",
                f"{self.recipe.model}: {shape.n_layer} layers, width {shape.n_embd}, {self.parameters:,} parameters",
            ),
            ("tokens", f"{self.tokens:,}"),
            ("steps", f"{self.steps:,} of {training.tokens_per_step:,} tokens (context {self.recipe.data.context})"),
            ("micro-batch", f"{self.micro_batch} sequences"),
        ]
        if self.schedule is not None:
            length, start = self.schedule.recovery_steps, self.schedule.complete_at
            lines.append(("recovery", f"{length:,} steps with everything constant, from step {start:,}"))
        parts = ", ".join(f"{name} {_size(size)}" for name, size in asdict(self.memory).items() if size)
        lines.append(("memory", f"about {_size(self.memory.total)}: {parts}"))
        time = "measured when it runs" if self.seconds is None else f"about {_duration(self.seconds)}"
        lines.append(("time", f"{time} on {self.device}"))
        lines += [("", f"about {_duration(seconds)} on one {name}") for name, seconds in self.seconds_elsewhere.items()]
        lines += [("assumed", assumption) for assumption in self.assumptions]
        return lines


def plan(
    recipe: Recipe,
    architecture: ArchitectureSpec | None = None,
    *,
    device: str = "cpu",
    tokens_per_second: float | None = None,
    control: bool = False,
    processes: int = 1,
) -> Plan:
    """Work out what a run will be, without running any of it.

    Args:
        recipe: a removal or a pretraining recipe.
        architecture: of the model; None finds it: see `architecture_of`.
        device: "cpu", or a GPU's name such as "NVIDIA H100 80GB HBM3".
        tokens_per_second: a measured speed of all processes together, used in place of the estimate.
        control: a vanilla control of the same length is trained too.
        processes: GPUs that share each step.

    Raises:
        UserError: unknown model, a context longer than the model's, a schedule that does not fit the run, or sequences
            that do not divide among the processes.
    """
    shape = architecture or architecture_of(recipe)
    if recipe.data.context > shape.n_positions:
        raise UserError(
            f"data.context = {recipe.data.context} is longer than {recipe.model} can read; "
            f"lower it to {shape.n_positions} or less"
        )
    schedule = None
    if recipe.schedule is not None:
        schedule = expand(recipe.schedule, shape.n_layer, recipe.training.steps)
    peak = peak_of(device)
    micro_batch = _micro_batch(recipe, shape, peak, processes)
    memory = estimate_memory(recipe, shape, micro_batch)

    # A teacher's forward pass is a third of forward and backward; the control has none.
    passes = (4 / 3 if _has_teacher(recipe) else 1) + (1 if control else 0)
    work = recipe.tokens * flops_per_token(shape, recipe.data.context) * passes
    seconds = None
    assumptions = [_memory_assumption(recipe)]
    if peak is not None and memory.total > peak.memory:
        assumptions.append(f"this does not fit into the {_size(peak.memory)} of {device}")
    if tokens_per_second is not None:
        seconds = recipe.tokens * (2 if control else 1) / tokens_per_second
        assumptions.append(f"measured speed of {tokens_per_second:,.0f} tokens/s")
    elif peak is not None:
        seconds = work / (_rate(peak, recipe) * processes)
    elsewhere = {}
    if seconds is None:
        elsewhere = {name: work / _rate(DEVICE_PEAKS[name], recipe) for name in ("H100", "A100")}
    if tokens_per_second is None:
        assumptions.append(
            f"GPU time at {ASSUMED_UTILISATION:.0%} of the {recipe.training.precision} peak, without data preparation, "
            "evaluation and checkpoints"
        )
    if _has_teacher(recipe):
        assumptions.append("the original model runs beside the one in training, for a third more arithmetic")
    if control:
        assumptions.append("the time includes a control of the same length")
    return Plan(
        recipe=recipe,
        architecture=shape,
        schedule=schedule,
        device=device,
        micro_batch=micro_batch,
        parameters=count_parameters(shape),
        memory=memory,
        seconds=seconds,
        seconds_elsewhere=elsewhere,
        assumptions=tuple(assumptions),
    )


def architecture_of(recipe: Recipe) -> ArchitectureSpec:
    """The architecture of the recipe's model: its own [architecture], or that of the model it names.

    Raises:
        UserError: as `architecture_of_model`.
    """
    return recipe.architecture or architecture_of_model(recipe.model)


def architecture_of_model(name: str) -> ArchitectureSpec:
    """The architecture of a model: a published size, known without asking the Hub, or what config.json says.

    Raises:
        UserError: the model is neither a published size nor a readable GPT-2 (see `models.load_config`).
    """
    published = name
    for owner in _OWNERS:
        published = published.removeprefix(owner)
    # A local directory of that name comes first, as it does when the model is loaded.
    if published in KNOWN_ARCHITECTURES and not Path(name).is_dir():
        return KNOWN_ARCHITECTURES[published]
    from ln_removal.models import load_config, sizes_of

    config = load_config(name)
    if config.model_type not in REMOVABLE:
        raise UserError(
            f"{name} is a {config.model_type}; LayerNorm can be removed from a GPT-2 (model_type 'gpt2'), and this kind of model "
            "scored, observed and pretrained"
        )
    return ArchitectureSpec.model_validate(sizes_of(config))


def count_parameters(shape: ArchitectureSpec) -> int:
    """Parameters of a model of this architecture, a tied unembedding counted once.

    GPT-2 as published: V D + P D + L (12 D^2 + 13 D) + 2 D, P positions. Pythia has 2 V D and no P D. Without norms L 4 D
    and 2 D are missing, with the paper's biases 7 of the 9 D that a layer has.
    """
    width, layers = shape.n_embd, shape.n_layer
    embeddings = 2 * shape.vocab_size if shape.family == "pythia" else shape.vocab_size + shape.n_positions
    layer = 12 * width * width + (2 if shape.biases == "paper" else 9) * width
    layer += 4 * width if shape.block_norm == "layernorm" else 0
    count = embeddings * width + layers * layer + (2 * width if shape.final_norm == "layernorm" else 0)
    if shape.activation == "learnable_leaky_relu":
        count += layers if shape.slopes == "layer" else 1
    return count


def flops_per_token(shape: ArchitectureSpec, context: int) -> int:
    """Training FLOPs of one token: 6 N + 12 L D T (Chowdhery et al. 2022, arXiv 2204.02311, appendix B)."""
    return 6 * count_parameters(shape) + 12 * shape.n_layer * shape.n_embd * context


def estimate_memory(recipe: Recipe, shape: ArchitectureSpec, micro_batch: int) -> Memory:
    """Bytes at the peak of a training step with `micro_batch` sequences a pass (formula: see the module's text)."""
    count = count_parameters(shape)
    training = recipe.training
    matrices = 12 * shape.n_layer * shape.n_embd**2
    # AdamW keeps two moments of every parameter, Muon one of the matrices inside the blocks.
    moments = 2 * count - (matrices if training.optimizer == "muon" else 0)
    tokens = micro_batch * recipe.data.context
    kept = ACTIVATION_BYTES["float32" if training.precision == "float32" else "bfloat16", training.compile is not False]
    activations = tokens * (shape.n_layer * kept + 12) * shape.n_embd
    # bfloat16 logits, their float32 copy and its gradient, for one chunk at a time.
    logits = 10 * min(tokens, POSITIONS_IN_A_CHUNK) * shape.vocab_size
    activations += logits
    if training.entropy_weight > 0:  # scores, probabilities and their gradients, (B, H, T, T) in float32
        activations += tokens * shape.n_layer * shape.n_head * recipe.data.context * 15
    teacher = 0
    if _has_teacher(recipe):
        teacher = (4 if training.precision == "float32" else 2) * count
        activations += logits
    if training.precision != "float32":
        activations += 2 * matrices  # autocast's copies of the weights
    return Memory(
        parameters=4 * count, gradients=4 * count, optimizer=4 * moments, activations=activations, teacher=teacher
    )


def _has_teacher(recipe: Recipe) -> bool:
    return recipe.schedule is not None and recipe.training.distillation > 0


def peak_of(device: str) -> DevicePeak | None:
    """The peak of a GPU by its name; None for a CPU and for GPUs that the table does not know."""
    return next((peak for name, peak in DEVICE_PEAKS.items() if name.lower() in device.lower()), None)


def _micro_batch(recipe: Recipe, shape: ArchitectureSpec, peak: DevicePeak | None, processes: int) -> int:
    """What the recipe says, or for "auto" the largest divisor of a process's share that should do."""
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


def _rate(peak: DevicePeak, recipe: Recipe) -> float:
    """FLOP/s that a run is assumed to reach on one GPU."""
    return ASSUMED_UTILISATION * (peak.float32 if recipe.training.precision == "float32" else peak.bfloat16)


def _memory_assumption(recipe: Recipe) -> str:
    compiled = "not compiled" if recipe.training.compile is False else "compiled"
    return f"memory for a {compiled} model in {recipe.training.precision}, float32 weights and moments; estimate"


def _size(count: float) -> str:
    """Bytes in a unit that keeps the number readable (powers of 1,000)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _duration(seconds: float) -> str:
    """Seconds as the largest two units that matter."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
