"""The scripts in examples/, each in a process of its own on a finished run, see the same model."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from command_line import ROOT, environment
from finished_run import make_run
from torch import Tensor

SCRIPTS = {"TransformerLens": "with_transformer_lens.py", "nnsight": "with_nnsight.py"}
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
    place = tmp_path_factory.mktemp("examples")
    run = make_run(place / "run")
    variables = {}
    for tool, script in SCRIPTS.items():
        words = [sys.executable, "-c", KEEP, str(ROOT / "examples" / script), str(run), str(place / tool), *NAMES]
        ended = subprocess.run(
            words, cwd=place, env=environment(), capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stderr
        assert "direct effect" in ended.stdout.splitlines()[-1]
        variables[tool] = torch.load(place / tool)
    return variables


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
