"""The schema of a sweep's file, which `ln-pretrain --grid` takes.

A sweep has several arms. Each arm is a base recipe with some changes, and is trained with the same seeds on the same tokens.

    name = "table"
    base = "small-python"        # a recipe: a file beside the grid file, with or without .toml, or a built-in's name
    seeds = [0, 1]
    baseline = "LN + GELU"       # the arm that changes are counted against

    [[arms]]
    name = "LN + GELU"
    set = { "architecture.activation" = "gelu" }

An arm's settings replace values of the base literally. All arms are resolved and checked before anything is trained, and all
faults of all arms are reported at once.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from pydantic_core import ErrorDetails

from ln_removal.config.presets import with_steps
from ln_removal.config.recipe import Recipe, available_recipes, load_recipe
from ln_removal.config.validation import did_you_mean
from ln_removal.errors import UserError
from ln_removal.files.resources import recipes_directory

SET_BY_THE_SWEEP = ("name", "seed")
"""Keys of a recipe that an arm may not set, because the sweep gives each run its name and its seed."""


class _Spec(BaseModel):
    # strict for the same reason as a recipe, see config/recipe.py
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ArmSpec(_Spec):
    """One arm as written. `set` has dotted keys of a recipe, or tables with the keys of a section."""

    name: Annotated[str, Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)

    def overrides(self) -> dict[str, object]:
        """The settings with dotted keys: {"training": {"clip": 0.5}} is {"training.clip": 0.5}."""
        found: dict[str, object] = {}
        for key, value in self.set.items():
            if isinstance(value, Mapping) and value and "." not in key:
                found |= {f"{key}.{inner}": setting for inner, setting in value.items()}
            else:
                found[key] = value
        return found


class SweepSpec(_Spec):
    """The file of a sweep as written."""

    name: Annotated[str, Field(min_length=1)]
    description: str = ""
    base: Annotated[str, Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    baseline: Annotated[str, Field(min_length=1)]
    arms: Annotated[list[ArmSpec], Field(min_length=1)]


@dataclass(frozen=True)
class Arm:
    """An arm: its name, the beginning of its directories' names, and its recipe, in which the seed is still to be set."""

    name: str
    slug: str
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A resolved sweep: every arm is a valid recipe, and all of them train on equally many tokens of the same text."""

    name: str
    description: str
    seeds: tuple[int, ...]
    baseline: str
    arms: tuple[Arm, ...]

    def recipe_of(self, arm: Arm, seed: int) -> Recipe:
        """The recipe of one run: that of the arm, with this seed, named after the run's directory."""
        return arm.recipe.model_copy(update={"seed": seed, "name": self.directory_name(arm, seed)})

    def directory_name(self, arm: Arm, seed: int) -> str:
        """The name of a run's directory inside the sweep's, such as "ln-gelu-seed0"."""
        return f"{arm.slug}-seed{seed}"

    def order(self) -> list[tuple[Arm, int]]:
        """The runs in training order, seed by seed, so that an unfinished sweep has all arms for its first seeds."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]

    @property
    def tokens(self) -> int:
        """Training tokens of one run; the same for all."""
        return self.arms[0].recipe.tokens


def available_sweeps() -> list[str]:
    """Names of the built-in sweeps, sorted."""
    directory = recipes_directory()
    names = {path.relative_to(directory).with_suffix("").as_posix() for path in directory.rglob("*.toml")}
    return sorted(names - {*available_recipes()})


def load_sweep(
    name_or_path: str | Path, *, overrides: Mapping[str, object] | None = None, steps: int | None = None
) -> Sweep:
    """Load a sweep's file, or a built-in one such as "normfree/table", with the recipes of all its arms.

    Args:
        name_or_path: a path, or a built-in name.
        overrides: dotted keys that replace values in every arm, after its own settings.
        steps: shortens or lengthens every arm with its warm-up, applied last.

    Raises:
        UserError: no such file, not TOML, or faults in it or in any arm: all of them at once, one a line.
    """
    path = _find(str(name_or_path))
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the grid {path}: {error.strerror}; give a readable TOML file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"the grid {path} is not TOML: {error}; correct that line") from error
    if "arms" not in document and "training" in document:
        raise UserError(f"{path} is a recipe, not a grid: it has no [[arms]]; train it with --recipe")
    document.setdefault("name", path.stem)
    try:
        spec = SweepSpec.model_validate(document)
    except ValidationError as error:
        raise _refused(path, _schema_faults(error.errors(include_url=False), document)) from None
    changed = dict(overrides or {})
    faults = _naming_faults(spec) + _reserved_faults("--set", changed)
    arms, arm_faults = _resolve(spec, _base(spec.base, path.parent), changed, steps)
    faults += arm_faults or _comparison_faults(arms, spec.baseline)
    if faults:
        raise _refused(path, faults)
    return Sweep(spec.name, spec.description, tuple(spec.seeds), spec.baseline, tuple(arms))


def slug_of(name: str) -> str:
    """An arm's name as a file name: its letters and digits in lower case, joined by dashes."""
    return "-".join(re.findall(r"[a-z0-9](?:[a-z0-9.]*[a-z0-9])?", name.lower()))


