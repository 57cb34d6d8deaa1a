"""A model's code beside its weights, so that transformers loads an LN-free model where ln-removal is not installed.

transformers runs such a file only when the user passes trust_remote_code=True. With ln-removal imported it is not
needed, and what is loaded is the installed class.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from ln_removal.export import normfree_gpt2

MODULE = "modeling_normfree_gpt2"
"""Name of the file in a model's directory, without its ending; transformers' own spelling."""


def add_modelling_file(directory: Path) -> None:
    """Copy the source of `normfree_gpt2` into a saved LN-free model and name its classes in config.json.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / f"{MODULE}.py").write_text(inspect.getsource(normfree_gpt2), encoding="utf-8")
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": f"{MODULE}.{normfree_gpt2.NormFreeGPT2Config.__name__}",
        "AutoModelForCausalLM": f"{MODULE}.{normfree_gpt2.NormFreeGPT2LMHeadModel.__name__}",
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
