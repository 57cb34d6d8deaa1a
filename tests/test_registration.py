"""`import ln_removal` is light, and makes transformers know the LN-free model in any order of imports.

Each case is a process of its own: what is imported, and in which order, is the point.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import forked_code, run_code

from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LN-free model on disk."""
    directory = tmp_path_factory.mktemp("normfree")
    config = NormFreeGPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    NormFreeGPT2LMHeadModel(config).save_pretrained(directory)
    return directory


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys, ln_removal
heavy = {"torch", "transformers", "numpy", "pydantic", "datasets", "wandb", "matplotlib"} & set(sys.modules)
print(sorted(heavy), "install" in dir(ln_removal), ln_removal.UserError.__name__, "torch" in sys.modules)
"""
    assert run_code(code) == "[] True UserError False"


LOAD = """
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model).__module__, type(model).__name__)
"""
FIRST_LINES = {
    "ln_removal first": "import ln_removal\nfrom transformers import AutoModelForCausalLM",
    "auto classes first": "from transformers import AutoModelForCausalLM, GPT2LMHeadModel\nimport ln_removal",
    "gpt2 after": "import ln_removal\nfrom transformers import GPT2Config, GPT2LMHeadModel, AutoModelForCausalLM",
    "surgery first": "from ln_removal import install\nfrom transformers import pipeline, AutoModelForCausalLM",
}


@pytest.mark.slow
@pytest.mark.parametrize("order", FIRST_LINES)
def test_auto_classes_load_a_saved_model_in_every_order(saved: Path, order: str) -> None:
    found = forked_code(FIRST_LINES[order] + LOAD, str(saved))
    assert found == f"{NormFreeGPT2LMHeadModel.__module__} NormFreeGPT2LMHeadModel"


def test_configurations_get_the_class_they_are_for(saved: Path) -> None:
    code = """
import sys, ln_removal
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
for config in (AutoConfig.from_pretrained(sys.argv[1]), GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=50257)):
    print(type(config).__name__, type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert forked_code(code, str(saved)).splitlines() == [
        "NormFreeGPT2Config NormFreeGPT2LMHeadModel",
        "GPT2Config GPT2LMHeadModel",
    ]
