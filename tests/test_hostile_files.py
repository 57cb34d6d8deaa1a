"""Files made to do harm: what they carry is never run, and where they point is never followed.

Every payload would create a file named `ran` in the current directory.
"""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from command_line import done, refused
from safetensors.torch import load_file
from small_model import REMOVE

from ln_removal.data.tokens import TokenDataset
from ln_removal.errors import UserError
from ln_removal.evaluation.questions import Question, write_jsonl
from ln_removal.models.loading import load_config, load_model, load_tokenizer

PAYLOAD = "import pathlib; pathlib.Path('ran').write_text('harm')"


class Harmful:
    """Unpickled, it runs the payload."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (PAYLOAD,)


@pytest.fixture
def here(copied: Path) -> Path:
    write_jsonl([Question(0, "a", "b", "", "b", ("c", "d", "e", "f"), 0)], copied / "q.jsonl")
    return copied


def plant_pickles(directory: Path) -> None:
    """The payload under every name that some loader of a model directory might unpickle."""
    for name in (
        "pytorch_model.bin",
        "model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ):
        (directory / name).write_bytes(pickle.dumps(Harmful()))
    torch.save({"weight": Harmful()}, directory / "pytorch_model-00001-of-00001.bin", pickle_protocol=4)
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model-00001-of-00001.bin"}}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


# ------------------------------------------------------------------------------------------------------------- pickles

COMMANDS = {
    "remove": f"{REMOVE} --out new",
    "evaluate": "ln-evaluate model --tokens tokens --out new",
    "hellaswag": "evaluate-hellaswag model --data q.jsonl",
    "export": "ln-export run/model --out new",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_is_only_a_pickle_is_refused(here: Path, name: str) -> None:
    pickle.loads(pickle.dumps(Harmful()))
    (here / "ran").unlink()  # the payload does harm; otherwise this would show nothing
    for directory in (here / "model", here / "run" / "model"):
        (directory / "model.safetensors").unlink()
        plant_pickles(directory)
    line = refused(COMMANDS[name])
    assert "model.safetensors" in line and "pickle" in line
    assert not (here / "ran").exists() and not (here / "new").exists()


def test_pickles_beside_safetensors_are_left_alone(here: Path) -> None:
    plant_pickles(here / "model")
    loaded = load_model("model")
    expected = load_file(here / "model" / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(loaded.model.transformer.wte.weight, expected)
    plant_pickles(here / "run" / "model")
    done("ln-export run --out new")
    assert not any(path.suffix in (".bin", ".pt", ".pth") for path in (here / "new").iterdir())
    assert not (here / "ran").exists()


def test_a_pickle_under_the_name_of_safetensors(here: Path) -> None:
    (here / "model" / "model.safetensors").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model("model")
    assert not (here / "ran").exists()


def test_an_index_that_names_a_pickle(here: Path) -> None:
    plant_pickles(here / "model")
    (here / "model" / "model.safetensors").unlink()
    index = {"weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        load_model("model")
    assert not (here / "ran").exists()


def test_checkpoints_of_a_run_hold_no_pickles(here: Path) -> None:
    """A run's state is safetensors and JSON; a pickle put there is not read."""
    from ln_removal.training.checkpoint import load_newest

    shutil.rmtree(here / "run" / "state")
    state = here / "run" / "state" / "step-000010"
    state.mkdir(parents=True)
    for name in ("trainer.json", "model.safetensors", "optimizer-0.safetensors"):
        (state / name).write_bytes(pickle.dumps(Harmful()))
    plant_pickles(state)
    with pytest.raises(UserError, match="step-000010"):
        load_newest(here / "run" / "state", load_model("model").model, None)
    assert not (here / "ran").exists()


# ------------------------------------------------------------------------------------------------------ path traversal