def dump_sweep(grid: Sweep) -> str:
    """The resolved grid as TOML: what is kept in its directory, to find out at --resume whether it is the same one."""
    arms = {arm.name: arm.recipe.model_dump(exclude={*SET_BY_THE_SWEEP}, exclude_none=True) for arm in grid.arms}
    return tomli_w.dumps({"name": grid.name, "seeds": grid.seeds, "baseline": grid.baseline, "arms": arms})


def _find(name_or_path: str) -> Path:
    """The given path, or the file of a built-in sweep."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    built_in = recipes_directory() / f"{name_or_path}.toml"
    if not name_or_path.endswith(".toml") and built_in.is_file():
        return built_in
    names = available_sweeps()
    hint = did_you_mean(name_or_path, names)
    raise UserError(
        f"there is no grid {name_or_path}{hint}; give the path of a grid file, or one of: {', '.join(names)}"
    )


def _base(name: str, directory: Path) -> str:
    """The base recipe as `load_recipe` takes it: the path of a file beside the sweep's, else the name as it is."""
    for candidate in (directory / name, directory / f"{name}.toml"):
        if candidate.suffix == ".toml" and candidate.is_file():
            return str(candidate)
    return name


def _resolve(
    spec: SweepSpec, base: str, overrides: Mapping[str, object], steps: int | None
) -> tuple[list[Arm], list[str]]:
    """The arms whose recipes are valid, and the faults of the base and of the other arms."""
    found, base_faults = _load(base, overrides, steps)
    faults = [f"base {spec.base}: {fault}" for fault in base_faults]
    if found is not None and found.architecture is None:
        return [], [f"base {spec.base}: has no [architecture]; name a pretraining recipe"]
    arms: list[Arm] = []
    for arm in spec.arms:
        settings = arm.overrides()
        recipe, own = _load(base, {**settings, **overrides}, steps)
        own = _reserved_faults("set", settings) + [fault for fault in own if fault not in base_faults]
        faults += [f"arm {arm.name!r}: {fault}" for fault in own]
        if recipe is not None:
            arms.append(Arm(arm.name, slug_of(arm.name), recipe))
    return arms, faults


def _load(base: str, overrides: Mapping[str, object], steps: int | None) -> tuple[Recipe | None, list[str]]:
    """The recipe and no faults, or None and its faults."""
    try:
        recipe = load_recipe(base, overrides)
        return recipe if steps is None else with_steps(recipe, steps), []
    except UserError as error:
        first, *more = str(error).splitlines()
        return None, [fault.strip() for fault in more or [first]]


def _naming_faults(spec: SweepSpec) -> list[str]:
    """Faults of names and seeds: one that is there twice, or a baseline that is none of the arms."""
    faults = []
    names = [arm.name for arm in spec.arms]
    for name in _repeated(names):
        faults.append(f"arms: two are named {name!r}; give each a name of its own")
    slugs: dict[str, str] = {}
    for name in dict.fromkeys(names):
        slug = slug_of(name)
        if not slug:
            faults.append(f"arm {name!r}: the name makes no directory's name; put a letter or a digit into it")
        elif slug in slugs:
            faults.append(f"arm {name!r}: its directory would be that of {slugs[slug]!r} ({slug}); rename one")
        slugs.setdefault(slug, name)
    if spec.baseline not in names:
        hint = did_you_mean(spec.baseline, names) or f"; the arms are: {', '.join(names)}"
        faults.append(f"baseline: there is no arm {spec.baseline!r}{hint}")
    for seed in _repeated(spec.seeds):
        faults.append(f"seeds: {seed} is there twice; leave one out")
    return faults


