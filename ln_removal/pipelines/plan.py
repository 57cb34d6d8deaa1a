"""The dry run: find and resolve the recipe that a command names, and estimate what a run or a sweep of it takes.

Nothing is trained, and no weights are read. cpu_time.py adds the measured time of a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from ln_removal.config.estimate import (
    ASSUMED_UTILISATION,
    DEVICE_PEAKS,
    Memory,
    assumed_rate,
    count_parameters,
    estimate_memory,
    flops_per_token,
    has_teacher,
    memory_assumption,
    micro_batch_of,
    peak_of,
    published_architecture,
    readable_duration,
)
from ln_removal.config.presets import check_is_removal, default_recipe, with_steps
from ln_removal.config.recipe import ArchitectureSpec, Recipe, dump_toml, load_recipe, with_overrides
from ln_removal.config.sweep import Sweep
from ln_removal.errors import UserError
from ln_removal.files.atomic import readable
from ln_removal.models.families import SIZES, Family, is_norm_free, known_families, known_family
from ln_removal.models.loading import load_config, trainable_positions
from ln_removal.norms.schedule import RemovalSchedule, expand

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Plan:
    """The plan of one run.

    Attributes:
        recipe: resolved, with defaults and overrides.
        architecture: of the model that the recipe names.
        schedule: None for pretraining.
        device: "cpu", or a GPU's name.
        micro_batch: sequences of one forward pass; if the recipe says "auto", the number that training would choose.
        parameters: of the model, with a tied unembedding counted once.
        memory: an estimate for one device.
        seconds: an estimate for the whole run, with its control if there is one; None if it cannot be estimated.
        seconds_elsewhere: the same on one GPU of other kinds, by name.
        assumptions: what the estimates assume, in sentences.
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

        def plain(text: str) -> None:
            console.print(Text(text), soft_wrap=True)

        console.print(Rule(Text(f"recipe {self.recipe.name}")))
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
            summary.add_row(label, Text(value))
        console.print(summary)

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
        parts = ", ".join(f"{name} {readable(size)}" for name, size in asdict(self.memory).items() if size)
        lines.append(("memory", f"about {readable(self.memory.total)}: {parts}"))
        time = "measured when it runs" if self.seconds is None else f"about {readable_duration(self.seconds)}"
        lines.append(("time", f"{time} on {self.device}"))
        lines += [
            ("", f"about {readable_duration(seconds)} on one {name}")
            for name, seconds in self.seconds_elsewhere.items()
        ]
        lines += [("assumed", assumption) for assumption in self.assumptions]
        return lines


def plan(
    recipe: Recipe,
    architecture: ArchitectureSpec | None = None,
    *,
    device: str = "cpu",
    tokens_per_second: float | None = None,
    note: str = "",
    control: bool = False,
    processes: int = 1,
) -> Plan:
    """Plan a run and estimate its memory and time, without running any of it.

    Args:
        recipe: a removal or a pretraining recipe.
        architecture: of the model; None finds it: see `architecture_of`.
        device: "cpu", or a GPU's name such as "NVIDIA H100 80GB HBM3".
        tokens_per_second: a measured speed of all processes together, used in place of the estimate. It is that of the removal:
            a control without a teacher is faster in proportion.
        note: how that was measured, or why not, in a sentence.
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
    micro_batch = micro_batch_of(recipe, shape, peak, processes)
    memory = estimate_memory(recipe, shape, micro_batch)
    work = run_flops(recipe, shape, control=control)
    seconds = None
    if tokens_per_second is not None:
        seconds = recipe.tokens / tokens_per_second * work / run_flops(recipe, shape, control=False)
    elif peak is not None:
        seconds = work / (assumed_rate(peak, recipe) * processes)
    elsewhere = {} if peak is not None else {name: DEVICE_PEAKS[name] for name in ("H100", "A100")}
    return Plan(
        recipe=recipe,
        architecture=shape,
        schedule=schedule,
        device=device,
        micro_batch=micro_batch,
        parameters=count_parameters(shape),
        memory=memory,
        seconds=seconds,
        seconds_elsewhere={name: work / assumed_rate(other, recipe) for name, other in elsewhere.items()},
        assumptions=_assumptions(
            recipe, memory, device, note, gpu=tokens_per_second is None or bool(elsewhere), control=control
        ),
    )


def run_flops(recipe: Recipe, shape: ArchitectureSpec, *, control: bool) -> float:
    """FLOPs of the whole run. A teacher's forward pass adds a third to forward and backward; the control has no teacher."""
    passes = (4 / 3 if has_teacher(recipe) else 1) + (1 if control else 0)
    return recipe.tokens * flops_per_token(shape, recipe.data.context) * passes