OUTSIDE = [
    "../secret.safetensors",
    "/etc/secret.safetensors",
    "x/../../secret.safetensors",
    "..",
    ".",
    "sub/w.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_shard_index_may_not_point_elsewhere(here: Path, name: str) -> None:
    shutil.copy(here / "model" / "model.safetensors", here / "secret.safetensors")
    (here / "model" / "sub").mkdir()
    (here / "model" / "model.safetensors").rename(here / "model" / "sub" / "w.safetensors")
    index = {"weight_map": {"transformer.wte.weight": name}}
    (here / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="do not use this model"):
        load_model("model")


@pytest.mark.parametrize("name", ["../secret.bin", "/etc/passwd", "x/../../secret.bin", "..", "", "sub/a.bin"])
def test_a_token_index_may_not_point_elsewhere(here: Path, name: str) -> None:
    index = json.loads((here / "tokens" / "index.json").read_text())
    shard = here / "tokens" / index["shards"][0]["file"]
    (here / "tokens" / "sub").mkdir()
    shutil.copy(shard, here / "secret.bin")
    shard.rename(here / "tokens" / "sub" / "a.bin")
    index["shards"][0]["file"] = name
    (here / "tokens" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="index"):
        TokenDataset.open(here / "tokens")


@pytest.mark.parametrize("name", ["../victim.bin", "/tmp/victim.bin"])
def test_an_unfinished_preparation_may_not_write_elsewhere(here: Path, name: str) -> None:
    """progress.json says which shards to go on with, and cuts them to its lengths: it must not reach other files."""
    victim = here / "victim.bin"
    victim.write_bytes(b"precious" * 100)
    index = json.loads((here / "tokens" / "index.json").read_text())
    index["shards"][0].update(file=name, sha256="", tokens=1)
    (here / "tokens" / "index.json").unlink()
    (here / "tokens" / "progress.json").write_text(json.dumps({"consumed": 1, "index": index}))
    assert "progress.json" in refused("ln-prepare texts --tokenizer model --out tokens")
    assert victim.read_bytes() == b"precious" * 100


# --------------------------------------------------------------------------------------------------------- remote code


def plant_code(directory: Path) -> None:
    """Modelling, configuration and tokenizer code in the directory, and configurations that ask for it."""
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (directory / name).write_text(PAYLOAD + "\nclass Evil: ...\n")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def test_code_in_a_model_directory_is_never_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: object) -> str:
        raise AssertionError("the user was asked whether to trust code")

    monkeypatch.setattr("builtins.input", asked)
    plant_code(here / "model")
    plant_code(here / "run" / "model")
    assert load_config("model").n_layer == 2
    assert len(load_tokenizer("model")) == 320
    assert type(load_model("model").model).__module__.startswith("transformers.models.gpt2.")
    assert type(load_model("run/model").model).__module__ == "ln_removal.models.normfree_gpt2"
    done("evaluate-hellaswag model --data q.jsonl --json")
    assert not (here / "ran").exists()


def test_a_tokenizer_that_exists_only_as_code_is_refused(here: Path) -> None:
    plant_code(here / "model")
    tokenizer = json.loads((here / "model" / "tokenizer_config.json").read_text())
    (here / "model" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "tokenizer_class": "Evil"}))
    try:
        load_tokenizer("model")
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either is fine: refused, or read as the plain tokenizer it also is)
    assert not (here / "ran").exists()


def test_a_model_class_that_exists_only_as_code_is_refused(here: Path) -> None:
    plant_code(here / "model")
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps({**config, "model_type": "evil"}))
    with pytest.raises(UserError, match="evil"):
        load_model("model")
    assert not (here / "ran").exists()


def test_a_chat_template_is_not_run_by_loading(here: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch ran') }}"
    tokenizer = json.loads((here / "model" / "tokenizer_config.json").read_text())
    (here / "model" / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": template}))
    load_model("model")
    assert not (here / "ran").exists()


def test_an_adapter_may_not_put_another_model_in_place(here: Path) -> None:
    """With the package peft installed, transformers would load the model that the adapter names."""
    adapter = {"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}
    (here / "model" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_model("model")
