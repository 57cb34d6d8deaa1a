"""The calls for a lent GPU (benchmarks/gpu): what is run again, what is skipped and when it stops; and that a copy of the tracked files
runs in an environment without the packages that such a machine lacks.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import venv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"))

from call import Call, earlier_results
from plan import GPU as FULL
from plan import LIMITS, Part, parts_of

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ("pydantic", "pydantic_core", "annotated_types", "typing_inspection", "tomli_w")
ABSENT = (*CARRIED, "datasets", "wandb", "transformer_lens", "ln_removal")
DEVICE = {"gpu": "H100", "gib": 75}


def made(name: str, work: Path, then: str = "", **settings: Any) -> Part:
    """A part that writes its JSON with the number of its runs, and then does something more."""
    code = (
        "import json, pathlib, sys, time\n"
        f"file = pathlib.Path({str(work / name)!r} + '.json')\n"
        "runs = json.loads(file.read_text())['runs'] if file.exists() else 0\n"
        f"file.write_text(json.dumps({{'runs': runs + 1}}))\n{then}\n"
    )
    return Part(name, ("-c", code), **{"seconds": 0, **settings})


def call(work: Path, *parts: Part, limit: float = 60, device: dict[str, Any] = DEVICE) -> tuple[bool, dict[str, Any]]:
    """Run a call; whether all ended well, and results.json."""
    out = work / "out"
    out.mkdir(exist_ok=True)
    well = Call("speed", list(parts), work, out, limit, time.monotonic(), device).run()
    found = json.loads((out / "results.json").read_text())
    assert found == json.loads((work / "results.json").read_text())
    return well, found["parts"]


def test_a_call_again_runs_only_what_has_not_ended_well(tmp_path: Path) -> None:
    fails = made("b", tmp_path, f"sys.exit(json.loads(file.read_text())['runs'] < 2 and {'no memory'!r})")
    well, parts = call(tmp_path, made("a", tmp_path), fails)
    assert not well and parts["a"]["state"] == "done" and parts["b"]["state"] == "failed"
    assert "no memory" in parts["b"]["log"]
    well, parts = call(tmp_path, made("a", tmp_path), fails)
    assert well and parts["a"]["result"] == {"runs": 1} and parts["b"]["result"] == {"runs": 2}

    retried = made("e", tmp_path, "sys.exit('smaller' not in sys.argv)", retry=("smaller",))
    assert call(tmp_path, retried)[1]["e"]["result"] == {"runs": 2}, "in the same call"

    broken = Part("c", ("-c", f"open({str(tmp_path / 'c.json')!r}, 'w').write('{{')"), 0)
    assert call(tmp_path, broken)[1]["c"]["why"] == "has not written c.json"
    (tmp_path / "weights").touch()
    whole = made("d", tmp_path, leaves=(tmp_path / "weights",))
    call(tmp_path, whole)
    (tmp_path / "weights").unlink()
    assert call(tmp_path, whole)[1]["d"]["why"] == f"has not written {[str(tmp_path / 'weights')]}", "it ran again"


def test_results_are_taken_to_another_machine_of_the_kind_and_to_no_other(tmp_path: Path) -> None:
    there, here, other = (tmp_path / name for name in ("there", "here", "other"))
    for place in (there, here, other):
        place.mkdir()
    half = "sys.exit(json.loads(file.read_text())['runs'] < 2)"
    call(there, made("a", there), made("b", there, half))
    for place in (here, other):
        shutil.copy(there / "results.json", place)
    _, parts = call(here, made("a", here), made("b", here, half))
    assert parts["a"]["result"] == {"runs": 1} and not (here / "a.json").exists()
    assert parts["b"]["result"] == {"runs": 2}, "it goes on with what the other machine had"
    _, parts = call(other, made("a", other), device={"gpu": "NVIDIA H200", "gib": 135})
    assert parts.keys() == {"a"} and (other / "results-H100.json").exists()
    assert earlier_results(other, DEVICE)["parts"] == {}


def test_what_does_not_fit_into_time_or_memory_is_skipped_with_its_reason(tmp_path: Path) -> None:
    large = made("large", tmp_path, memory=100)
    slow = made("slow", tmp_path, seconds=500)
    blind = made("blind", tmp_path, needs=(tmp_path / "tokens",))
    well, parts = call(tmp_path, made("a", tmp_path), large, slow, blind, made("b", tmp_path, after=("large",)))
    assert not well
    assert {name: part["state"] for name, part in parts.items()} == {
        "a": "done",
        "large": "skipped",
        "slow": "skipped",
        "blind": "skipped",
        "b": "done",
    }
    assert "100 GiB" in parts["large"]["why"] and "75" in parts["large"]["why"]
    assert "500" in parts["slow"]["why"] and str(tmp_path / "tokens") in parts["blind"]["why"]


def test_parts_share_the_gpu_as_far_as_its_memory_reaches(tmp_path: Path) -> None:
    stamp = "begun = time.time(); time.sleep(0.6); file.write_text(json.dumps([begun, time.time()]))"
    two, half = (made(name, tmp_path, stamp, memory=30) for name in ("two", "half"))
    _, parts = call(tmp_path, two, half, made("full", tmp_path, stamp, memory=60))
    times = {name: part["result"] for name, part in parts.items()}
    assert times["full"][0] > max(times["two"][1], times["half"][1])


@pytest.mark.slow
def test_a_call_stops_its_parts_in_time_and_ends_what_they_started(tmp_path: Path) -> None:
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    pid = f"import os; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpgid(0)))"
    part = made("a", tmp_path, f"{child}; {stubborn}; {pid}; time.sleep(60)")
    began = time.monotonic()
    well, parts = call(tmp_path, part, made("b", tmp_path, after=("a",)), limit=12)
    assert time.monotonic() - began < 12
    assert not well and parts["a"]["state"] == "stopped" and parts["b"]["state"] == "skipped"
    assert parts["a"]["result"] == {"runs": 1}, "what it wrote before is kept"
    group = (tmp_path / "pid").read_text()
    time.sleep(0.2)
    left = [stat for stat in Path("/proc").glob("[0-9]*/stat") if in_group(stat, group)]
    assert not left


def in_group(stat: Path, group: str) -> bool:
    """Whether a process that is not a zombie belongs to a process group."""
    try:
        state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return False
    return pgrp == group and state != "Z"


@pytest.mark.parametrize("name", list(LIMITS))
def test_the_plans_are_whole(name: str, tmp_path: Path) -> None:
    """Parts wait for parts before them only, and files that they need are made by one before or carried."""
    before: dict[str, Part] = {}
    made_before = {path for part in parts_of("removal", FULL, tmp_path) for path in part.leaves}
    for part in parts_of(name, FULL, tmp_path):
        assert set(part.after) <= before.keys() | {"pretrain"}
        for path in part.needs:
            assert path in made_before or path.parent == Path("benchmarks/gpu/carried")
        if part.command[0] != "-m":
            assert (ROOT / part.command[0]).is_file()
        before[part.name] = part


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, and the carried packages as links to the installed ones."""
    tree = tmp_path_factory.mktemp("bare") / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():  # not if it was just deleted
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    link_packages(CARRIED, tree / "benchmarks/gpu/carried/site")
    return tree


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose environment has the packages of packages.txt and what they need, and no other."""
    place = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(symlinks=True).create(place)
    (site,) = place.glob("lib/python*/site-packages")
    link_packages(needed((ROOT / "benchmarks/gpu/packages.txt").read_text()), site)
    return place / "bin" / "python"


def needed(requirements: str) -> set[str]:
    """The packages named and those that they require, as far as they are installed; without what a lent machine lacks."""
    found: set[str] = set()
    waiting = [re.split(r"[=<>]", line)[0] for line in requirements.splitlines() if line and line[0] != "#"]
    while waiting:
        name = re.sub(r"[-.]", "_", waiting.pop()).lower()
        if name in found or name in ABSENT:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting += [match[0] for line in requires if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]
    return found


def link_packages(names: Iterable[str], site: Path) -> None:
    """Links in `site` to everything that the named packages installed."""
    site.mkdir(parents=True, exist_ok=True)
    for name in names:
        files = importlib.metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if not (site / top).exists():
                (site / top).symlink_to(source)


def run(python: Path, *command: str, copy: Path, path: str = "") -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [str(python), *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_every_module_and_command_starts_without_the_packages_that_are_absent(python: Path, copy: Path) -> None:
    places = ("", "benchmarks", "benchmarks/gpu", "benchmarks/gpu/carried/site")
    path = os.pathsep.join(str(copy / place) for place in places)
    absent = [name for name in ABSENT if name not in (*CARRIED, "ln_removal")]
    code = f"""
