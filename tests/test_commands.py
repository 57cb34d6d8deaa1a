"""The commands as a user meets them: help, what is left behind, and going on after an interruption.

Most cases run in this process; where the process itself is the point (what it imports, the environment it reads), the
installed script runs. Mistakes are in test_bad_input.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import SCRIPTS, code_of, done, environment, fork_code, invoke, refused
from small_model import REMOVE
from typer.testing import CliRunner

from ln_removal.cli import console
from ln_removal.data.tokens import TokenDataset
from ln_removal.errors import UserError
from ln_removal.export import hub
from ln_removal.files import run_directory
from ln_removal.pipelines import context, cpu_time, publishing, removal

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


def script(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed script of a command."""
    name, *arguments = shlex.split(command)
    installed = Path(sys.executable).parent / name
    start = [str(installed)] if installed.exists() else [sys.executable, "-m", SCRIPTS[name].partition(":")[0]]
    return subprocess.run(
        [*start, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def files(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file below a directory, with its size and the time of its last change."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


# ------------------------------------------------------------------------------------------------ help, version, plan


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_light_and_has_an_example(name: str) -> None:
    shown = script(f"{name} --help", PYTHONPROFILEIMPORTTIME="1")
    assert shown.returncode == 0
    assert re.search(rf"Examples?:\n\s+{name} ", shown.stdout)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in shown.stderr.splitlines()}
    assert "typer" in imported, "the import log was not read"
    assert not imported & HEAVY
    assert re.fullmatch(r"ln-removal \d+\.\d+\.\d+\S*\n", done(f"{name} --version").stdout)


@pytest.mark.parametrize("name", ["ln-remove", "ln-pretrain"])
def test_examples_of_the_help_can_be_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_time, "measure", lambda *_: cpu_time.Speed(None, "not here"))
    shown = invoke(f"{name} --help").stdout
    examples = [line.strip() for line in shown.splitlines() if line.startswith(f"    {name} ")]
    planned = [line for line in examples if "--resume" not in line]
    assert len(planned) >= 2
    for line in planned:
        assert done(f"{line} --dry-run").stdout.strip()


def test_a_dry_run_needs_neither_network_nor_weights() -> None:
    """It measures passes through random weights, for two seconds instead of twenty."""
    code = f"from ln_removal.pipelines import cpu_time\ncpu_time.SECONDS_TO_MEASURE = 2\n{code_of('ln-remove')}"
    arguments = "--model gpt2 --set training.micro_batch=1 --dry-run --json --device cpu".split()  # fits into 4 GB
    shown = fork_code(code, *arguments, cwd=Path.cwd(), environment=environment(HF_HOME="/nowhere"))
    assert shown.returncode == 0, shown.stderr
    plan = json.loads(shown.stdout)
    schedule = {entry["site"]: entry["step"] for entry in plan["schedule"]}
    assert len(schedule) == 3 * 12 + 1 + 2
    assert all(isinstance(step, int) and 0 < step < plan["steps"] for step in schedule.values())
    complete = {entry["site"]: entry["step"] + entry["taper"] for entry in plan["schedule"]}
    assert (
        complete["ln_2.0"]
        < complete["ln_2.7"]
        < complete["ln_1_v.7"]
        < complete["ln_f"]
        < complete["eot"]
        == complete["first"]
    )
    assert plan["tokens"] == pytest.approx(500e6, rel=0.1)
    assert 3600 < plan["seconds_elsewhere"]["A100"] < plan["seconds"]


@pytest.mark.usefixtures("here")
def test_a_plan_on_a_cpu_says_how_long_the_run_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_time, "measure", lambda *_: cpu_time.Speed(1000.0, "as fast as that"))
        words = done("ln-remove --model gpt2 --dry-run --device cpu").stdout
    assert "524,288,000" in words and "tokens_per_step = 524288" in words and not Path("checkpoints/gpt2").exists()
    assert "6.1 days on cpu" in words and "as fast as that" in words and "H100" in words
    planned = json.loads(
        done("ln-remove --model model --steps 6 --set training.tokens_per_step=256 --dry-run --json").stdout
    )
    assert 0 < planned["seconds"] < 600


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("command", [f"{REMOVE} --out new", "ln-pretrain --out new", "ln-evaluate run"])
def test_cuda_without_cuda(here: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cpu" in refused(f"{command} --device cuda")
    assert not (here / "new").exists()


NOWHERE = "http://127.0.0.1:9"
"""A port that nothing listens on."""


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("ln-remove --model nonsense/model --out new", "nonsense/model"),
        ("ln-prepare openwebtext --tokenizer model --out new", "Skylion007/openwebtext"),
        ("ln-remove --recipe tiny --set data.contex=1 --out new", "data.context"),
    ],
)
def test_mistakes_of_processes(here: Path, tmp_path: Path, command: str, part: str) -> None:
    """One of them as installed."""
    before = files(here)
    settings = {"HF_ENDPOINT": NOWHERE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    name, *arguments = shlex.split(command)
    if "recipe" in command:
        result = script(command, **settings)
    else:
        result = fork_code(code_of(name), *arguments, cwd=here, environment=environment(**settings))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert part in result.stderr
    assert files(here) == before


def test_debug_shows_the_traceback(here: Path) -> None:
    result = invoke("ln-remove --model ./nonsense --debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_argument_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    arguments = ["nans"] if name == "ln-analyze" else []
    word = os.fsencode("caf") + b"\xe9" if name not in ("ln-remove", "ln-pretrain") else b"--out=caf\xe9"
    code = f"from {SCRIPTS[name].replace(':', ' import ')}; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, *arguments, word], cwd=tmp_path, capture_output=True, check=False
    )
    said = found.stderr.decode()
    assert (found.returncode, found.stdout) == (2, b"") and said.count("\n") == 1, said
    assert said.startswith("error: ") and "caf\\xe9'" in said and "utf-8" in said.lower()
    assert list(tmp_path.iterdir()) == []


def test_a_current_directory_that_is_no_text_or_gone_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / os.fsdecode(b"caf\xe9")
    place.mkdir()
    monkeypatch.chdir(place)
    assert "caf\\xe9'" in refused("ln-report run")
    place.rmdir()
    assert "current directory" in refused("ln-report run")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_output_cannot_show_is_replaced(here: Path, encoding: str) -> None:
    from ln_removal.cli.evaluate import app

    words = ["model", "--tokens", "tokens", "--prompt", "é — π"]
    shown = CliRunner(charset=encoding).invoke(app, words)
    assert shown.exit_code == 0, shown.exception
    assert ("é ? ?" if encoding == "latin-1" else "? ? ?") in shown.stdout
    shown = CliRunner(charset=encoding).invoke(app, [*words, "--json"])
    assert json.loads(shown.stdout)["continuations"][0]["prompt"] == "é — π"


@pytest.mark.parametrize("fails", ["", "publishing", "printing"])
def test_a_run_is_published_before_it_is_printed(here: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    done: list[str] = []

    def step(name: str, value: object = None) -> Callable[..., Any]:
        def made(*args: object, **options: object) -> object:
            done.append(name)
            if fails == name:
                raise UserError(f"no {name}")
            return value

        return made

    monkeypatch.setattr(removal, "remove", step("removal"))
    monkeypatch.setattr(hub, "check_target", step("check"))
    monkeypatch.setattr(
        publishing, "publish_run", step("publishing", hub.Published("there", "0123456789", is_new=True))
    )
    monkeypatch.setattr(console, "print_results", step("printing"))
    ended = invoke("ln-remove --model model --recipe tiny --out new --push-to-hub alice/x")
    assert done == ["check", "removal", "publishing", "printing"]
    assert ended.exit_code == (2 if fails else 0)
    assert ("published: there" in ended.stdout) == (not fails)


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
        stopped = invoke(command)
    assert stopped.exit_code == 130
    told = stopped.stderr.splitlines()[-1]
    assert "again/tokens" in told and "again/model" in told and told.endswith(f": {command} --resume")
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
        assert invoke(f"{REMOVE} --out again").exit_code == 130
    assert (copied / "again" / "tokens" / "index.json").exists(), "a long preparation would be lost"
    assert "already holds a run" in invoke(f"{REMOVE} --out again").stderr
    # Nothing has been trained, so the recipe may still change.
    done(f"{REMOVE} --set seed=5 --out again --resume")
    assert tomllib.loads((copied / "again" / "recipe.toml").read_text(encoding="utf-8"))["seed"] == 5
    assert "seed was 5, now 0" in invoke(f"{REMOVE} --out again --resume").stderr


def test_a_mistake_found_after_a_long_preparation_does_not_lose_it(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "CHEAP_TOKENS", 0)
    assert "names the source" in invoke(f"{REMOVE} --set data.weights.web=2 --out again").stderr
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
    (warning,) = [line for line in resumed.stderr.splitlines() if line.startswith("warning: ")]
    assert "step-000006" in warning and "step-000003" in warning
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
        assert "step-000003" in refused(command)
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
    assert "data.corpus was" in invoke("ln-remove --out again --resume --tokens tokens").stderr


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
    assert "with its LayerNorms" in invoke("ln-export scratch --out new").stderr
    again = json.loads(done(f"{command} --resume --json").stdout)
    assert again["cross_entropy"] == pytest.approx(figures["cross_entropy"], abs=1e-6)
    # Its tokens serve another run, which takes their tokenizer.
    given = command.replace("--set data.corpus=texts", "--tokens scratch/tokens --set data.tokenizer=scratch/tokenizer")
    other = json.loads(done(f"{given.replace('--out scratch', '--out second')} --json").stdout)
    assert other["cross_entropy"] == pytest.approx(figures["cross_entropy"], abs=1e-6)


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
