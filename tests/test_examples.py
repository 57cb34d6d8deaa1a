"""The scripts in examples/, each in a process of its own on a finished run, see the same model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from command_line import ROOT, environment
from finished_run import make_run
from torch import Tensor
from transformers import AutoModelForCausalLM

import ln_removal  # noqa: F401  (registers the model class)

SCRIPTS = {"TransformerLens": "with_transformer_lens.py", "nnsight": "with_nnsight.py"}
APART = {"saelens": "with_saelens.py", "circuit-tracer": "with_circuit_tracer.py"}
NAMES = ("tokens", "logits", "final", "heads", "direct", "cut", "ablated")

KEEP = """
import runpy, sys
import torch
script, run, kept, *names = sys.argv[1:]
sys.argv = [script, run]
found = runpy.run_path(script, run_name="__main__")
torch.save({name: found[name] for name in names}, kept)
"""
"""Runs a script as a user does, then writes what its variables hold."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The variables of each script after it has ended, and the lines that it printed, by tool."""
    if not importlib.util.find_spec("nnsight"):
        pytest.skip("nnsight is not installed")
    run = make_run(tmp_path_factory.mktemp("examples") / "run")
    return {tool: variables(sys.executable, script, run, NAMES) for tool, script in SCRIPTS.items()}


def variables(python: str, script: str, run: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """What the variables of a script hold after it has run on a run with the interpreter `python`."""
    kept = run.parent / f"{script}.pt"
    words = [python, "-c", KEEP, str(ROOT / "examples" / script), str(run), str(kept), *names]
    ended = subprocess.run(
        words, cwd=run.parent, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "without it" in ended.stdout.splitlines()[-1]
    return torch.load(kept)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_activations_are_the_same_in_both(found: dict[str, dict[str, Tensor]], name: str) -> None:
    one, other = (found[tool][name].double() for tool in SCRIPTS)
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 1e-5 * one.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("tool", SCRIPTS)
def test_a_head_without_its_path_is_its_direct_effect(found: dict[str, dict[str, Tensor]], tool: str) -> None:
    """The interventions took hold: the first changes a logit by the direct effect, the second also what later layers do."""
    values = {name: tensor.double() for name, tensor in found[tool].items()}
    token = int(values["logits"][0, -1].argmax())
    largest = values["direct"].flatten()[values["direct"].abs().argmax()]
    change = (values["logits"] - values["cut"])[0, -1, token]
    assert largest.abs() > 0 and (change - largest).abs() < 1e-3 * largest.abs()
    assert (values["cut"] - values["ablated"]).abs().max() > 1e-3 * largest.abs()


@pytest.mark.slow
@pytest.mark.parametrize("tool", APART)
def test_tools_with_an_environment_of_their_own(request: pytest.FixtureRequest, tmp_path: Path, tool: str) -> None:
    """They see the logits of our LN-free model, and a feature's direct effect is what the logit loses without it."""
    python = request.config.getoption(f"--{tool}-python")
    if python is None:
        pytest.skip(f"{tool} needs an environment of its own; name its interpreter with --{tool}-python")
    run = make_run(tmp_path / "run")
    found = variables(python, APART[tool], run, ("tokens", "logits", "total", "exact", "effect", "change"))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(run / "model")(torch.atleast_2d(found["tokens"])).logits
    assert (found["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert abs(found["effect"]) > 0 and found["change"] == pytest.approx(found["effect"], rel=1e-3, abs=1e-5)
    assert found["total"] == pytest.approx(found["exact"], rel=1e-4, abs=1e-4)
