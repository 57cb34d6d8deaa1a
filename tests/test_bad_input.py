"""Bad input to every command: exit code 2, one line that names what is wrong, no traceback, nothing half-written.

Mistakes in the words of a command line stand in test_commands.py; here are mostly files that are not what they should be.
"""

from __future__ import annotations

import gzip
import importlib
import json
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from click.testing import Result
from finished_run import make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_model import write_corpus, write_model
from typer.testing import CliRunner

from ln_removal.config.recipe import load_recipe
from ln_removal.errors import UserError
from ln_removal.evaluation.questions import load_questions
from ln_removal.pipelines import context

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]

T = TypeVar("T")

GARBAGE = bytes((97 * n) % 256 for n in range(4096))
STEP = "--set training.tokens_per_step=256 --set training.precision=float32"
REMOVE = f"ln-remove --set data.corpus=texts --steps 6 --questions none {STEP} --out new"
MODEL = f"{REMOVE} --model model"
HELLASWAG = "evaluate-hellaswag model --data q.jsonl --per-question new"
PREPARE = "ln-prepare bad --tokenizer model --out new"

QUESTION = {"ind": 0, "activity_label": "a", "ctx": "one two", "endings": ["a", "b", "c", "d"], "label": 0}


def run(command: str) -> Result:
    """Run a command line in this process."""
    name, *arguments = shlex.split(command)
    return CliRunner().invoke(importlib.import_module(SCRIPTS[name].partition(":")[0]).app, arguments, prog_name=name)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which everything is right: a model, another one, text, tokens, a run, questions, a recipe."""
    place = tmp_path_factory.mktemp("sound")
    write_model(place / "model")
    write_model(place / "other", entries=300)
    write_corpus(place / "texts", documents=12)
    make_run(place / "run")
    (place / "q.jsonl").write_text("".join(json.dumps({**QUESTION, "ind": n}) + "\n" for n in range(4)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert run("ln-prepare texts --tokenizer model --out tokens").exit_code == 0
        assert run("ln-prepare texts --tokenizer other --out other-tokens").exit_code == 0
    return place


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil, as the current directory; nothing may be trained."""

    def began(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    shutil.copytree(sound, tmp_path / "here")
    monkeypatch.setattr(context, "open_session", began)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


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


def sharded(index: object) -> Callable[[Path], None]:
    """The weights under another name, and an index of shards."""

    def spoil(here: Path) -> None:
        (here / "model" / "model.safetensors").rename(here / "model" / "weights.safetensors")
        written("model/model.safetensors.index.json", index)(here)

    return spoil


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


CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is wrong: (how it comes about, command, part of the message)
    # ---- models
    "config is garbage": (written("model/config.json", GARBAGE), MODEL, "config.json is not readable JSON"),
    "config is a list": (written("model/config.json", []), MODEL, "is not a GPT-2"),
    "config is bottomless": (written("model/config.json", "[" * 100_000), MODEL, "is not readable JSON"),
    "another architecture": (edited("model/config.json", model_type="llama"), MODEL, "model_type 'llama'"),
    "no layers": (edited("model/config.json", n_layer=0), MODEL, "n_layer is 0; it must be a whole number above 0"),
    "negative width": (edited("model/config.json", n_embd=-32), MODEL, "n_embd is -32"),
    "heads that do not divide": (edited("model/config.json", n_head=3), MODEL, "n_embd 32 is no multiple of n_head 3"),
    "layers in words": (edited("model/config.json", n_layer="two"), MODEL, "not a valid GPT-2 configuration"),
    "more layers than weights": (edited("model/config.json", n_layer=3), MODEL, "the weights lack"),
    "wider than its weights": (edited("model/config.json", n_embd=64), MODEL, "config.json does not fit"),
    "weights cut off": (cut("model/model.safetensors"), MODEL, "is not a whole safetensors file"),
    "weights are garbage": (written("model/model.safetensors", GARBAGE), MODEL, "is not a whole safetensors file"),
    "weights are empty": (written("model/model.safetensors", b""), MODEL, "is not a whole safetensors file (0 bytes"),
    "no weights": (without("model/model.safetensors"), MODEL, "has no model.safetensors; found:"),
    "NaN weights": (weights(first_weight(float("nan"))), MODEL, "1 of the 4,096 weights in transformer.h.1.mlp.c_fc"),
    "infinite weights": (weights(first_weight(float("inf"))), MODEL, "are NaN or infinite"),
    "wrong shape": (
        weights(lambda w: w.update({"transformer.wpe.weight": torch.zeros(9, 32)})),
        MODEL,
        "such as transformer.wpe.weight: (9, 32) in the file, (64, 32) by config.json",
    ),
    "a tensor is missing": (weights(lambda w: w.__delitem__("transformer.ln_f.bias")), MODEL, "transformer.ln_f.bias"),
    "index names nothing": (sharded({"weight_map": {}}), MODEL, "names no weight files"),
    "index is a list": (sharded([]), MODEL, "names no weight files"),
    "index with numbers": (sharded({"weight_map": {"a": 1, "b": ["x"]}}), MODEL, "names no weight files"),
    "a shard is missing": (
        sharded({"weight_map": {"a": "gone.safetensors"}}),
        MODEL,
        "gone.safetensors is not a whole",
    ),
    "an adapter": (
        written("model/adapter_config.json", {}),
        MODEL,
        "holds an adapter (adapter_config.json), not a model",
    ),
    "no tokenizer": (without("model/tokenizer.json"), MODEL, "has no tokenizer"),
    "tokenizer is garbage": (written("model/tokenizer.json", GARBAGE), MODEL, "the tokenizer in model does not load"),
    "tokenizer is empty JSON": (written("model/tokenizer.json", {}), MODEL, "the tokenizer in model does not load"),
    "tokenizer of a larger model": (
        lambda here: shutil.copy(here / "model" / "tokenizer.json", here / "other" / "tokenizer.json") and None,
        f"{REMOVE} --model other",
        "the tokenizer has 320 entries and the model's embedding 300 rows",
    ),
    "no end-of-text token": (
        edited("model/tokenizer_config.json", eos_token=None, bos_token=None),
        "ln-prepare texts --tokenizer model --out new",
        "has no end-of-text token",
    ),
    "an empty directory": (lambda here: (here / "bare").mkdir(), f"{REMOVE} --model bare", "bare has no config.json"),
    # ---- recipes
    "recipe is garbage": (written("bad.toml", GARBAGE), "ln-remove --recipe bad.toml --out new", "is not TOML"),
    "recipe is a directory": (
        lambda here: (here / "bad.toml").mkdir(),
        "ln-remove --recipe bad.toml --out new",
        "cannot read the recipe",
    ),
    "recipe is empty": (written("bad.toml", ""), "ln-pretrain --recipe bad.toml --out new", "faults:"),
    "NaN learning rate": (nothing, f"{MODEL} --set training.learning_rate=nan", "training.learning_rate"),
    "infinite clip": (nothing, f"{MODEL} --set training.clip=inf", "training.clip"),
    "negative batch": (nothing, f"{MODEL} --set training.tokens_per_step=-256", "training.tokens_per_step"),
    "zero context": (nothing, f"{MODEL} --set data.context=0", "data.context"),
    "words for a number": (nothing, f"{MODEL} --set training.clip=much", "training.clip"),
    "a number for a table": (nothing, f"{MODEL} --set training=5", "training: should be a table"),
    "a table below a number": (nothing, f"{MODEL} --set seed.x.y=5", "cannot set seed.x.y"),
    "negative seed": (nothing, f"{MODEL} --set seed=-1", "seed"),
    # ---- data
    "parquet is garbage": (written("bad/a.parquet", GARBAGE), PREPARE, "is not a whole parquet file"),
    "parquet is cut off": (cut_parquet, PREPARE, "is not a whole parquet file"),
    "parquet without text": (parquet(body=["a"]), PREPARE, "has no column 'text' (found: body)"),
    "parquet of numbers": (parquet(text=[1, 2]), PREPARE, "holds int64, not strings"),
    "jsonl is garbage": (written("bad/a.jsonl", GARBAGE), PREPARE, "not JSON"),
    "jsonl without text": (written("bad/a.jsonl", {"body": "x"}), PREPARE, "no text in the field 'text' (found: body)"),
    "jsonl of numbers": (written("bad/a.jsonl", {"text": 5}), PREPARE, "no text in the field 'text'"),
    "jsonl is bottomless": (written("bad/a.jsonl", "[" * 100_000), PREPARE, "line 1: cannot be read as JSON"),
    "jsonl with an endless number": (written("bad/a.jsonl", "9" * 5000), PREPARE, "line 1: cannot be read as JSON"),
    "gzip is garbage": (written("bad/a.jsonl.gz", GARBAGE), PREPARE, "cannot be read"),
    "gzip is cut off": (
        written("bad/a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-9]),
        PREPARE,
        "a.jsonl.gz cannot be read",
    ),
    "a binary file": (
        written("bad.txt", b"\0" * 99),
        "ln-prepare bad.txt --tokenizer model --out new",
        "is a binary file",
    ),
    "a malformed data set": (nothing, "ln-prepare hub:a/b/c --tokenizer model --out new", "is not a Hub data set"),
    "an unknown ending": (
        written("a.xyz", "x"),
        "ln-prepare a.xyz --tokenizer model --out new",
        "an ending that is not",
    ),
    # ---- tokens
    "tokens index is garbage": (written("tokens/index.json", GARBAGE), f"{MODEL} --tokens tokens", "is damaged"),
    "tokens of a later version": (
        edited("tokens/index.json", format="ln-removal tokens 9"),
        f"{MODEL} --tokens tokens",
        "is in the format 'ln-removal tokens 9', this version reads",
    ),
    "tokens of no version": (edited("tokens/index.json", format=None), f"{MODEL} --tokens tokens", "is damaged"),
    "tokens with a count below zero": (
        edited("tokens/index.json", vocab_size=-1),
        f"{MODEL} --tokens tokens",
        "damaged",
    ),
    "a token shard is cut off": (
        lambda here: cut(f"tokens/{next((here / 'tokens').glob('train*')).name}")(here),
        f"{MODEL} --tokens tokens",
        "bytes long, the index says",
    ),
    "a token shard is gone": (
        lambda here: next((here / "tokens").glob("validation*")).unlink(),
        "ln-evaluate model --tokens tokens --out new",
        "is missing, the index says",
    ),
    "tokens of another model": (nothing, f"{MODEL} --tokens other-tokens", "another tokenizer (other)"),
    "pretraining on another's tokens": (
        nothing,
        "ln-pretrain --tokens tokens --set data.tokenizer=other --steps 4 --out new",
        "another tokenizer",
    ),
    # ---- questions
    "questions are garbage": (written("q.jsonl", GARBAGE), HELLASWAG, "cannot read questions"),
    "questions are empty": (written("q.jsonl", "\n\n"), HELLASWAG, "holds no questions"),
    "questions in a directory": (nothing, "evaluate-hellaswag model --data texts", "cannot read questions"),
    "a question that is no object": (
        written("q.jsonl", f"{json.dumps(QUESTION)}\n7\n"),
        HELLASWAG,
        "line 2: expected a JSON",
    ),
    "a question cut off": (written("q.jsonl", json.dumps(QUESTION)[:-9]), HELLASWAG, "line 1: not JSON"),
    "three endings": (question(endings=["a", "b", "c"]), HELLASWAG, "line 2: endings is not a list of 4"),
    "endings of numbers": (question(endings=[1, 2, 3, 4]), HELLASWAG, "line 2: endings is not a list of 4"),
    "label out of range": (question(label=4), HELLASWAG, "line 2: the label is '4'; expected 0 to 3"),
    "no label": (question(label=""), HELLASWAG, "the test split is published without labels"),
    "no context": (question(ctx=None), HELLASWAG, "line 2: no ctx"),
    "ind in words": (question(ind="seven"), HELLASWAG, "line 2: ind is 'seven'"),
    "ind is NaN": (question(ind=float("nan")), HELLASWAG, "line 2: ind is nan"),
    "half a character": (question(ctx="\ud800"), HELLASWAG, "line 2: the text holds half of a surrogate pair"),
    "a bottomless question": (written("q.jsonl", '{"a":' * 100_000), HELLASWAG, "line 1: not JSON"),
    "questions in bad gzip": (
        written("q.jsonl.gz", gzip.compress(json.dumps(QUESTION).encode())[:12] + GARBAGE),
        "evaluate-hellaswag model --data q.jsonl.gz",
        "cannot read questions",
    ),
    "text form cut off": (
        written("q.txt", "a: b\n0\n1\n2\n"),
        "evaluate-hellaswag model --data q.txt",
        "not a multiple of 6",
    ),
    "no questions asked": (nothing, f"{HELLASWAG} --limit 0", "--limit"),
    "fewer than no questions": (nothing, f"{HELLASWAG} --limit -3", "--limit"),
    "an unknown protocol": (nothing, f"{HELLASWAG} --protocol mine", "--protocol"),
    "NaN weights scored": (
        weights(first_weight(float("nan"))),
        "evaluate-hellaswag model --data q.jsonl --per-question new",
        "are NaN or infinite",
    ),
    # ---- runs, exports, evaluations
    "run of a later version": (
        lambda here: (
            (here / "run" / "recipe.toml").write_text("hologram = 5\n" + (here / "run" / "recipe.toml").read_text())
            and None
        ),
        "ln-evaluate run --out new",
        "hologram: unknown key",
    ),
    "LN-free weights cut off": (
        cut("run/model/model.safetensors"),
        "ln-export run --out new",
        "not a whole safetensors",
    ),
    "LN-free weights NaN": (
        weights(first_weight(float("nan")), "run/model"),
        "ln-export run/model --out new",
        "are NaN",
    ),
    "no precision of that name": (nothing, "ln-export run --dtype int3 --out new", "--dtype"),
    "no form of that name": (nothing, "ln-export run --format pickle --out new", "--format"),
    "export below a device": (nothing, "ln-export run --out /dev/null/new", "cannot write /dev/null/new"),
    "export to nowhere": (nothing, "ln-export run --out /proc/nowhere/new", "cannot write /proc/nowhere/new"),
    "prepare to nowhere": (
        nothing,
        "ln-prepare texts --tokenizer model --out /proc/nowhere",
        "cannot write /proc/nowhere",
    ),
    "remove to nowhere": (nothing, f"{REMOVE} --model model --out /proc/nowhere/run", "cannot write /proc/nowhere/run"),
    "pretrain to nowhere": (nothing, "ln-pretrain --steps 4 --out /proc/nowhere/run", "cannot write /proc/nowhere/run"),
    "no context at all": (nothing, "ln-evaluate model --tokens tokens --context 0 --out new", "--context"),
    "no tokens at all": (nothing, "ln-evaluate model --tokens tokens --max-tokens -1 --out new", "--max-tokens"),
    "a model with LayerNorms": (nothing, "ln-export model --out new", "with its LayerNorms"),
    "publish nowhere": (nothing, "ln-export run --push-to-hub nonsense", "is no repository; give USER/REPO"),
    "private from whom": (nothing, f"{MODEL} --private", "add --push-to-hub USER/REPO"),
    "a name too long": (nothing, f"ln-evaluate {'a' * 300} --out new", "File name too long; check the path"),
    "a path too long": (nothing, f"ln-prepare ./{'a' * 300} --tokenizer model --out new", "File name too long"),
    "a loop of links": (
        lambda here: (here / "loop").symlink_to("loop"),
        "ln-export run --out loop/new",
        "cannot write loop/new: Too many levels of symbolic links",
    ),
    "report of nothing": (nothing, "ln-report nonsense", "nonsense"),
    "report of damaged results": (written("run/results.json", GARBAGE), "ln-report run", "results.json"),
    "analysis of nothing": (nothing, "ln-analyze entropy nonsense --out new", "nonsense is not the directory of a run"),
    "analysis of a run without metrics": (nothing, "ln-analyze nans run --out new", "there is no metrics.jsonl"),
    "analysis on another's tokens": (
        nothing,
        "ln-analyze entropy model --tokens other-tokens --out new",
        "made with another tokenizer",
    ),
    # ---- packages that are not there
    "no datasets": (missing("datasets"), "evaluate-hellaswag model --data hellaswag", "needs the package datasets"),
}


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("wrong", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(here: Path, wrong: str) -> None:
    spoil, command, part = CASES[wrong]
    spoil(here)
    before = contents(here)
    result = run(command)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert part in lines[0]
    assert "Traceback" not in result.stderr and len(lines[0]) < 1200
    assert contents(here) == before and not (here / "new").exists()


def test_there_are_enough_of_them_for_every_command() -> None:
    commands = [command.split()[0] for _, command, _ in CASES.values()]
    assert len(CASES) >= 40 and set(commands) == set(SCRIPTS)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.usefixtures("modules")
def test_wandb_that_is_not_installed(here: Path) -> None:
    from ln_removal.training.metrics import _start_wandb

    missing("wandb")(here)
    with pytest.raises(UserError, match="needs the package wandb, which is not installed"):
        _start_wandb("project", "name", None)


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
