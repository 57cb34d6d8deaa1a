"""The schema of recipes/*.toml: loading, overrides, every fault reported at once, and writing the resolved recipe.

A recipe says everything that determines a run. A removal recipe has a [schedule]; a pretraining recipe has an
[architecture] in its place.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ln_removal.config.family_parts import FAMILY_PARTS, LADDER_CHOICES, FamilyParts, with_family_defaults
from ln_removal.config.validation import all_faults, cross_field_faults, did_you_mean, follow, without_removed_keys
from ln_removal.errors import UserError
from ln_removal.files.resources import recipes_directory

WindowKind = Literal["stream", "document"]
"""What training and evaluation read: windows of all documents one after the other, or documents from their start, each by itself.

The kind with which the model was trained before is the right one.
"""


Place = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
"""A name or a path. From Python it may be given as a pathlib.Path."""


class _Spec(BaseModel):
    # strict: a recipe that says "20" or true where a number belongs holds a mistake, not a number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataSpec(_Spec):
    """What the model reads. `context` is T, the tokens of one sequence; the limits cap what is prepared."""

    corpus: Annotated[Place, Field(min_length=1)]
    tokenizer: Place = ""  # empty: the model's own
    context: PositiveInt = 1024
    windows: WindowKind = "stream"
    max_bytes: PositiveInt | None = None
    max_tokens: PositiveInt | None = None
    validation_tokens: PositiveInt | None = None
    validation_share: Annotated[float, Field(gt=0, le=1)] | None = None  # of the documents; None: the corpus's own
    weights: dict[str, PositiveInt] = Field(default_factory=dict)  # how often a source is repeated
    bos_rows: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of sequences (or documents) that begin with end-of-text
    copies: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # share of sequences that repeat text or random tokens
    odd_text: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # share of sequences of tabs, random tokens and the like


class ScheduleSpec(_Spec):
    """When each site freezes; every number counts optimizer steps, and the first step is 0.

    The four kinds go one after the other: each kind begins where the last gap of the one before ends (start +
    n_layer * gap), unless its own start is given. `eot_after` counts from ln_f, `first_after` from the drop of the
    end-of-text constant. `taper` is the number of intermediate steps between LayerNorm and constant (0: at once);
    `special_taper` the same for the constants of the special positions. With a `cap` no norm gives more than that many
    times its usual size, until cap_after steps after everything is constant; then the caps are lifted within cap_taper steps. An
    `embedding_cap` bounds the rows of the embedding to that many times the first constant (see norms/embedding.py). With
    `on_spike` = "wait" nothing new begins while the loss spikes (see training/divergence.py).
    """

    ln_2_start: NonNegativeInt
    ln_2_gap: NonNegativeInt
    qk_gap: NonNegativeInt
    v_gap: NonNegativeInt
    qk_start: NonNegativeInt | None = None
    v_start: NonNegativeInt | None = None
    ln_f_at: NonNegativeInt | None = None
    eot_after: NonNegativeInt
    first_after: NonNegativeInt
    taper: NonNegativeInt = 0
    special_taper: NonNegativeInt = 0
    cap: Annotated[float, Field(gt=1)] | None = None
    cap_after: NonNegativeInt = 0
    cap_taper: NonNegativeInt = 0
    embedding_cap: Annotated[float, Field(gt=1)] | None = None
    on_spike: Literal["wait", "ignore"] = "wait"
    keep: list[Literal["qk-norms"]] = []  # norms that stay, which Qwen3 requires


class TrainingSpec(_Spec):
    """The optimisation: lengths in steps, batch in tokens, learning rates as given to the optimizer."""

    steps: PositiveInt
    tokens_per_step: PositiveInt
    micro_batch: PositiveInt | Literal["auto"] = "auto"  # sequences a forward pass
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: PositiveFloat
    minimum_learning_rate: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 0
    decay: Literal["cosine", "linear", "trapezoid"] = "cosine"
    decay_steps: PositiveInt | None = None  # the step at which the decay ends; None: the last one
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2  # trapezoid only: the share of the run that decays
    weight_decay: NonNegativeFloat = 0.01
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    lora_rank: PositiveInt | None = None  # of the changes of the matrices, see training/low_rank.py; None: all of them
    std_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    std_statistic: Literal["mean", "median"] = "mean"  # of a batch's stds, whose running mean becomes the constant
    auxiliary_weight: NonNegativeFloat = 0.0  # of the residual-std loss, see loss.Auxiliary
    auxiliary_target: Literal["batch", "constants"] = "batch"
    auxiliary_sites: Literal["ln_f", "all"] = "ln_f"
    auxiliary_early: PositiveFloat = (
        1.0  # factor on the pulls in front of the first fifth of the norms, see loss.Auxiliary
    )
    outlier_weight: NonNegativeFloat = 0.0  # of the pull on outlying positions, see loss.outlier_loss
    outlier_ratio: Annotated[float, Field(gt=1)] = 1.5  # to the constant, beyond which a position is outlying
    distillation: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the loss that is KL from the original model
    distillation_lag: PositiveFloat = 0.3  # nats per token behind the teacher in a sequence for the whole share
    distillation_end: Annotated[float, Field(ge=0, le=1)] | None = None  # that share in the last step; None: the same
    entropy_weight: NonNegativeFloat = 0.0  # of the attention entropy penalty, see attention.EntropyRegulariser
    entropy_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.2  # gamma: what it lets pass, as a share of log T
    spectral_cap: PositiveFloat | None = None  # of the matrices in the blocks, see optimizers.SpectralCap; None: none
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    compile: bool | Literal["auto"] = "auto"
    evaluate_every: PositiveInt = 50
    evaluation_tokens: PositiveInt = 1_048_576
    checkpoint_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2


NormChoice = Literal["layernorm", "rmsnorm", "none", "dyt", "derf"]
"""A norm, none, or a function in its place that looks at no statistic of the token."""


class ArchitectureSpec(_Spec):
    """The model to pretrain from scratch, or the sizes of a model: a GPT-2, a Pythia (GPT-NeoX), a Llama, a Qwen2 or 3.

    With nothing chosen it is the family's published architecture (see `FAMILY_PARTS`). `block_norm` is in front of attention and
    MLP, `final_norm` in front of the unembedding. `biases` "paper" leaves those of queries and keys only (and of norms).
    `negative_slope` is that of a leaky ReLU, or where a learnable one begins; `slopes` says whether each layer learns its own.
    `residual_gain`, `initialisation`, `qk_norm` and `attention_scale` are means to train without norms; see models/chosen_parts.py.
    """

    family: Literal["gpt2", "pythia", "llama", "qwen2", "qwen3"] = "gpt2"
    n_layer: PositiveInt
    n_head: PositiveInt
    n_embd: PositiveInt
    n_positions: PositiveInt
    vocab_size: PositiveInt
    n_kv_head: PositiveInt | None = None  # heads of keys and values; None: n_head
    n_inner: PositiveInt | None = None  # width of the MLP; None: 4 n_embd, of a gated one 8/3 n_embd
    head_width: PositiveInt | None = None  # None: n_embd / n_head
    tied: bool | None = None  # whether the unembedding is the embedding; None: as the family
    attention_bias: bool | None = None  # for all maps of attention; None: as the family
    mlp_bias: bool | None = None
    block_norm: NormChoice = "layernorm"
    final_norm: NormChoice = "layernorm"
    biases: Literal["all", "paper"] = "all"
    activation: Literal["gelu", "silu", "relu", "leaky_relu", "learnable_leaky_relu"] = "gelu"
    negative_slope: float = 0.01
    slopes: Literal["layer", "network"] = "layer"
    residual_gain: Literal["none", "fixed", "learned"] = "none"
    initialisation: Literal["gpt2", "unit"] = "gpt2"
    qk_norm: bool = False
    attention_scale: Literal["1/sqrt(k)", "1/k"] = "1/sqrt(k)"  # k: the width of a head

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return with_family_defaults(data)

    @property
    def parts(self) -> FamilyParts:
        """What the family is made of."""
        return FAMILY_PARTS[self.family]

    @property
    def is_plain(self) -> bool:
        """Whether transformers' own class can be it: all norms, all biases, and an activation without a slope."""
        norm = self.parts.norm
        chosen = (self.block_norm, self.final_norm, self.biases) != (norm, norm, "all")
        chosen |= any(getattr(self, key) != own for key, own in LADDER_CHOICES.items())
        return not chosen and self.activation in (self.parts.activation, "relu")

    @property
    def is_tied(self) -> bool:
        """Whether the unembedding is the embedding."""
        return self.parts.tied if self.tied is None else self.tied

    @property
    def width_of_head(self) -> int:
        """K, the width of one head."""
        return self.head_width or self.n_embd // self.n_head

    @property
    def width_of_mlp(self) -> int:
        """Width inside the MLP: by default 4 n_embd, and of a gated one 8/3 n_embd, rounded up to a multiple of 32."""
        return self.n_inner or (-(-8 * self.n_embd // 96) * 32 if self.parts.gated else 4 * self.n_embd)


class ObservationSpec(_Spec):
    """Looking at attention, residual stream, gradients and slopes while training; see training/probe.py."""

    every: PositiveInt  # steps between two observations; the first and the last step are always observed
    sequences: PositiveInt = 8  # of held-out text that are read each time


class ExportSpec(_Spec):
    """The forms and the precision in which the model is written; a pretrained model has only its own form."""

    formats: Annotated[list[Literal["normfree", "stock"]], Field(min_length=1)] = ["normfree", "stock"]
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Freezing(TypedDict):
    """What a recipe says of the freezable norms: arguments of `norms.surgery.install`."""

    median: bool
    cap: float | None
    embedding_cap: float | None
    keep: Sequence[str]


class Recipe(_Spec):
    """One run. `model` is "tiny" (the embedded model), a local directory or a Hugging Face Hub id."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    model: Annotated[Place, Field(min_length=1)]
    seed: NonNegativeInt = 0
    data: DataSpec
    schedule: ScheduleSpec | None = None
    training: TrainingSpec
    architecture: ArchitectureSpec | None = None
    observation: ObservationSpec | None = None
    export: ExportSpec = Field(default_factory=ExportSpec)

    @model_validator(mode="after")
    def _check_across_fields(self) -> Recipe:
        faults = cross_field_faults(lambda key: follow(self, key))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def tokens(self) -> int:
        """Tokens that the whole run trains on."""
        return self.training.steps * self.training.tokens_per_step

    @property
    def freezing(self) -> Freezing:
        """How a removal installs its norms."""
        assert self.schedule is not None, self.name
        return {
            "median": self.training.std_statistic == "median",
            "cap": self.schedule.cap,
            "embedding_cap": self.schedule.embedding_cap,
            "keep": self.schedule.keep,
        }


def available_recipes() -> list[str]:
    """Names of the built-in recipes, sorted, those in a sub-folder as FOLDER/NAME. Grids are not among them."""
    found = recipes_directory().rglob("*.toml")
    return sorted(
        path.relative_to(recipes_directory()).with_suffix("").as_posix() for path in found if not _is_grid(path)
    )


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, object] | None = None) -> Recipe:
    """Load a built-in recipe by name, or a TOML file by path, and apply dotted-key overrides.

    Args:
        name_or_path: "gpt2", or a path such as "my/recipe.toml".
        overrides: for example {"training.steps": 20, "data.corpus": "openwebtext"}. They replace values literally; to
            shorten a run together with its schedule use `presets.with_steps`.

    Raises:
        UserError: no such recipe, not TOML, or faults in it: all of them at once, one a line.
    """
    path = _find(str(name_or_path))
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}; give a readable TOML file") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, UnicodeDecodeError, brackets by the thousand
        raise UserError(f"the recipe {path} is not TOML: {error}; correct that line") from error
    if "arms" in document:
        raise UserError(f"{path} is a grid, not a recipe; train it with ln-pretrain --grid {name_or_path}")
    document.setdefault("name", path.stem)
    for key, value in (overrides or {}).items():
        _override(document, key, value)
    return validate_recipe(document, source=str(path))


def validate_recipe(document: Mapping[str, Any], *, source: str) -> Recipe:
    """Build a Recipe from a nested dictionary; `source` names it in messages.

    It may be of an older version and have removed keys, as long as they were off.

    Raises:
        UserError: one line for each fault (unknown keys, wrong types, fields that contradict one another).
    """
    document = without_removed_keys(document)
    if "architecture" in document:  # now, so that its faults are found in what it means
        document["architecture"] = with_family_defaults(document["architecture"])
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        faults = all_faults(error.errors(include_url=False), document, Recipe)
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    raise UserError(f"the recipe {source} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults))


def with_defaults(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's nested dictionary with every default written out and without removed keys that were off.

    It may lack a name, as the arms of a sweep do. One with faults comes back without its defaults.
    """
    document = without_removed_keys(document)
    try:
        return Recipe.model_validate({"name": "unnamed", **document}).model_dump(exclude_none=True)
    except ValidationError:
        return document


def dump_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML, defaults written out; loading it gives an equal Recipe. What is None is left out."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))


def with_overrides(recipe: Recipe, overrides: Mapping[str, object]) -> Recipe:
    """A recipe with dotted-key overrides applied, as `load_recipe` applies them.

    Raises:
        UserError: the changed recipe has faults.
    """
    document = recipe.model_dump(exclude_none=True)
    for key, value in overrides.items():
        _override(document, key, value)
    return validate_recipe(document, source=recipe.name)


def parse_overrides(assignments: Iterable[str]) -> dict[str, object]:
    """Turn command-line assignments such as "training.steps=20" into overrides; values are TOML, or else plain text.

    Raises:
        UserError: an assignment without "=" or without a key.
    """
    overrides: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        key, text = key.strip(), text.strip()
        if not (equals and key):
            raise UserError(f"cannot read the setting {assignment!r}; write KEY=VALUE, for example training.steps=20")
        try:
            overrides[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key] = text
    return overrides


def _find(name_or_path: str) -> Path:
    """The given path, or the file of a built-in recipe."""
    path = Path(name_or_path)
    if path.suffix == ".toml" and path.exists():
        return path
    built_in = recipes_directory() / f"{name_or_path}.toml"
    if not path.is_absolute() and ".." not in path.parts and built_in.is_file():
        return built_in
    looks_like_a_path = path.suffix == ".toml" or path.name != name_or_path
    if looks_like_a_path and not path.exists():
        raise UserError(f"there is no recipe file {path}; give a path that exists or one of: {_names()}")
    if looks_like_a_path:
        return path
    hint = did_you_mean(name_or_path, available_recipes())
    raise UserError(f"there is no recipe named {name_or_path!r}{hint}; built in are: {_names()}")


def _is_grid(path: Path) -> bool:
    """Whether a file names arms: what `ln-pretrain --grid` takes, and no recipe."""
    return "arms" in tomllib.loads(path.read_text(encoding="utf-8"))


def _names() -> str:
    return ", ".join(available_recipes())


def _override(document: dict[str, Any], dotted: str, value: object) -> None:
    """Set document["a"]["b"] for "a.b", making tables on the way."""
    *parents, last = dotted.split(".")
    table = document
    for parent in parents:
        below = table.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UserError(f"cannot set {dotted}: {parent} is a value, not a table; check the key's spelling")
        table = below
    table[last] = value
