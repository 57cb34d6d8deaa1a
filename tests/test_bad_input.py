"""Bad input to every command: exit code 2, one line that names what is wrong, no traceback, nothing half-written.

What a message says of each fault of a model, a recipe or a file of questions is tested where those are read.
"""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from command_line import ROOT, SCRIPTS, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_model import REMOVE

from ln_removal.config.recipe import load_recipe
from ln_removal.errors import UserError
from ln_removal.evaluation.questions import load_questions

T = TypeVar("T")

GARBAGE = bytes((97 * n) % 256 for n in range(4096))
HELLASWAG = "evaluate-hellaswag model --data q.jsonl --per-question new"
PREPARE = "ln-prepare bad --tokenizer model --out new"

QUESTION = {"ind": 0, "activity_label": "a", "ctx": "one two", "endings": ["a", "b", "c", "d"], "label": 0}


@pytest.fixture
def here(copied: Path, no_training: None) -> Path:
    """A world to spoil, with questions; nothing may be trained."""
    (copied / "q.jsonl").write_text("".join(json.dumps({**QUESTION, "ind": n}) + "\n" for n in range(4)))
    return copied


# ------------------------------------------------------------------------------------------------- how things are spoilt


def nothing(here: Path) -> None:
    """The mistake is in the command."""


def written(path: str, content: bytes | str | object) -> Callable[[Path], None]:
    """A file with this content, JSON if it is no text."""

    def spoil(here: Path) -> None:
        data = content if isinstance(content, bytes | str) else json.dumps(content)
        (here / path).parent.mkdir(parents=True, exist_ok=True)
        (here / path).write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    return spoil


def edited(path: str, **changes: Any) -> Callable[[Path], None]:
    """A JSON file with some fields changed; None removes one."""

    def spoil(here: Path) -> None:
        content = {**json.loads((here / path).read_text()), **changes}
        (here / path).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return spoil


def cut(path: str, keep: float = 0.5) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        data = (here / path).read_bytes()
        (here / path).write_bytes(data[: int(keep * len(data))])

    return spoil


def without(*paths: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for path in paths:
            (here / path).unlink()

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], None], path: str = "model") -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        file = here / path / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return spoil


def first_weight(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][3, 4] = value

    return change


