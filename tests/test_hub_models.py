"""Loading models and tokenizers from a Hub on localhost, in a client process; and what is wrong with some of them."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from fake_hub import FakeHub, read_folder, run_client
from small_model import write_model
from transformers import GPT2LMHeadModel

from ln_removal.files.hub import first_answer
from ln_removal.models.loading import load_tokenizer

# Try loaders in the client's process and print what came out as one line of JSON.
PRELUDE = """
import json
from ln_removal.errors import UserError
from ln_removal.models.loading import load_config, load_model, load_tokenizer

def report(name, *loaders):
    result = {"name": name}
    try:
        for loader in loaders:
            loaded = loader(name)
        if loaders[-1] is load_model:
            weights = loaded.model.state_dict()
            result["sum"] = sum(weight.double().sum().item() for weight in weights.values())
            result["max_new_tokens"] = loaded.model.generation_config.max_new_tokens
            result["ids"] = loaded.tokenizer("def f(x): return x").input_ids
    except UserError as error:
        result["error"] = str(error)
    print(json.dumps(result), flush=True)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("original") / "model")


def sum_of_weights(folder: Path) -> float:
    return sum(weight.double().sum().item() for weight in GPT2LMHeadModel.from_pretrained(folder).state_dict().values())


def test_hub_models_load_and_what_is_wrong_with_them_is_named(original: Path, tmp_path: Path) -> None:
    files = read_folder(original)
    pickle_only = {"pytorch_model.bin": b"", **{key: data for key, data in files.items() if key != "model.safetensors"}}
    with FakeHub() as hub:
        files["generation_config.json"] = b'{"max_new_tokens": 7}'
        hub.add("models", "gpt2", {**files, "pytorch_model.bin": b"not asked for", "onnx/config.json": b"{}"})
        hub.add("models", "some/tokenizer", {key: data for key, data in files.items() if "token" in key})
        hub.add("models", "some/closed", files, gated=True)
        hub.add("models", "some/pickle", pickle_only)
        hub.add("models", "some/corrupt", {**files, "model.safetensors": files["model.safetensors"][:-50]})
        hub.add("models", "some/llama", {**files, "config.json": b'{"model_type": "llama"}'})
        code = PRELUDE + (
            'report("gpt2", load_config, load_tokenizer, load_model)\n'
            'report("some/tokenizer", load_tokenizer)\n'
            'for name in ("some/closed", "some/nothing", "some/pickle", "some/corrupt", "some/llama"):\n'
            "    report(name, load_model)\n"
        )
        done = run_client(code, hub.endpoint, tmp_path)
        asked = [path for _, path, _ in hub.requests]
        offline = run_client(
            PRELUDE + 'report("gpt2", load_config, load_tokenizer)\nreport("some/other", load_config)\n',
            hub.endpoint,
            tmp_path,
            HF_HUB_OFFLINE="1",
        )
    assert done.returncode == 0, done.stderr
    results = {result["name"]: result for result in map(json.loads, done.stdout.splitlines())}
    assert results["gpt2"]["sum"] == pytest.approx(sum_of_weights(original))
    assert results["gpt2"]["max_new_tokens"] == 7
    assert results["gpt2"]["ids"] == load_tokenizer(str(original))("def f(x): return x").input_ids
    assert "error" not in results["some/tokenizer"]
    assert not any(path.endswith(("gpt2/resolve/main/pytorch_model.bin", "onnx/config.json")) for path in asked)
    for name, parts in {
        "some/closed": ["some/closed", "hf auth login"],
        "some/nothing": ["some/nothing"],
        "some/pickle": ["pytorch_model.bin", "pickle"],
        "some/corrupt": ["model.safetensors"],
        "some/llama": ["llama"],
    }.items():
        for part in parts:
            assert part in results[name]["error"]

    cached, missing = map(json.loads, offline.stdout.splitlines())
    assert "error" not in cached
    assert "HF_HUB_OFFLINE" in missing["error"]


def test_no_network_fails_fast_and_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    code = PRELUDE + 'report("gpt2", load_model)\nreport("gpt2", load_config)\nreport("gpt2", load_tokenizer)\n'
    done = run_client(code, endpoint, tmp_path)
    advice = ["--model ./gpt2", "--model ./gpt2", "./gpt2"]
    for result, expected in zip(map(json.loads, done.stdout.splitlines()), advice, strict=True):
        assert "127.0.0.1" in result["error"] and "hf download gpt2" in result["error"]
        assert expected in result["error"]
    done = run_client(PRELUDE + 'report("owner/name", load_config)\n', "http://no-such-host.invalid", tmp_path)
    assert "no-such-host.invalid" in json.loads(done.stdout)["error"]


@pytest.mark.slow
def test_a_network_that_swallows_packets_is_given_up_in_time(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)  # connections are accepted by the kernel and never answered
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        soon = "from ln_removal.files.hub import first_answer\nfirst_answer.__kwdefaults__['seconds'] = 1.0\n"
        done = run_client(PRELUDE + soon + 'report("gpt2", load_model)\n', endpoint, tmp_path, timeout=120)
    assert endpoint.removeprefix("http://").split(":")[0] in json.loads(done.stdout)["error"]


def test_first_answer_does_not_wait_for_a_request_that_hangs() -> None:
    answered = threading.Event()
    with pytest.raises(TimeoutError):
        first_answer(answered.wait, seconds=0.1)
    answered.set()
    assert first_answer(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        first_answer(lambda: 1 / 0)