def _assumptions(
    recipe: Recipe, memory: Memory, device: str, note: str, *, gpu: bool, control: bool
) -> tuple[str, ...]:
    """What the estimates of a plan assume, in sentences; `gpu` if one of them is a GPU's."""
    peak = peak_of(device)
    found = [memory_assumption(recipe)]
    if peak is not None and memory.total > peak.memory:
        found.append(f"this does not fit into the {readable(peak.memory)} of {device}")
    if note:
        found.append(note)
    if gpu:
        found.append(
            f"GPU time at {ASSUMED_UTILISATION:.0%} of the {recipe.training.precision} peak, without data preparation, "
            "evaluation and checkpoints"
        )
    if has_teacher(recipe):
        found.append("the original model runs beside the one in training, for a third more arithmetic")
    if control:
        found.append("the time includes a control of the same length")
    return tuple(found)


def architecture_of(recipe: Recipe) -> ArchitectureSpec:
    """The architecture of the recipe's model: its own [architecture], or that of the model it names.

    Raises:
        UserError: as `architecture_of_model`.
    """
    return recipe.architecture or architecture_of_model(recipe.model)


def architecture_of_model(name: str | Path) -> ArchitectureSpec:
    """The architecture of a model: that of a published size, which needs no Hub, or that of its config.json.

    Raises:
        UserError: the model is neither a published size nor a readable model of a known family (see `loading.load_config`).
    """
    published = published_architecture(str(name))
    # A local directory of that name comes first, as it does when the model is loaded.
    if published is not None and not Path(name).is_dir():
        return published
    config = load_config(name)
    family = known_family(config)
    # An LN-free model is refused later, with a message that says so.
    if family is None or not (config.model_type == family.model_type or is_norm_free(config)):
        raise UserError(
            f"{name} is a {config.model_type}; this kind of model can only be scored: norms can be removed from a {known_families()}, "
            "so name one"
        )
    return _spec_of(config, family)


def _spec_of(config: PretrainedConfig, family: Family) -> ArchitectureSpec:
    """The sizes of a model by its configuration. What is the family's own is left out."""
    sizes = {ours: getattr(config, theirs) for ours, theirs in SIZES.items()}
    sizes |= {"family": family.architecture, "n_positions": trainable_positions(config)}
    own = ArchitectureSpec.model_validate(sizes)
    chosen = {
        "n_kv_head": (getattr(config, "num_key_value_heads", None), own.n_head),
        "n_inner": (getattr(config, family.inner), own.width_of_mlp),
        "head_width": (getattr(config, "head_dim", None), own.width_of_head),
        "tied": (config.tie_word_embeddings, own.is_tied),
        "attention_bias": (getattr(config, "attention_bias", None), own.parts.attention_biases == "all"),
        "mlp_bias": (getattr(config, "mlp_bias", None), own.parts.mlp_biases),
    }
    return own.model_copy(update={key: found for key, (found, usual) in chosen.items() if found not in (None, usual)})


def resolve_recipe(
    *,
    model: str | Path | None = None,
    recipe: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
    steps: int | None = None,
    place: str | None = None,
) -> Recipe:
    """The removal recipe for what a user names: a model, a recipe, or both.

    Args:
        model: "tiny", a published size, a directory or a Hub id; replaces the recipe's model.
        recipe: a built-in recipe or a TOML file; default: the one of the model (see `default_recipe`).
        overrides: dotted keys, applied literally.
        steps: length of the run, schedule included (see `with_steps`), applied last.
        place: where the model is, as `load_model` takes it, if that is known already. Default: what `model` means here.

    Raises:
        UserError: neither is named, there is no such model or recipe, it is a pretraining recipe, or the result has
            faults.
    """
    if model is None and recipe is None:
        raise UserError(
            "neither a model nor a recipe was named; say what to remove LayerNorm from: --model tiny, --model gpt2, "
            "--model DIRECTORY or --recipe NAME"
        )
    if recipe is not None:
        found = load_recipe(recipe, {**(overrides or {}), **({} if model is None else {"model": model})})
    else:
        assert model is not None
        found = with_overrides(default_recipe(model, architecture_of_model(place or model)), overrides or {})
    check_is_removal(found)
    return found if steps is None else with_steps(found, steps)