def parquet(**columns: list[Any]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        import pyarrow as pa
        from pyarrow import parquet as pq

        (here / "bad").mkdir()
        pq.write_table(pa.table(columns), here / "bad" / "a.parquet")

    return spoil


def cut_parquet(here: Path) -> None:
    parquet(text=["some text"] * 50)(here)
    cut("bad/a.parquet")(here)


def question(**changes: Any) -> Callable[[Path], None]:
    """A file of questions whose second one is changed."""
    changed = {key: value for key, value in {**QUESTION, **changes}.items() if value is not None}
    return written("q.jsonl", f"{json.dumps(QUESTION)}\n{json.dumps(changed)}\n")


def unsavable(here: Path) -> None:
    """A temperature without sampling, which transformers reads, but does not write when it had to change anything else."""
    edited("model/config.json", temperature=0.5)(here)
    without("model/generation_config.json")(here)


def small_corpus(here: Path) -> None:
    (here / "small").mkdir()
    for name in ("a", "b"):
        (here / "small" / f"{name}.txt").write_text("too little", encoding="utf-8")


def prepend(file: Path, text: str) -> None:
    file.write_text(text + file.read_text(encoding="utf-8"), encoding="utf-8")


def missing(package: str) -> Callable[[Path], None]:
    """The package is not installed; undone by the fixture `modules`."""

    def spoil(here: Path) -> None:
        sys.modules[package] = None  # type: ignore[assignment]

    return spoil


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("wandb", "datasets", "pyarrow", "pyarrow.parquet"):
        if package in sys.modules:
            monkeypatch.setitem(sys.modules, package, sys.modules[package])
        else:
            monkeypatch.delitem(sys.modules, package, raising=False)


OUT = "--out new"
REMOVING = f"{REMOVE} {OUT}"
GIVEN = f"{REMOVING} --tokens tokens"
OTHER = REMOVING.replace("--model model", "--model other")

CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is wrong: (how it comes about, command, a key, name or file that the message must name)
    # ---- the words of a command line
    "no model": (nothing, f"ln-remove {OUT}", "--model"),
    "unknown option": (nothing, f"{REMOVING} --stepz 4", "--stepz"),
    "unknown choice": (nothing, f"{REMOVING} --device tpu", "--device"),
    "not a setting": (nothing, f"{REMOVING} --set nonsense", "KEY=VALUE"),
    "an argument is missing": (nothing, "ln-evaluate", "argument"),
    "no corpus": (nothing, "ln-prepare", "--list"),
    "a name too long": (nothing, f"ln-evaluate {'a' * 300} {OUT}", "aaa"),
    "no context at all": (nothing, f"ln-evaluate model --tokens tokens --context 0 {OUT}", "--context"),
    "no tokens at all": (nothing, f"ln-evaluate model --tokens tokens --max-tokens -1 {OUT}", "--max-tokens"),
    "no token to prepare": (nothing, f"ln-prepare texts --tokenizer model --max-tokens 0 {OUT}", "--max-tokens"),
    "no questions asked": (nothing, f"{HELLASWAG} --limit 0", "--limit"),
    "an unknown protocol": (nothing, f"{HELLASWAG} --protocol mine", "--protocol"),
    "no precision of that name": (nothing, f"ln-export run --dtype int3 {OUT}", "--dtype"),
    "no form of that name": (nothing, f"ln-export run --format pickle {OUT}", "--format"),
    "publish nowhere": (nothing, "ln-export run --push-to-hub nonsense", "nonsense"),
    "private from whom": (nothing, f"{REMOVING} --private", "--push-to-hub"),
    # ---- models
    "no such model": (nothing, f"ln-remove --model ./nonsense {OUT}", "./nonsense"),
    "a model that is a file": (written("file", "in the way"), f"ln-remove --model file {OUT}", "file"),
    "LN-free model": (nothing, REMOVING.replace("--model model", "--model run/model"), "run/model"),
    "LN-free stock model": (nothing, REMOVING.replace("--model model", "--model run/stock"), "run/stock"),
    "config is garbage": (written("model/config.json", GARBAGE), REMOVING, "config.json"),
    "weights cut off": (cut("model/model.safetensors"), REMOVING, "model.safetensors"),
    "NaN weights": (weights(first_weight(float("nan"))), REMOVING, "transformer.h.1.mlp.c_fc"),
    "an adapter": (written("model/adapter_config.json", {}), REMOVING, "adapter_config.json"),
    "settings that cannot be saved again": (unsavable, REMOVING, "generation_config.json"),
    "no tokenizer": (without("model/tokenizer.json"), REMOVING, "tokenizer"),
    "tokenizer of a larger model": (
        lambda here: shutil.copy(here / "model" / "tokenizer.json", here / "other" / "tokenizer.json") and None,
        OTHER,
        "320",
    ),
    "no end-of-text token": (
        edited("model/tokenizer_config.json", eos_token=None, bos_token=None),
        f"ln-prepare texts --tokenizer model {OUT}",
        "end-of-text",
    ),
    "too few positions": (
        nothing,
        f"{REMOVING} --set data.context=65 --set training.tokens_per_step=260",
        "data.context",
    ),
    "NaN weights scored": (weights(first_weight(float("nan"))), HELLASWAG, "transformer.h.1.mlp.c_fc"),
    "a model with LayerNorms": (nothing, f"ln-export model {OUT}", "LayerNorm"),
    "LN-free weights NaN": (weights(first_weight(float("nan")), "run/model"), f"ln-export run/model {OUT}", "NaN"),
    # ---- recipes
    "no such recipe": (nothing, f"ln-remove --recipe gpt3 {OUT}", "gpt3"),
    "no such recipe file": (nothing, f"ln-remove --recipe none.toml {OUT}", "none.toml"),
    "recipe is garbage": (written("bad.toml", GARBAGE), f"ln-remove --recipe bad.toml {OUT}", "bad.toml"),
    "recipe is a directory": (lambda here: (here / "d.toml").mkdir(), f"ln-remove --recipe d.toml {OUT}", "d.toml"),
    "recipe with faults": (
        written("bad.toml", 'model = "tiny"\n[data]\ncorpse = "x"\n'),
        f"ln-remove --recipe bad.toml {OUT}",
        "data.corpse",
    ),
    "unknown key": (nothing, f"{REMOVING} --set training.lerning_rate=1", "training.learning_rate"),
    "NaN learning rate": (nothing, f"{REMOVING} --set training.learning_rate=nan", "training.learning_rate"),
    "words for a number": (nothing, f"{REMOVING} --set training.clip=much", "training.clip"),
    "a number for a table": (nothing, f"{REMOVING} --set training=5", "training"),
    "a table below a number": (nothing, f"{REMOVING} --set seed.x.y=5", "seed.x.y"),
    "negative steps": (nothing, f"{REMOVING} --steps -5", "-5"),
    "impossible schedule": (nothing, f"ln-remove --model tiny --set training.steps=20 {OUT}", "20"),
    "pretraining recipe": (nothing, f"ln-remove --recipe tiny-gpt2 {OUT}", "ln-pretrain"),
    "removal recipe, planned": (nothing, "ln-pretrain --recipe tiny --dry-run", "ln-remove"),
    # ---- text and tokens
    "empty corpus": (lambda here: (here / "bare").mkdir(), REMOVING.replace("texts", "bare"), "bare"),
    "too small a corpus": (small_corpus, REMOVING.replace("texts", "small"), "tokens"),
    "no such corpus": (nothing, REMOVING.replace("texts", "openwebtxt"), "openwebtext"),
    "unknown source": (nothing, f"{REMOVING} --set data.weights.stdlib=4", "stdlib"),
    "another tokenizer named": (nothing, f"{REMOVING} --set data.tokenizer=other", "data.tokenizer"),
    "pretraining on nothing": (
        lambda here: (here / "bare").mkdir(),
        f"ln-pretrain --set data.corpus=bare {OUT}",
        "bare",
    ),
    "parquet is cut off": (cut_parquet, PREPARE, "a.parquet"),
    "parquet without text": (parquet(body=["a"]), PREPARE, "body"),
    "jsonl is garbage": (written("bad/a.jsonl", GARBAGE), PREPARE, "a.jsonl"),
    "jsonl is bottomless": (written("bad/a.jsonl", "[" * 100_000), PREPARE, "line 1"),
    "gzip is cut off": (written("bad/a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9]), PREPARE, "a.jsonl.gz"),
    "a malformed data set": (nothing, f"ln-prepare hub:a/b/c --tokenizer model {OUT}", "hub:"),
    "prepare over a file": (written("file", "x"), "ln-prepare texts --tokenizer model --out file", "file"),
    "prepare over other tokens": (
        lambda here: (here / "texts" / "part_99.txt").write_text("more text\n") and None,
        "ln-prepare texts --tokenizer model --out tokens",
        "another corpus",
    ),
    "prepare to nowhere": (nothing, "ln-prepare texts --tokenizer model --out /proc/nowhere", "/proc/nowhere"),
    "no tokens": (nothing, f"{REMOVING} --tokens texts", "texts"),
    "tokens index is garbage": (written("tokens/index.json", GARBAGE), GIVEN, "index.json"),
    "tokens of a later version": (edited("tokens/index.json", format="ln-removal tokens 9"), GIVEN, "tokens 9"),
    "a token shard is cut off": (
        lambda here: cut(f"tokens/{next((here / 'tokens').glob('train*')).name}")(here),
        GIVEN,
        "train-",
    ),
    "tokens of another tokenizer": (nothing, f"{REMOVING} --tokens other-tokens", "other"),
    "pretraining on another's tokens": (
        nothing,
        f"ln-pretrain --tokens tokens --set data.tokenizer=other --steps 4 {OUT}",
        "tokenizer",
    ),
    # ---- questions
    "no questions": (nothing, f"{REMOVING} --questions none.jsonl", "none.jsonl"),
    "questions are garbage": (written("q.jsonl", GARBAGE), HELLASWAG, "q.jsonl"),
    "three endings": (question(endings=["a", "b", "c"]), HELLASWAG, "line 2"),
    "half a character": (question(ctx="\ud800"), HELLASWAG, "line 2"),
    "a bottomless question": (written("q.jsonl", '{"a":' * 100_000), HELLASWAG, "line 1"),
    "no datasets": (missing("datasets"), "evaluate-hellaswag model --data hellaswag", "datasets"),
    # ---- runs, exports, evaluations
    "output is a file": (written("file", "in the way"), f"{REMOVE} --out file", "file"),
    "output is used": (nothing, f"{REMOVE} --out texts", "texts"),
    "output is a run": (nothing, f"{REMOVE} --out run", "--resume"),
    "nothing to resume": (nothing, f"{REMOVE} --out texts --resume", "texts"),
    "another recipe to resume": (
        nothing,
        f"{REMOVE} --set training.checkpoint_every=3 --set seed=1 --out run --resume",
        "seed was 0, now 1",
    ),
    "remove to nowhere": (nothing, f"{REMOVE} --out /proc/nowhere/run", "/proc/nowhere/run"),
    "pretraining in a used place": (nothing, "ln-pretrain --out texts", "texts"),
    "run of a later version": (
        lambda here: prepend(here / "run" / "recipe.toml", "hologram = 5\n"),
        f"ln-evaluate run {OUT}",
        "hologram",
    ),
    "export into a used place": (nothing, "ln-export run --out texts", "texts"),
    "a loop of links": (lambda here: (here / "loop").symlink_to("loop"), "ln-export run --out loop/new", "loop/new"),
    "evaluate without tokens": (nothing, "ln-evaluate model", "--tokens"),
    "evaluate with another tokenizer": (nothing, "ln-evaluate other --tokens tokens", "tokenizer"),
    "evaluate one with another": (nothing, "ln-evaluate run --control other", "other"),
    "evaluate too long": (nothing, "ln-evaluate model --tokens tokens --context 65", "64"),
    "evaluate to a directory": (nothing, "ln-evaluate run --out texts", "texts"),
    "report of nothing": (nothing, "ln-report nonsense", "nonsense"),
    "report of damaged results": (written("run/results.json", GARBAGE), "ln-report run", "results.json"),
    "analysis of nothing": (nothing, f"ln-analyze entropy nonsense {OUT}", "nonsense"),
    "analysis of a run that was not observed": (nothing, f"ln-analyze nans run {OUT}", "observation"),
    "analysis on another's tokens": (nothing, f"ln-analyze entropy model --tokens other-tokens {OUT}", "tokenizer"),
}


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("wrong", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(here: Path, wrong: str) -> None:
    spoil, command, part = CASES[wrong]
    spoil(here)
    before = contents(here)
    line = refused(command)
    assert part in line and len(line) < 1200, line
    assert contents(here) == before and not (here / "new").exists()


def test_every_command_is_among_them() -> None:
    assert {command.split()[0] for _, command, _ in CASES.values()} == set(SCRIPTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("modules")
def test_wandb_that_is_not_installed(here: Path) -> None:
    from ln_removal.training.metrics import _start_wandb

    missing("wandb")(here)
    with pytest.raises(UserError, match="wandb"):
        _start_wandb("project", here, "removal", None)


# ---------------------------------------------------------------------------------------------------------------- fuzz

KEYS = st.sampled_from(
    "name model seed data.corpus data.context data.weights schedule.ln_2_start schedule.taper training.steps "
    "training.tokens_per_step training.learning_rate training.betas training.micro_batch training.decay architecture "
    "architecture.n_embd export.formats export.dtype schedule training data.x x x.y".split()
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["gpt2", 64, 1e-3]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def outcome(load: Callable[[], T]) -> tuple[T | None, str]:
    """What was loaded, or the message of the UserError; any other exception is a failure."""
    try:
        return load(), ""
    except UserError as error:
        return None, str(error)


@settings(max_examples=120, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_values_in_a_recipe_are_a_recipe_or_a_message(overrides: dict[str, Any]) -> None:
    recipe, message = outcome(lambda: load_recipe("tiny", overrides))
    assert message if recipe is None else recipe.tokens > 0


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


TINY_RECIPE = (ROOT / "recipes" / "tiny.toml").read_bytes()


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file with bytes cut out, put in or changed."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        data[start:end] = draw(st.binary(max_size=20) | st.text(max_size=10).map(lambda text: text.encode()))
    return bytes(data)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200) | damaged(TINY_RECIPE))
def test_any_bytes_in_a_recipe_file_are_a_recipe_or_a_message(scratch: Path, data: bytes) -> None:
    file = scratch / "fuzz.toml"
    file.write_bytes(data)
    recipe, message = outcome(lambda: load_recipe(str(file)))
    assert recipe is not None or str(file) in message


RECORDS = "".join(json.dumps({**QUESTION, "ind": n}) + "\n" for n in range(2)).encode()
TEXT_FORM = b"roof: a man\n2\nfirst\nsecond\nthird\nfourth\n" * 2


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200) | damaged(RECORDS) | damaged(TEXT_FORM) | damaged(gzip.compress(RECORDS)),
    ending=st.sampled_from([".jsonl", ".txt", ".gz", ".bz2"]),
)
def test_any_bytes_in_a_file_of_questions_are_questions_or_a_message(scratch: Path, data: bytes, ending: str) -> None:
    file = scratch / f"fuzz{ending}"
    file.write_bytes(data)
    questions, message = outcome(lambda: load_questions(file))
    if questions is None:
        assert str(file) in message
    else:
        assert questions and all(0 <= question.label < 4 for question in questions)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from([*QUESTION, "ctx_a", "ctx_b", "split"]), VALUES, max_size=7))
def test_any_fields_of_a_question_are_one_or_a_message(scratch: Path, record: dict[str, Any]) -> None:
    file = scratch / "fields.jsonl"
    file.write_text(json.dumps({**QUESTION, **record}) + "\n", encoding="utf-8")
    questions, message = outcome(lambda: load_questions(file))
    if questions is None:
        assert "line 1" in message
    else:
        questions[0].ctx.encode()