import importlib, importlib.util, pkgutil
assert not [name for name in {absent} if importlib.util.find_spec(name)], "the environment has too much"
import ln_removal, pydantic
assert {str(copy)!r} in ln_removal.__file__ and "carried" in pydantic.__file__
for module in pkgutil.walk_packages(ln_removal.__path__, "ln_removal."):
    importlib.import_module(module.name)
for name in ("train_throughput", "stages", "removal", "parity", "profile_step", "growth", "contestants.ours"):
    importlib.import_module(name)
"""
    run(python, "-c", code, copy=copy, path=path)
    scripts = tomllib.loads((copy / "pyproject.toml").read_text())["project"]["scripts"].values()
    for module in sorted({script.partition(":")[0] for script in scripts}):
        assert "Usage" in run(python, "-m", module, "--help", copy=copy, path=path)


@pytest.mark.slow
def test_a_call_runs_from_a_plain_copy_with_nothing_installed(python: Path, copy: Path, tmp_path: Path) -> None:
    """Parity, and a preparation of tokens, through call.py; once more, neither is run."""
    tokenizer = copy / "benchmarks/gpu/carried/tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for file in (copy / "checkpoints/tiny-gpt2").glob("*token*"):
        shutil.copy(file, tokenizer)
    command = ("benchmarks/gpu/call.py", "speed", str(tmp_path), "--device", "cpu", "--seconds", "900", "--only")
    run(python, *command, "parity", "tokens", copy=copy)
    found = json.loads((tmp_path / "results.json").read_text())["parts"]
    parity, tokens = found["parity"]["result"], found["tokens"]
    assert parity["float32"]["logits"]["largest_difference"] < 1e-5
    assert tokens["state"] == "done" and tokens["result"]["train"]["tokens"] >= 600_000
    assert "parity done, was done before" in run(python, *command, "parity", "tokens", copy=copy)
