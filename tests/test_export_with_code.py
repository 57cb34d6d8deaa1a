"""An LN-free model saved with its modelling file loads where ln-removal is not installed."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from command_line import environment, fork_code
from disarmed_model import disarm
from safetensors.torch import load_file, save_file
from small_model import write_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from typer.testing import CliRunner

from ln_removal import NormFreeGPT2LMHeadModel, from_disarmed
from ln_removal.cli.export import app
from ln_removal.models import normfree_gpt2, normfree_rotary

IDS = torch.randint(0, 320, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LN-free model as `ln-remove` leaves it."""
    place = write_model(tmp_path_factory.mktemp("source"))
    model = from_disarmed(disarm(GPT2LMHeadModel.from_pretrained(place)))
    with torch.no_grad():
        model.lm_head.bias.normal_()
    model.save_pretrained(place)
    return place


def export(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export(source, "--with-code", "--out", out)
    return out


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ln_removal", "wrapt"):
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import ln_removal
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("ln_removal can be imported")
"""


def run_without_us(code: str, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code where ln_removal cannot be imported, with a cache of its own for the code that transformers copies."""
    return fork_code(BLOCKED + code, *map(str, arguments), cwd=home, environment=environment(HF_HOME=str(home)))


def test_loads_with_trust_remote_code_in_a_process_without_us(source: Path, exported: Path, tmp_path: Path) -> None:
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    code = """
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

place, ids = sys.argv[1], load_file("ids.safetensors")["ids"]
print(type(AutoConfig.from_pretrained(place, trust_remote_code=True)).__name__)
model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True).eval()
print(type(model).__name__, type(model).__module__.split(".")[0], len([n for n, _ in model.named_parameters() if ".ln_" in n]))
generated = model.generate(ids[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
save_file({"logits": model(ids).logits.detach(), "generated": generated}, "out.safetensors")
model.save_pretrained("again")
print(sorted(name for name in sys.modules if name.partition(".")[0] == "ln_removal"))
"""
    done = run_without_us(code, tmp_path, exported)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines == ["NormFreeGPT2Config", "NormFreeGPT2LMHeadModel transformers_modules 0", "[]"]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    found = load_file(tmp_path / "out.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(IDS).logits, rtol=1e-5, atol=1e-6)
        expected = model.generate(IDS[:, :4], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(found["generated"], expected)
    # What such a user saves again still carries the code.
    assert list((tmp_path / "again").glob("*.py"))


class TestDirectory:
    def test_what_is_in_it(self, exported: Path) -> None:
        written = (exported / "modeling_normfree_gpt2.py").read_text()
        assert written == Path(normfree_gpt2.__file__).read_text(), "the file itself, not a second copy of it"
        config = json.loads((exported / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "modeling_normfree_gpt2.NormFreeGPT2Config",
            "AutoModelForCausalLM": "modeling_normfree_gpt2.NormFreeGPT2LMHeadModel",
        }
        assert config["model_type"] == "normfree_gpt2" and config["architectures"] == ["NormFreeGPT2LMHeadModel"]

    def test_with_us_the_installed_class_is_used(self, exported: Path) -> None:
        for trust in (False, None):
            model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=trust)
            assert type(model) is NormFreeGPT2LMHeadModel

    def test_exported_again_without_the_code(self, exported: Path, tmp_path: Path) -> None:
        export(exported, "--out", tmp_path / "plain")
        assert not list((tmp_path / "plain").glob("*.py"))
        assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
        export(exported, "--format", "stock", "--out", tmp_path / "stock")
        assert "auto_map" not in json.loads((tmp_path / "stock" / "config.json").read_text())

    def test_the_stock_form_needs_none(self, source: Path, tmp_path: Path) -> None:
        arguments = [str(source), "--format", "stock", "--with-code", "--out", str(tmp_path / "out")]
        result = CliRunner().invoke(app, arguments)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "the stock form needs no code of its own" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", [normfree_gpt2, normfree_rotary])
def test_the_file_imports_only_torch_transformers_and_the_standard_library(module: ModuleType) -> None:
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    top = {name.partition(".")[0] for name in imported}
    assert top <= {"torch", "transformers", *sys.stdlib_module_names}
    # transformers would copy relative imports along, and there are none
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
