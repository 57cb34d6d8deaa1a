"""The commands as a user meets them: help, mistakes, what is left behind, and going on after an interruption.

Most cases run in this process; where the process itself is the point (what it imports, the environment it reads), the
installed script runs. What evaluate-hellaswag does on its own is in test_evaluate_hellaswag.py.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from small_model import write_corpus, write_model
from typer.testing import CliRunner

from ln_removal.data.tokens import TokenDataset
from ln_removal.files import run_directory
from ln_removal.pipelines import context, removal

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
HEAVY = {
    "torch",
    "transformers",
    "pydantic",
    "numpy",
    "datasets",
    "wandb",
    "matplotlib",
    "huggingface_hub",
    "accelerate",
}

STEP = "--set training.tokens_per_step=256 --set training.precision=float32"
REMOVE = f"ln-remove --model model --set data.corpus=texts --steps 6 --questions none {STEP}"


def run(command: str) -> Result:
    """Run a command line in this process."""
    name, *arguments = shlex.split(command)
    app = importlib.import_module(SCRIPTS[name].partition(":")[0]).app
    return CliRunner().invoke(app, arguments, prog_name=name)


def script(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script of a command."""
    name, *arguments = shlex.split(command)
    installed = Path(sys.executable).parent / name
    start = [str(installed)] if installed.exists() else [sys.executable, "-m", SCRIPTS[name].partition(":")[0]]
    return subprocess.run(
        [*start, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def done(command: str) -> Result:
    result = run(command)
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return result


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory, with its size and the time of its last change."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, text, tokens, a finished run with a control, and all kinds of wrong things."""
    place = tmp_path_factory.mktemp("world")
    write_model(place / "model")
    write_model(place / "other", entries=300)
    write_corpus(place / "texts")
    write_corpus(place / "more", documents=12)
    (place / "empty").mkdir()
    (place / "small").mkdir()
    for name in ("a", "b"):
        (place / "small" / f"{name}.txt").write_text("too little", encoding="utf-8")
    (place / "file").write_text("in the way", encoding="utf-8")
    (place / "bad.toml").write_text('model = "tiny"\n[data]\ncorpse = "x"\n', encoding="utf-8")
    (place / "unlike.toml").write_text("this is not TOML", encoding="utf-8")
    before = Path.cwd()
    os.chdir(place)
    try:
        done("ln-prepare texts --tokenizer model --out tokens")
        done("ln-prepare texts --tokenizer other --out other-tokens")
        done(f"{REMOVE} --control --set training.checkpoint_every=3 --out run")
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The world as the current directory; `new` is where a command may try to write."""
    monkeypatch.chdir(world)
    yield world
    shutil.rmtree(world / "new", ignore_errors=True)


@pytest.fixture
def copied(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world that a test may change; the tokens keep their times, by which a corpus is recognised."""
    shutil.copytree(world, tmp_path / "world", symlinks=True)
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def began(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(context, "open_session", began)


# ------------------------------------------------------------------------------------------------ help, version, plan


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_light_quick_and_has_an_example(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = script(f"{name} --help", PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0
    assert re.search(rf"Examples?:\n\s+{name} ", shown.stdout)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in imported, "the import log was not read"
    assert not imported & HEAVY
    # Processor time, because the machine may be busy. An import log is slower than none.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("name", SCRIPTS)
def test_version(name: str) -> None:
    shown = script(f"{name} --version")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.fullmatch(r"ln-removal \d+\.\d+\.\d+\S*\n", shown.stdout)


@pytest.mark.parametrize("name", ["ln-remove", "ln-pretrain"])
def test_examples_of_the_help_can_be_planned(name: str) -> None:
    shown = run(f"{name} --help").stdout
    examples = [line.strip() for line in shown.splitlines() if line.startswith(f"    {name} ")]
    planned = [line for line in examples if "--resume" not in line]
    assert len(planned) >= 2
    for line in planned:
        assert done(f"{line} --dry-run").stdout.strip()


def test_a_dry_run_needs_neither_network_nor_weights() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = script(
        "ln-remove --model gpt2 --dry-run --json --device cpu", HF_HUB_OFFLINE="1", PYTHONPROFILEIMPORTTIME="1"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    schedule = {entry["site"]: entry["step"] for entry in plan["schedule"]}
    assert len(schedule) == 3 * 12 + 1 + 2
    assert all(isinstance(step, int) and 0 < step < plan["steps"] for step in schedule.values())
    complete = {entry["site"]: entry["step"] + entry["taper"] for entry in plan["schedule"]}
    assert complete["ln_2.0"] == complete["ln_1_v.7"] == complete["ln_f"] < complete["eot"] == complete["first"]
    assert plan["tokens"] == pytest.approx(500e6, rel=0.1)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "pydantic" in imported and not imported & {"torch", "transformers", "huggingface_hub"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3.0


def test_a_dry_run_in_words() -> None:
    shown = done("ln-remove --model gpt2 --dry-run --device cpu").stdout
    for part in ("524,288,000", "ln_1_qk", "recovery", "memory", "time", "tokens_per_step = 524288"):
        assert part in shown
    assert "no [schedule]" not in shown and not Path("checkpoints/gpt2").exists()


# ------------------------------------------------------------------------------------------------------- bad input

MISTAKES = {
    # what is wrong: (command, part of the message)
    "nothing named": ("ln-remove --out new", "--model"),
    "no such directory": ("ln-remove --model ./nonsense --out new", "no such directory: ./nonsense"),
    "model is a file": ("ln-remove --model file --out new", "file is a file"),
    "LN-free model": (f"{REMOVE} --model run/model --out new", "LN-free already"),
    "LN-free stock model": (f"{REMOVE} --model run/stock --out new", "LN-free already"),
    "no such recipe": ("ln-remove --recipe gpt3 --out new", "did you mean 'gpt2'?"),
    "no such recipe file": ("ln-remove --recipe none.toml --out new", "no recipe file none.toml"),
    "recipe not TOML": ("ln-remove --recipe unlike.toml --out new", "is not TOML"),
    "recipe with faults": ("ln-remove --recipe bad.toml --out new", "(2)"),
    "unknown key": (f"{REMOVE} --set training.lerning_rate=1 --out new", "did you mean 'training.learning_rate'?"),
    "not a setting": (f"{REMOVE} --set nonsense --out new", "KEY=VALUE"),
    "negative steps": (f"{REMOVE} --steps -5 --out new", "-5 steps is too short"),
    "one step": (f"{REMOVE} --steps 1 --out new", "at least 2"),
    "impossible schedule": ("ln-remove --model tiny --set training.steps=20 --out new", "train at least"),
    "impossible for this model": (
        f"ln-remove --model model --set data.corpus=texts --set training.steps=60 {STEP} --set training.warmup_steps=0 "
        "--out new",
        "for 2 layers in 60 steps",
    ),
    "pretraining recipe": ("ln-remove --recipe tiny-gpt2 --out new", "run it with ln-pretrain"),
    "pretraining recipe, planned": ("ln-remove --recipe tiny-gpt2 --dry-run", "run it with ln-pretrain"),
    "empty corpus": (f"{REMOVE} --set data.corpus=empty --out new", "holds 0 documents"),
    "too small a corpus": (f"{REMOVE} --set data.corpus=small --out new", "too small"),
    "no such corpus": (f"{REMOVE} --set data.corpus=openwebtxt --out new", "did you mean openwebtext?"),
    "unknown source": (f"{REMOVE} --set data.weights.stdlib=4 --out new", "data.weights names the source stdlib"),
    "tokens of another tokenizer": (f"{REMOVE} --tokens other-tokens --out new", "another tokenizer (other)"),
    "no tokens": (f"{REMOVE} --tokens texts --out new", "texts: no tokens"),
    "another tokenizer named": (
        f"{REMOVE} --set data.tokenizer=other --out new",
        "another tokenizer than that of model",
    ),
    "context too long": (
        f"{REMOVE} --set data.context=65 --set training.tokens_per_step=260 --out new",
        "data.context is 65, model has 64 positions",
    ),
    "no questions": (f"{REMOVE} --questions none.jsonl --out new", "cannot read questions from none.jsonl"),
    "output is a file": (f"{REMOVE} --out file", "cannot write file"),
    "output below a file": (f"{REMOVE} --out file/below", "cannot write file/below"),
    "output is used": (f"{REMOVE} --out texts", "not a run of ours; choose another --out"),
    "output is a run": (f"{REMOVE} --out run", "continue it with --resume"),
    "nothing to resume": (f"{REMOVE} --out texts --resume", "there is no run to resume"),
    "another recipe to resume": (
        f"{REMOVE} --set training.checkpoint_every=3 --set seed=1 --out run --resume",
        "seed was 0, now 1;",
    ),
    "unknown option": (f"{REMOVE} --stepz 4", "No such option: --stepz"),
    "unknown choice": (f"{REMOVE} --device tpu", "--device"),
    "removal recipe": ("ln-pretrain --recipe tiny --out new", "run it with ln-remove"),
    "removal recipe, planned": ("ln-pretrain --recipe tiny --dry-run", "run it with ln-remove"),
    "pretraining on nothing": ("ln-pretrain --set data.corpus=empty --out new", "holds 0 documents"),
    "pretraining negative steps": ("ln-pretrain --steps -1 --out new", "too short"),
    "pretraining in a used place": ("ln-pretrain --out texts", "not a run of ours"),
    "export with LayerNorms": ("ln-export model --out new", "with its LayerNorms"),
    "export nothing": ("ln-export nonsense --out new", "no such directory: nonsense"),
    "export into a used place": ("ln-export run --out texts", "texts is already in use"),
    "export below a file": ("ln-export run --out file/below", "cannot write file/below"),
    "evaluate nothing": ("ln-evaluate", "Missing argument"),
    "evaluate without tokens": ("ln-evaluate model", "pass --tokens DIR"),
    "evaluate no model": ("ln-evaluate ./nonsense", "no such directory: ./nonsense"),
    "evaluate on no tokens": ("ln-evaluate model --tokens texts", "texts: no tokens"),
    "evaluate with another tokenizer": ("ln-evaluate other --tokens tokens", "another tokenizer (model)"),
    "evaluate one with another": ("ln-evaluate run --control other", "(model) than that of other"),
    "evaluate too long": ("ln-evaluate model --tokens tokens --context 65", "64 positions of model"),
    "evaluate no questions": ("ln-evaluate run --questions none.jsonl", "cannot read questions"),
    "evaluate to nowhere": ("ln-evaluate run --out file/below.json", "cannot write file/below.json"),
    "evaluate to a directory": ("ln-evaluate run --out texts", "is a directory"),
    "prepare nothing": ("ln-prepare", "--list"),
    "prepare an unknown corpus": ("ln-prepare codeparot", "did you mean codeparrot?"),
    "prepare an empty corpus": ("ln-prepare empty --tokenizer model --out new", "holds 0 documents"),
    "prepare over a file": ("ln-prepare texts --tokenizer model --out file", "cannot write file"),
    "prepare over other tokens": ("ln-prepare more --tokenizer model --out tokens", "tokens of another corpus"),
    "prepare with another tokenizer": ("ln-prepare texts --tokenizer other --out tokens", "of another tokenizer"),
    "prepare with no tokenizer": ("ln-prepare texts --tokenizer ./nonsense --out new", "no such directory: ./nonsense"),
    "prepare too little": ("ln-prepare texts --tokenizer model --max-tokens 0 --out new", "--max-tokens"),
}


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(here: Path, mistake: str) -> None:
    command, part = MISTAKES[mistake]
    before = files(here)
    result = run(command)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and result.stderr.endswith("\n")
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert not (here / "new").exists()
    assert files(here) == before


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("command", [f"{REMOVE} --out new", "ln-pretrain --out new", "ln-evaluate run"])
def test_cuda_without_cuda(here: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run(f"{command} --device cuda")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: --device cuda: PyTorch ") and "--device cpu" in result.stderr
    assert not (here / "new").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(here: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run(f"{REMOVE} --out {tmp_path / 'new'}")
    tmp_path.chmod(0o700)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "Permission denied; choose another --out" in result.stderr


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


NOWHERE = "http://127.0.0.1:9"
"""A port that nothing listens on."""


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("ln-remove --model nonsense/model --out new", "for the model nonsense/model (["),
        ("ln-remove --recipe tiny --set data.contex=1 --out new", "did you mean 'data.context'?"),
        slow("ln-prepare openwebtext --tokenizer model --out new", "for the data set Skylion007/openwebtext (["),
        slow("ln-evaluate nonsense/model --tokens tokens", "for the model nonsense/model (["),
        slow("ln-remove --model tiny --out file", "cannot write file: File exists"),
        slow("ln-remove --out run/control --resume", "holds no recipe.toml"),
    ],
)
def test_mistakes_of_real_processes(here: Path, command: str, part: str) -> None:
    before = files(here)
    result = script(command, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="0", HF_HOME=str(here / "empty"))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert part in result.stderr
    shutil.rmtree(here / "empty")
    (here / "empty").mkdir()
    assert files(here) == before


def test_debug_shows_the_traceback(here: Path) -> None:
    result = run("ln-remove --model ./nonsense --debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: no such directory")


# ------------------------------------------------------------------------------------------ interruption and resuming


def interrupted_at(monkeypatch: pytest.MonkeyPatch, label: str) -> list[str]:
    """Make the training with this label end in Ctrl-C before it begins; the labels of all that begin are noted."""
    real = context.open_session
    begun: list[str] = []

    def open_session(*args: Any, **kwargs: Any) -> Any:
        begun.append("control" if kwargs["removal"] is None else "removal")
        if begun[-1] == label:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(context, "open_session", open_session)
    return begun


def test_a_finished_run_shows_its_results_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = interrupted_at(monkeypatch, "none")
    before = files(here)
    written = json.loads((here / "run" / "results.json").read_text(encoding="utf-8"))
    assert json.loads(done("ln-remove --control --out run --resume --questions none --json").stdout) == written
    assert json.loads(done(f"{REMOVE} --set training.checkpoint_every=3 --out run --resume --json").stdout) == written
    assert "LN-free model: run/model" in done("ln-remove --out run --resume").stdout
    assert begun == [] and files(here) == before


def test_a_run_interrupted_in_its_control_goes_on_there(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = f"{REMOVE} --control --set training.checkpoint_every=3 --out again"
    with monkeypatch.context() as patch:
        interrupted_at(patch, "control")
        stopped = run(command)
    assert stopped.exit_code == 130
    told = stopped.stderr.splitlines()[-1]
    assert told == f"stopped by Ctrl-C: again/tokens and again/model are kept; continue with: {command} --resume"
    assert (copied / "again" / "model").is_dir() and not (copied / "again" / "results.json").exists()
    before = files(copied / "again" / "model")
    begun = interrupted_at(monkeypatch, "none")
    results = json.loads(done(f"{command} --resume --json").stdout)
    assert begun == ["control"], "the removal was not trained again"
    after = files(copied / "again" / "model")
    assert after.items() >= before.items() and after.keys() - before.keys() == {"README.md"}
    uninterrupted = json.loads((copied / "run" / "results.json").read_text(encoding="utf-8"))
    for key in ("cross_entropy", "bits_per_byte", "gap"):
        assert results[key] == pytest.approx(uninterrupted[key], abs=1e-6)


def test_a_control_can_be_added_later(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied / "run" / "control")
    begun = interrupted_at(monkeypatch, "none")
    assert (
        json.loads(done("ln-remove --out run --resume --questions none --json").stdout)["cross_entropy"]["control"]
        is None
    )
    results = json.loads(done("ln-remove --control --out run --resume --questions none --json").stdout)
    assert begun == ["control"] and results["gap"] is not None
    # From now on it is scored, asked for or not.
    (copied / "run" / "results.json").unlink()
    assert json.loads(done("ln-remove --out run --resume --questions none --json").stdout)["gap"] == pytest.approx(
        results["gap"]
    )


def test_a_run_interrupted_before_its_first_step_leaves_what_is_worth_keeping(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupted_at(patch, "removal")
        assert run(f"{REMOVE} --out again").exit_code == 130
    assert (copied / "again" / "tokens" / "index.json").exists(), "a long preparation would be lost"
    assert "already holds a run" in run(f"{REMOVE} --out again").stderr
    # Nothing has been trained, so the recipe may still change.
    done(f"{REMOVE} --set seed=5 --out again --resume")
    assert tomllib.loads((copied / "again" / "recipe.toml").read_text(encoding="utf-8"))["seed"] == 5
    assert "seed was 5, now 0" in run(f"{REMOVE} --out again --resume").stderr


def test_a_mistake_found_after_a_long_preparation_does_not_lose_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "CHEAP_TOKENS", 0)
    assert "names the source" in run(f"{REMOVE} --set data.weights.web=2 --out again").stderr
    index = copied / "again" / "tokens" / "index.json"
    before = index.stat().st_mtime_ns
    done(f"{REMOVE} --out again --resume")
    assert index.stat().st_mtime_ns == before


def test_a_trained_run_keeps_its_tokens_whatever_becomes_of_the_corpus(copied: Path) -> None:
    shutil.rmtree(copied / "texts")
    (copied / "run" / "results.json").unlink()
    before = json.loads((copied / "run" / "tokens" / "index.json").read_text(encoding="utf-8"))
    shutil.rmtree(copied / "run" / "model")
    done("ln-remove --out run --resume --questions none")
    assert json.loads((copied / "run" / "tokens" / "index.json").read_text(encoding="utf-8")) == before


def damage(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def test_a_damaged_checkpoint_is_passed_over(copied: Path) -> None:
    run_state = copied / "run" / "state"
    damage(run_state / "step-000006")
    shutil.rmtree(copied / "run" / "model")
    results = json.loads((copied / "run" / "results.json").read_text(encoding="utf-8"))
    resumed = done("ln-remove --out run --resume --questions none --json")
    assert (
        "warning: run/state/step-000006 is damaged (model.safetensors does not match its checksum); going on from "
        "run/state/step-000003 instead"
    ) in resumed.stderr
    assert json.loads(resumed.stdout)["cross_entropy"] == pytest.approx(results["cross_entropy"], abs=1e-5)


def test_a_run_of_version_0_1_goes_on(copied: Path) -> None:
    """It wrote the defaults of options that are gone now."""
    file = copied / "run" / "recipe.toml"
    text = file.read_text(encoding="utf-8")
    text = text.replace("[schedule]\n", '[schedule]\nlayers = "first to last"\nconstant = "mean"\n')
    gone = "rewarm_steps = 0\ndistillation_until = 1.0\nresidual_matching = 0.0\n"
    file.write_text(text.replace("[training]\n", f"[training]\n{gone}"), encoding="utf-8")
    results = json.loads((copied / "run" / "results.json").read_text(encoding="utf-8"))
    shutil.rmtree(copied / "run" / "model")
    for command in ("ln-remove --out run --resume --questions none --json", "ln-evaluate run --json"):
        found = json.loads(done(command).stdout)["cross_entropy"]
        assert found == pytest.approx(results["cross_entropy"], abs=1e-5)
    done("ln-export run --out new")
    done("ln-report run")
    assert gone in file.read_text(encoding="utf-8"), "a run that is resumed keeps its recipe as it is"


def test_damaged_checkpoints_only(copied: Path) -> None:
    for checkpoint in (copied / "run" / "state").iterdir():
        damage(checkpoint)
    shutil.rmtree(copied / "run" / "model")
    before = files(copied)
    for command in ("ln-remove --out run --resume --questions none", "ln-export run --out new"):
        result = run(command)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith("error: ") and "no whole checkpoint is left" in result.stderr
        assert files(copied) == before


# -------------------------------------------------------------------------------------------------- what is put out


def test_tokens_named_by_the_user_are_found_again(copied: Path) -> None:
    done("ln-prepare texts --tokenizer model --out elsewhere")
    command = f"{REMOVE} --set data.corpus=openwebtext --tokens elsewhere --out again"
    results = json.loads(done(f"{command} --json").stdout)
    recipe = tomllib.loads((copied / "again" / "recipe.toml").read_text(encoding="utf-8"))
    assert recipe["data"]["corpus"] == str(copied / "texts"), "the recipe names what was trained on"
    assert results["settings"]["data"] == f"{copied / 'texts'}, validation split"
    scored = json.loads(done("ln-evaluate again --json").stdout)
    assert scored["cross_entropy"] == pytest.approx(results["cross_entropy"], abs=1e-6)
    assert scored["settings"] == results["settings"]
    shutil.rmtree(copied / "again" / "model")
    assert json.loads(done(f"{command} --resume --json").stdout)["tokens"] == results["tokens"]
    assert "data.corpus was" in run("ln-remove --out again --resume --tokens tokens").stderr


def test_a_run_is_named_after_its_model(copied: Path) -> None:
    assert "checkpoints/model/model" in done(REMOVE).stdout.replace("\n", "")
    assert (copied / "checkpoints" / "model" / "results.json").is_file()


def test_json_is_all_there_is_on_standard_output(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    shown = json.loads(done(f"ln-evaluate run --json --out {out}").stdout)
    assert shown == json.loads(out.read_text(encoding="utf-8"))
    prepared = json.loads(done(f"ln-prepare texts --tokenizer model --out {tmp_path / 'tokens'} --json").stdout)
    data = TokenDataset.open(tmp_path / "tokens")
    assert prepared["train"]["tokens"] == data.split("train").tokens
    assert prepared["validation"]["documents"] == data.split("validation").documents


@pytest.mark.parametrize(
    ("source", "roles"),
    [
        ("run", {"original", "control", "ln_free"}),
        ("run/model", {"ln_free"}),
        ("run/stock", {"ln_free"}),
        ("run/control/model", {"control"}),
        ("model --tokens tokens --context 64", {"original"}),
    ],
)
def test_evaluating_a_run_or_a_part_of_it(here: Path, source: str, roles: set[str]) -> None:
    expected = json.loads((here / "run" / "results.json").read_text(encoding="utf-8"))
    found = json.loads(done(f"ln-evaluate {source} --json").stdout)
    assert {role for role, value in found["cross_entropy"].items() if value is not None} == roles
    for role in roles:
        assert found["cross_entropy"][role] == pytest.approx(expected["cross_entropy"][role], abs=1e-4)
        assert found["bits_per_byte"][role] == pytest.approx(expected["bits_per_byte"][role], abs=1e-4)


@pytest.mark.parametrize(("place", "source"), [("run", "model"), ("run/model", "."), ("run", ".")])
def test_evaluating_from_inside_a_run(world: Path, monkeypatch: pytest.MonkeyPatch, place: str, source: str) -> None:
    monkeypatch.chdir(world / place)
    if (place, source) == ("run", "."):  # its recipe says where the original is, seen from where it was begun
        source += f" --original {world / 'model'}"
    expected = json.loads((world / "run" / "results.json").read_text(encoding="utf-8"))
    found = json.loads(done(f"ln-evaluate {source} --json").stdout)
    assert found["cross_entropy"]["ln_free"] == pytest.approx(expected["cross_entropy"]["ln_free"], abs=1e-4)


def test_a_pretraining_run(copied: Path) -> None:
    architecture = "n_layer=1 n_head=2 n_embd=16 n_positions=32 vocab_size=300"
    settings = " ".join(f"--set architecture.{setting}" for setting in architecture.split())
    settings += " --set data.context=32 --set data.weights={} --set training.micro_batch=auto"
    command = (
        f"ln-pretrain {settings} --set data.corpus=texts --set training.tokens_per_step=256 --steps 4 --out scratch"
    )
    figures = json.loads(done(f"{command} --json").stdout)
    assert (copied / "scratch" / "model" / "README.md").is_file()
    scored = json.loads(done("ln-evaluate scratch --json").stdout)
    assert scored["models"] == {"original": "scratch/model", "control": None, "ln_free": None}
    assert scored["cross_entropy"]["original"] == pytest.approx(figures["cross_entropy"], abs=1e-4)
    assert "with its LayerNorms" in run("ln-export scratch --out new").stderr
    again = json.loads(done(f"{command} --resume --json").stdout)
    assert again["cross_entropy"] == pytest.approx(figures["cross_entropy"], abs=1e-6)
    # Its tokens serve another run, which takes their tokenizer.
    given = command.replace("--set data.corpus=texts", "--tokens scratch/tokens --set data.tokenizer=scratch/tokenizer")
    other = json.loads(done(f"{given.replace('--out scratch', '--out second')} --json").stdout)
    assert other["cross_entropy"] == pytest.approx(figures["cross_entropy"], abs=1e-6)


def test_unfinished_tokens_of_another_process_stay(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "train-local-00000.bin").write_bytes(b"in the making")
    with (tmp_path / "prepare.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_directory.remove_unfinished_tokens(tmp_path)
        assert (tmp_path / "train-local-00000.bin").exists()
    run_directory.remove_unfinished_tokens(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.parametrize(
    "keep",
    [
        lambda out: (out / "metrics.jsonl").write_text("{}\n"),
        lambda out: (out / "state" / "step-000001").mkdir(parents=True),
        lambda out: (out / "notes.txt").write_text("of the user"),
    ],
)
def test_what_a_failed_run_leaves(tmp_path: Path, keep: Callable[[Path], Any]) -> None:
    def fail(out: Path, leave: Callable[[Path], Any]) -> None:
        with run_directory.run_directory(out, "seed = 0\n", with_defaults=dict, resume=False):
            (out / "tokens").mkdir()
            leave(out)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "a" / "b", lambda out: None)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "kept", keep)
    assert any((tmp_path / "kept").iterdir())


def test_what_to_type_after_a_command_of_a_group(copied: Path) -> None:
    from ln_removal.cli import console

    assert run("ln-analyze entropy run --json").exit_code == 2  # it was not observed
    assert console._to_type("entropy", resumes=False) == "ln-analyze entropy run --json"
    assert run("ln-report nowhere").exit_code == 2
    assert console._to_type("report", resumes=False) == "ln-report nowhere"