def _reserved_faults(place: str, settings: Mapping[str, object]) -> list[str]:
    said = {"seed": "list them under seeds, they are the same for all arms", "name": "the grid names its runs"}
    return [f"{place}: {key} cannot be set here; {said[key]}" for key in SET_BY_THE_SWEEP if key in settings]


def _comparison_faults(arms: Sequence[Arm], baseline: str) -> list[str]:
    """Reasons why the arms could not be compared: they train on other tokens or other text, or two are the same."""
    faults = []
    reference = next((arm for arm in arms if arm.name == baseline), arms[0])
    for arm in arms:
        if arm.recipe.tokens != reference.recipe.tokens:
            theirs = f"{reference.name!r} trains on {reference.recipe.tokens:,}"
            faults.append(
                f"arm {arm.name!r}: trains on {arm.recipe.tokens:,} tokens, {theirs}; arms are compared at equal tokens"
            )
        here, there = arm.recipe.data.model_dump(), reference.recipe.data.model_dump()
        for key in (key for key in here if here[key] != there[key]):
            found = f"found {here[key]!r}, {reference.name!r} has {there[key]!r}"
            faults.append(f"arm {arm.name!r}: data.{key} must be the same for all arms, {found}; set it in the base")
        faults += _vocabulary_faults(arm, reference)
    for number, arm in enumerate(arms):
        twin = next((other for other in arms[:number] if other.recipe == arm.recipe), None)
        if twin is not None:
            faults.append(
                f"arm {arm.name!r}: is the same recipe as {twin.name!r}; set what makes it differ, or drop it"
            )
    return faults


def _vocabulary_faults(arm: Arm, reference: Arm) -> list[str]:
    """A tokenizer that is trained for the sweep is trained once, so all arms need the same vocabulary size."""
    assert arm.recipe.architecture is not None and reference.recipe.architecture is not None
    here, there = arm.recipe.architecture.vocab_size, reference.recipe.architecture.vocab_size
    if here == there or arm.recipe.data.tokenizer:
        return []
    found = f"found {here}, {reference.name!r} has {there}"
    return [
        f"arm {arm.name!r}: architecture.vocab_size must be the same for all arms where data.tokenizer is empty, {found}"
    ]


def _schema_faults(errors: Iterable[ErrorDetails], document: Mapping[str, Any]) -> list[str]:
    """The faults that pydantic found, one line each, worded as in config/validation.py."""
    faults = []
    for error in errors:
        location = error["loc"]
        in_arm = location[0] == "arms" and len(location) > 2
        place = _arm_label(document, location[1]) + ": " if in_arm else ""
        key = ".".join(map(str, location[2:] if in_arm else location[:1]))
        if error["type"] == "extra_forbidden":
            known = list((ArmSpec if in_arm else SweepSpec).model_fields)
            text = "unknown key" + (did_you_mean(key, known) or f"; known here: {', '.join(known)}")
        elif error["type"] == "missing":
            text = "missing; add it"
        elif key == "arms":
            text = "should be tables; begin each arm with [[arms]]"
        else:
            value = error["input"]
            found = "" if isinstance(value, Mapping) else f", found {value!r}"
            text = error["msg"].removeprefix("Input ") + found
        faults.append(f"{place}{key}: {text}")
    return list(dict.fromkeys(faults))


def _arm_label(document: Mapping[str, Any], number: int | str) -> str:
    """ "arm 'LN + GELU'", or by its place where it has no usable name."""
    assert isinstance(number, int)
    arm = document["arms"][number]
    name = arm.get("name") if isinstance(arm, Mapping) else None
    return f"arm {name!r}" if isinstance(name, str) and name else f"arm {number + 1}"


def _repeated(values: Iterable[Any]) -> list[Any]:
    """The values that are there more than once, in order of their first appearance."""
    counted: dict[Any, int] = {}
    for value in values:
        counted[value] = counted.get(value, 0) + 1
    return [value for value, count in counted.items() if count > 1]


def _refused(path: Path, faults: Sequence[str]) -> UserError:
    count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
    return UserError(f"the grid {path} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults))