@dataclass(frozen=True)
class SweepPlan:
    """The plan of a sweep: that of one run of each arm, in the order of the file."""

    sweep: Sweep
    plans: tuple[Plan, ...]

    @property
    def tokens(self) -> int:
        """Training tokens of all runs."""
        return self.sweep.tokens * len(self.sweep.order())

    @property
    def seconds(self) -> float | None:
        """An estimate for all runs; None if it cannot be estimated."""
        found = [each.seconds for each in self.plans if each.seconds is not None]
        return sum(found) * len(self.sweep.seeds) if len(found) == len(self.plans) else None

    @property
    def seconds_elsewhere(self) -> dict[str, float]:
        """The same on one GPU of other kinds, by name."""
        names = self.plans[0].seconds_elsewhere
        return {
            name: sum(each.seconds_elsewhere[name] for each in self.plans) * len(self.sweep.seeds) for name in names
        }

    def to_json(self) -> dict[str, object]:
        """A dictionary of plain values: what `--grid FILE --dry-run --json` prints."""
        arms = [
            {
                "name": arm.name,
                "recipe": arm.recipe.model_dump(mode="json", exclude={"name", "seed"}),
                "parameters": each.parameters,
                "tokens": each.tokens,
                "steps": each.steps,
                "micro_batch": each.micro_batch,
                "memory_bytes": each.memory.total,
                "seconds": each.seconds,
                "directories": [self.sweep.directory_name(arm, seed) for seed in self.sweep.seeds],
            }
            for arm, each in zip(self.sweep.arms, self.plans, strict=True)
        ]
        return {
            "name": self.sweep.name,
            "baseline": self.sweep.baseline,
            "seeds": list(self.sweep.seeds),
            "arms": arms,
            "runs": len(self.sweep.order()),
            "tokens": self.tokens,
            "device": self.plans[0].device,
            "seconds": self.seconds,
            "seconds_elsewhere": self.seconds_elsewhere,
        }

    def render(self, console: Console) -> None:
        """Print the arms as a table, and the total."""
        sweep = self.sweep
        if sweep.description:
            console.print(Text(sweep.description))
        title = f"grid {sweep.name}: {len(sweep.arms)} arms, {_count(len(sweep.seeds), 'seed')}"
        table = Table(title=Text(title), title_justify="left")
        table.add_column("arm")
        for name in ("parameters", "tokens", "steps", "context", "memory", "time of a run"):
            table.add_column(name, justify="right")
        table.add_column("directories")
        for arm, each in zip(sweep.arms, self.plans, strict=True):
            mark = " (baseline)" if arm.name == sweep.baseline else ""
            table.add_row(
                Text(arm.name + mark),
                f"{each.parameters:,}",
                f"{each.tokens:,}",
                f"{each.steps:,}",
                f"{arm.recipe.data.context:,}",
                f"{each.memory.total / 1e9:.1f} GB",
                "measured" if each.seconds is None else readable_duration(each.seconds),
                Text(f"{arm.slug}-seed{','.join(map(str, sweep.seeds))}"),
            )
        console.print(table)
        time = "measured when it runs" if self.seconds is None else f"about {readable_duration(self.seconds)}"
        total = f"all {_count(len(sweep.order()), 'run')}: {self.tokens:,} tokens, {time} on {self.plans[0].device}"
        elsewhere = [
            f"about {readable_duration(seconds)} on one {name}" for name, seconds in self.seconds_elsewhere.items()
        ]
        for line in (total, *elsewhere):
            console.print(Text(line), soft_wrap=True)


def plan_sweep(sweep: Sweep, *, device: str = "cpu") -> SweepPlan:
    """Plan one run of each arm; `device` as for `plan`.

    Raises:
        UserError: as `plan`.
    """
    return SweepPlan(sweep, tuple(plan(arm.recipe, device=device) for arm in sweep.arms))


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")
