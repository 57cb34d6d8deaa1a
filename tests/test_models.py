"""Loading models and tokenizers from directories. test_hub_models.py has those of the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import read_folder
from safetensors.torch import load_file, save_file
from small_model import tiny_neox, write_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ln_removal.data.encoder import train_code_tokenizer
from ln_removal.errors import UserError
from ln_removal.models.loading import check_tokenizer, load_config, load_model, load_tokenizer, tokenizer_fingerprint

VOCABULARY = 280


def make_tokenizer(text: str = "def f(x):\n    return x\n", size: int = VOCABULARY) -> PreTrainedTokenizerBase:
    return train_code_tokenizer([text] * 20, size, model_max_length=16)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with its tokenizer, as save_pretrained writes it, in float16."""
    folder = tmp_path_factory.mktemp("original") / "model"
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).half().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "model"
    copy.mkdir()
    for name, data in read_folder(original).items():
        (copy / name).write_bytes(data)
    return copy


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def message_of(action: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_loads_in_float32_and_evaluation_mode(folder: Path) -> None:
    loaded = load_model(str(folder))
    assert loaded.name == str(folder)
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer.decode(loaded.tokenizer("return x").input_ids) == "return x"
    ids = torch.tensor([loaded.tokenizer("def f(x):").input_ids])
    reference = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    torch.testing.assert_close(loaded.model(ids).logits, reference(ids).logits)


def test_dtype_is_what_was_asked_for(folder: Path) -> None:
    model = load_model(str(folder), dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_tiny_is_the_embedded_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ln_removal.files.resources

    monkeypatch.setattr(ln_removal.files.resources, "embedded_model_directory", lambda: folder)
    assert load_model("tiny").name == "tiny"
    assert load_config("tiny").n_layer == 2


def test_sharded_and_base_checkpoints_load(folder: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert not (folder / "model.safetensors").exists()
    weights = load_model(str(folder)).model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name

    model.transformer.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = load_model(str(tmp_path / "base")).model
    assert torch.equal(base.lm_head.weight, model.transformer.wte.weight)


def test_norm_free_exports_load(folder: Path) -> None:
    from ln_removal.models.norm_free import from_folded
    from ln_removal.models.normfree_gpt2 import NormFreeGPT2LMHeadModel
    from ln_removal.norms.surgery import fold, install

    model = load_model(str(folder)).model
    sites = install(model, eot_token_id=0)
    model.train()(torch.arange(12)[None])
    sites.update_running(0.0)
    for site in sites.sites:
        sites.set_mix(site, 1.0)
    for which in ("eot", "first"):
        sites.set_special(which, 1.0)
    exported = from_folded(load_config(str(folder)), fold(model))
    exported.save_pretrained(folder / "normfree")
    make_tokenizer().save_pretrained(folder / "normfree")
    loaded = load_model(str(folder / "normfree")).model
    assert isinstance(loaded, NormFreeGPT2LMHeadModel)
    ids = torch.arange(1, 10)[None]
    torch.testing.assert_close(loaded(ids).logits, exported.eval()(ids).logits)


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def large_file_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def shard_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {change(name): weight for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def only_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def lose_a_shard(folder: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    next(folder.glob("model-00002-*")).unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json"]),
        (lambda f: (f / "config.json").write_text("[]"), ["config.json", "no JSON object"]),
        (
            lambda f: edit_config(f, model_type="llama", architectures=["LlamaForCausalLM"]),
            ["llama", "LlamaForCausalLM"],
        ),
        (lambda f: edit_config(f, n_embd="wide"), ["n_embd"]),
        (lambda f: edit_config(f, n_head=3), ["n_embd", "n_head"]),
        (lambda f: edit_config(f, n_positions=32), ["wpe.weight", "(16, 8)", "(32, 8)"]),
        (lambda f: edit_config(f, n_layer=3), ["transformer.h.2."]),
        (lambda f: edit_config(f, n_layer=0), ["n_layer"]),
        (lambda f: edit_config(f, n_embd=-8), ["n_embd"]),
        (lambda f: edit_config(f, activation_function="gelu_fancy"), ["activation_function", "gelu_fancy", "gelu_new"]),
        (lambda f: (f / "generation_config.json").write_text("{"), ["generation_config.json"]),
        (lambda f: (f / "generation_config.json").write_text("[]"), ["generation_config.json"]),
        (lambda f: (f / "adapter_config.json").write_text("{}"), ["delete adapter_config.json"]),
        (only_an_adapter, ["adapter_config.json", "merge"]),
        (lambda f: rename(f, lambda name: f"module.{name}"), ["'module.'", "DistributedDataParallel"]),
        (lambda f: rename(f, lambda name: f"_orig_mod.{name}"), ["'_orig_mod.'", "torch.compile"]),
        (lambda f: rename(f, lambda name: f"_orig_mod.module.{name}"), ["'_orig_mod.module.'"]),
        (lambda f: rename(f, lambda name: f"student.{name}"), ["'student.'"]),
        (lambda f: rename(f, lambda name: f"base_model.model.{name}"), ["base_model.model.", "merge"]),
        (lambda f: rename(f, lambda name: name.replace("c_attn.", "c_attn.base_layer.")), [".base_layer.", "merge"]),
        (
            lambda f: edit_weights(
                f, lambda w: w.update({"transformer.h.0.attn.c_attn.lora_A.weight": torch.ones(2, 8)})
            ),
            ["lora_A", "merge"],
        ),
        (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors"]),
        (lambda f: shard_index(f, {"weight_map": {}}), ["model.safetensors.index.json"]),
        (lambda f: shard_index(f, {"weight_map": {"a": 1, "b": ["x"]}}), ["model.safetensors.index.json"]),
        (lambda f: shard_index(f, {"weight_map": {"a": "gone.safetensors"}}), ["gone.safetensors"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
        (only_pickle, ["pytorch_model.bin", "pickle"]),
        (truncate, ["model.safetensors"]),
        (large_file_pointer, ["model.safetensors"]),
        (lose_a_shard, ["model-00002-"]),
        (
            lambda f: edit_weights(f, lambda weights: weights.pop("transformer.h.1.mlp.c_fc.bias")),
            ["transformer.h.1.mlp.c_fc.bias"],
        ),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer"]),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\x80\x81"), ["tokenizer"]),
        (lambda f: (f / "tokenizer.json").write_text('{"model": 1}'), ["tokenizer"]),
        (lambda f: make_tokenizer("abc " * 99 + "xyz", 257 + 99).save_pretrained(f), []),
    ],
)
def test_damage_is_named_in_one_line(folder: Path, damage: Callable[[Path], object], expected: list[str]) -> None:
    damage(folder)
    if not expected:  # damage that is none: the control of this test
        load_model(str(folder))
        return
    message = message_of(lambda: load_model(str(folder)))
    assert str(folder) in message
    for part in expected:
        assert part in message


FLAGS = {"output_attentions": True, "output_hidden_states": True, "return_dict": False, "gradient_checkpointing": True}


@pytest.mark.parametrize("flags", [FLAGS, {"attn_implementation": "flash_attention_2"}])
def test_flags_of_an_earlier_forward_pass_are_reset(folder: Path, tmp_path: Path, flags: dict[str, object]) -> None:
    expected = load_model(str(folder)).model
    (folder / "generation_config.json").unlink()  # then transformers takes the flags into those settings as well
    edit_config(folder, **flags)
    model = load_model(str(folder)).model
    output = model(torch.arange(9)[None])
    torch.testing.assert_close(output.logits, expected(torch.arange(9)[None]).logits)
    assert output.attentions is None and output.hidden_states is None and not model.is_activation_checkpointing
    assert not load_config(str(folder)).output_attentions
    model.save_pretrained(tmp_path / "again")
    for kind in ("config", "generation_config"):
        written = json.loads((tmp_path / "again" / f"{kind}.json").read_text())
        assert not any(written.get(flag) for flag in (*flags, "return_dict_in_generate") if flag != "return_dict")
        assert written.get("return_dict", True)


def test_an_unknown_activation_of_a_pythia_is_named_too(tmp_path: Path) -> None:
    tiny_neox().save_pretrained(tmp_path)
    edit_config(tmp_path, hidden_act="relu6000")
    assert "hidden_act is 'relu6000'" in message_of(lambda: load_config(str(tmp_path)))


def split_by_itself(tokenizer: Tokenizer) -> None:
    digits = pre_tokenizers.Split(Regex(r"\d{1,3}|[^\d]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])


def lower_case(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def prefix_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def begin_with_end_of_text(tokenizer: Tokenizer) -> None:
    end = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", "$A $B", [end])


def left_alone(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize("change", [split_by_itself, lower_case, prefix_space, begin_with_end_of_text, left_alone])
@pytest.mark.parametrize(
    "named", ["GPT2TokenizerFast", "GPT2Tokenizer", "GPTNeoXTokenizerFast", "RobertaTokenizerFast"]
)
def test_a_tokenizer_is_the_one_of_its_file_whatever_class_is_named(
    tmp_path: Path, change: Callable[[Tokenizer], None], named: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_tokenizer(tmp_path)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    change(file)
    file.save(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": named}))
    tokenizer = load_tokenizer(str(tmp_path))
    texts = ("def function_7(VALUE):\n    total = 1234567", "", "<|endoftext|>return  total", "\u00e9\u4e2d")
    for text in texts:
        assert tokenizer(text).input_ids == file.encode(text).ids
    assert tokenizer.eos_token == "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "again")
    for again in (load_tokenizer(str(tmp_path / "again")), AutoTokenizer.from_pretrained(tmp_path / "again")):
        assert [again(text).input_ids for text in texts] == [file.encode(text).ids for text in texts]
    if (change, named) == (left_alone, "GPT2TokenizerFast"):
        assert type(tokenizer).__name__ == "GPT2Tokenizer" and not caplog.records
    if change is split_by_itself:
        assert "pre_tokenizer" in caplog.text


def test_a_special_token_that_only_the_class_knows_is_kept(tmp_path: Path) -> None:
    """As in the repository gpt2, whose tokenizer_config.json names no end of text."""
    write_tokenizer(tmp_path)
    file = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    split_by_itself(file)
    file.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast", "model_max_length": 32}')
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eos_token_id == file.token_to_id("<|endoftext|>") and tokenizer.model_max_length == 32


def test_a_run_in_place_of_a_model_is_told_where_its_model_is(folder: Path) -> None:
    (folder.parent / "recipe.toml").write_text("")
    message = message_of(lambda: load_config(str(folder.parent)))
    assert str(folder) in message.replace(f"{folder.parent} ", "")


def test_names_that_look_like_paths_are_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "weights.safetensors").touch()
    for name in ("./gpt3", "../gpt3", "/gpt3", "~/no-such-gpt3", "a/b/c", "gpt3/", "runs/missing"):
        assert f"no such directory: {name}" in message_of(lambda name=name: load_model(name))
    assert "is a file" in message_of(lambda: load_config("weights.safetensors"))
    assert "no valid Hub id" in message_of(lambda: load_tokenizer("gpt 3!"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(folder: Path) -> None:
    assert "no CUDA GPU" in message_of(lambda: load_model(str(folder), device="cuda"))


def test_fingerprint_ignores_state_and_storage_but_not_content(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert len(fingerprint) == 64
    tokenizer("def f(x):", truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "def f(x):"], padding=True)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path / "again"))) == fingerprint

    assert tokenizer_fingerprint(make_tokenizer("while True: print(1, 2)\n")) != fingerprint
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_fingerprint(tokenizer) != fingerprint


def test_fingerprint_sees_the_pre_tokenizer() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    assert tokenizer_fingerprint(tokenizer) != before


def rewritten(
    tokenizer: PreTrainedTokenizerBase, change: Callable[[dict[str, Any]], object]
) -> PreTrainedTokenizerBase:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=tokenizer.eos_token
    )


def spelled_out(state: dict[str, Any]) -> None:
    """Write the pre-tokenizer in another way, with the same meaning, and add an entry that no text has."""
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, step]}
    pad = {"id": len(state["model"]["vocab"]), "content": "<|pad|>", "special": True}
    state["added_tokens"].append({**pad, **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)})


def test_tokenizers_that_give_the_same_ids_are_the_same(tmp_path: Path) -> None:
    from ln_removal.data.open_corpus import held_out_tokens
    from ln_removal.evaluation.scoring import check_same_tokenizer

    plain = tmp_path / "plain"
    write_tokenizer(plain, entries=300)
    tokenizer = load_tokenizer(plain)
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    data = held_out_tokens(str(tmp_path / "text.txt"), tokenizer, tmp_path / "t", tokenizer_name="p", max_tokens=None)  # type: ignore[arg-type]
    other = rewritten(tokenizer, spelled_out)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    check_same_tokenizer(other, "other", data)

    def no_regex(state: dict[str, Any]) -> None:
        state["pre_tokenizer"]["use_regex"] = False

    def swapped(state: dict[str, Any]) -> None:
        vocabulary = state["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    def normalized(state: dict[str, Any]) -> None:
        state["normalizer"] = {"type": "NFC"}

    def fewer_merges(state: dict[str, Any]) -> None:
        state["model"]["merges"].pop()

    for change in (no_regex, swapped, normalized, fewer_merges):
        with pytest.raises(UserError, match="another tokenizer"):
            check_same_tokenizer(rewritten(tokenizer, change), "other", data)


def test_paths_may_be_given_as_path_objects(folder: Path, tmp_path: Path) -> None:
    from ln_removal.config.recipe import dump_toml, load_recipe
    from ln_removal.data.open_corpus import open_corpus
    from ln_removal.evaluation.hellaswag import load_question_set

    assert load_model(folder, tokenizer_from=folder).name == str(folder)
    assert load_config(folder).n_layer == 2 and load_tokenizer(folder).eos_token_id == 0
    recipe = load_recipe("tiny", {"model": folder, "data.corpus": tmp_path, "data.tokenizer": folder})
    assert (recipe.model, recipe.data.corpus, recipe.data.tokenizer) == (str(folder), str(tmp_path), str(folder))
    (tmp_path / "mine.toml").write_text(dump_toml(recipe), encoding="utf-8")
    assert (
        load_recipe(tmp_path / "mine.toml") == recipe == load_recipe(Path("tiny"), recipe.model_dump(exclude_none=True))
    )
    assert open_corpus(tmp_path).name == tmp_path.name
    question = {
        "ind": 0,
        "activity_label": "a",
        "ctx_a": "x",
        "ctx_b": "",
        "ctx": "x",
        "label": 1,
        "endings": list("abcd"),
    }
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    assert load_question_set(tmp_path / "questions.jsonl").name == "questions.jsonl"


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    entries = len(tokenizer)
    check_tokenizer(GPT2Config(vocab_size=entries), tokenizer)
    message = message_of(lambda: check_tokenizer(GPT2Config(vocab_size=entries - 1), tokenizer))
    assert f"{entries} entries" in message
    assert f"{entries - 1} rows" in message
    tokenizer.add_tokens([f"<extra {number}>" for number in range(VOCABULARY)])
    tokenizer.save_pretrained(folder)
    assert "use the tokenizer" in message_of(lambda: load_model(str(folder)))
