"""The wheel: what is in it, and that it works installed elsewhere, without the checkout."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = (
    *("ln_removal", "recipes", "checkpoints/tiny-gpt2"),
    *("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"),
)

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"{command} left with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing behind and sees no leftovers."""
    copy = tmp_path_factory.mktemp("source")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, out: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", out, source),
        cwd=out,
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bin directory of a fresh environment with the wheel, and the dependencies of the environment of these tests."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    libraries = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel),
        cwd=place,
    )
    # A plain .pth adds a directory and runs none of the .pth files in it, so our editable installation stays out.
    (libraries / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    yield place / "bin"
    shutil.rmtree(place)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_package_recipes_and_embedded_model(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ln_removal").rglob("*")
        if path.suffix in (".py", ".typed", ".html", ".css")
    }
    recipes = ROOT / "recipes"
    expected |= {f"ln_removal/_recipes/{path.relative_to(recipes).as_posix()}" for path in recipes.rglob("*.toml")}
    assert "ln_removal/_recipes/normfree/table.toml" in expected
    expected |= {
        f"ln_removal/_checkpoints/tiny-gpt2/{path.name}" for path in (ROOT / "checkpoints/tiny-gpt2").iterdir()
    }
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


def test_source_distribution_gives_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    assert contents(build_wheel(archive, tmp_path)) == contents(wheel)


def test_incomplete_checkout_is_not_packaged(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source", ignore=shutil.ignore_patterns("config.json", "build", "*.egg-info"))
    with pytest.raises(AssertionError, match=r"tiny-gpt2/config\.json is missing"):
        build_wheel(tmp_path / "source", tmp_path)


def test_every_command_is_installed(installed: Path, tmp_path: Path) -> None:
    for script in PROJECT["scripts"]:
        assert run(installed / script, "--version", cwd=tmp_path) == f"ln-removal {PROJECT['version']}\n"


def test_removal_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import ln_removal; print(ln_removal.__file__)", cwd=tmp_path)
    assert not Path(where).is_relative_to(ROOT)
    # The embedded model and its recipe are found; there is little text to read, to train on and to score.
    few = ("data.context=64", "data.max_bytes=100000", "data.validation_tokens=2048", "training.evaluation_tokens=2048")
    sets = [part for each in (*few, "training.tokens_per_step=1024") for part in ("--set", each)]
    given = ("--model", "tiny", "--steps", "4", "--out", "x", "--json", "--questions", "none", *sets)
    results = json.loads(run(installed / "ln-remove", *given, cwd=tmp_path))
    assert results == json.loads((tmp_path / "x" / "results.json").read_text(encoding="utf-8"))
    assert results["cross_entropy"]["control"] is None and math.isfinite(results["cross_entropy"]["ln_free"])
    assert (tmp_path / "x" / "model" / "README.md").is_file() and (tmp_path / "x" / "stock").is_dir()
