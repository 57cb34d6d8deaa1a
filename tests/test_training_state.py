"""Checkpoints: written whole or not at all, pruned, and the newest whole one found whatever happened to the rest."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_training import CONTEXT, EOT, tiny_model, tiny_spec
from torch import nn

from ln_removal.errors import UserError
from ln_removal.norms.surgery import install
from ln_removal.training import checkpoint as state_module
from ln_removal.training.checkpoint import TrainerState, checkpoints, load_newest, save_checkpoint
from ln_removal.training.optimizers import build_optimizers, set_learning_rate

Optimizers = list[torch.optim.Optimizer]
KINDS = ["adamw", "muon"]


def make(kind: str = "adamw", seed: int = 0) -> tuple[nn.Module, Optimizers]:
    model = tiny_model(seed).eval()
    return model, build_optimizers(model, tiny_spec(optimizer=kind))


def step(model: nn.Module, optimizers: Optimizers, number: int) -> None:
    set_learning_rate(optimizers, 1e-3)
    tokens = torch.randint(0, EOT, (2, CONTEXT), generator=torch.Generator().manual_seed(number))
    model(tokens, labels=tokens).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def saved_steps(directory: Path) -> list[int]:
    return [number for number, _ in checkpoints(directory)]


def save_steps(directory: Path, *steps: int, keep: int = 10) -> dict[int, dict[str, torch.Tensor]]:
    """Checkpoints at these steps, each with other weights; returns the weights."""
    model, optimizers = make()
    kept = {}
    for number in steps:
        step(model, optimizers, number)
        save_checkpoint(directory, TrainerState(step=number, tokens=10 * number), model, optimizers, keep=keep)
        kept[number] = weights(model)
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_model_and_optimizers_come_back_exactly(tmp_path: Path, kind: str) -> None:
    model, optimizers = make(kind)
    for number in range(3):
        step(model, optimizers, number)
    save_checkpoint(tmp_path, TrainerState(step=3, tokens=30, skipped=1, seconds=2.5), model, optimizers, keep=1)
    restored, others = make(kind, seed=1)
    state, faults = load_newest(tmp_path, restored, others)
    assert state is not None and faults == []
    assert (state.step, state.tokens, state.skipped, state.seconds) == (3, 30, 1, 2.5)
    assert_equal(weights(restored), weights(model))
    step(model, optimizers, 3)
    step(restored, others, 3)
    assert_equal(weights(restored), weights(model))


def test_norm_statistics_and_mixes_come_back(tmp_path: Path) -> None:
    model, _ = make()
    sites = install(model, eot_token_id=EOT)
    model.train()(torch.tensor([[EOT, 1, EOT, 2]]))
    sites.update_running(0.0)
    sites.set_mix("ln_1_qk.1", 0.25)
    sites.set_special("eot", 0.5)
    save_checkpoint(tmp_path, TrainerState(step=1), model, [], keep=1)
    restored, _ = make(seed=1)
    again = install(restored, eot_token_id=EOT)
    load_newest(tmp_path, restored, [])
    assert again.mixes() == sites.mixes()
    assert again.frozen_constants() == sites.frozen_constants()
    assert again.running_stds() == sites.running_stds()
    assert again.running_stds()["ln_f"][0] > 0


def test_a_checkpoint_holds_only_safetensors_and_json(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    files = {path.name for path in (tmp_path / "step-000005").iterdir()}
    assert files == {"model.safetensors", "optimizer-0.safetensors", "trainer.json"}
    tensors = load_file(tmp_path / "step-000005" / "model.safetensors")
    assert ("lm_head.weight" in tensors) != ("transformer.wte.weight" in tensors), "a tied weight is stored once"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 10, 1_000_000, keep=2)
    assert saved_steps(tmp_path) == [10, 1_000_000]


def test_nothing_to_load(tmp_path: Path) -> None:
    model, optimizers = make()
    before = weights(model)
    assert load_newest(tmp_path / "state", model, optimizers) == (None, [])
    assert_equal(weights(model), before)


def flip(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        data = bytearray((checkpoint / name).read_bytes())
        data[-5] ^= 1
        (checkpoint / name).write_bytes(data)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def write(text: bytes) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / "trainer.json").write_bytes(text)

    return damage


DAMAGES = {
    "flipped byte in the model": flip("model.safetensors"),
    "flipped byte in the optimizer": flip("optimizer-0.safetensors"),
    "model cut short": cut("model.safetensors"),
    "no model": remove("model.safetensors"),
    "no optimizer": remove("optimizer-0.safetensors"),
    "no trainer.json": remove("trainer.json"),
    "trainer.json cut short": cut("trainer.json"),
    "trainer.json empty": write(b""),
    "trainer.json a list": write(b"[]"),
    "trainer.json without model": write(b'{"step": 9, "checksums": {}}'),
    "trainer.json with a list of checksums": write(b'{"step": 9, "checksums": []}'),
    "trainer.json not UTF-8": write(b"\xff\xfe{}"),
    "trainer.json naming a file elsewhere": write(b'{"step": 9, "checksums": {"../x": ""}}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_the_newest_whole_checkpoint_is_found(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    kept = save_steps(tmp_path, 1, 2)
    damage(tmp_path / "step-000002")
    model, optimizers = make(seed=1)
    state, faults = load_newest(tmp_path, model, optimizers)
    assert state is not None and state.step == 1
    assert_equal(weights(model), kept[1])
    (fault,) = faults
    assert fault.startswith(f"{tmp_path}/step-000002 is damaged (")
    assert fault.endswith(f"); going on from {tmp_path}/step-000001 instead")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unseen(tmp_path: Path, data: st.DataObject) -> None:
    if not saved_steps(tmp_path):
        save_steps(tmp_path, 1, 2)
    path = data.draw(st.sampled_from(sorted((tmp_path / "step-000002").iterdir())))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        model, optimizers = make(seed=1)
        state, faults = load_newest(tmp_path, model, optimizers)
    finally:
        path.write_bytes(whole)
    assert state is not None
    if faults:
        assert state.step == 1 and "going on from" in faults[0]
    else:  # one kind of white space became another
        assert path.name == "trainer.json" and json.loads(flipped) == json.loads(whole)


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    flip("model.safetensors")(tmp_path / "step-000001")
    remove("trainer.json")(tmp_path / "step-000002")
    model, optimizers = make(seed=1)
    with pytest.raises(UserError, match=r"step-000002.*step-000001.*--out") as caught:
        load_newest(tmp_path, model, optimizers)
    assert "\n" not in str(caught.value)


def test_a_damaged_later_checkpoint_does_not_push_out_the_next_one(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20)
    flip("model.safetensors")(tmp_path / "step-000020")
    model, optimizers = make(seed=1)
    state, _ = load_newest(tmp_path, model, optimizers)
    assert state is not None
    state.step = 15
    save_checkpoint(tmp_path, state, model, optimizers, keep=1)
    assert saved_steps(tmp_path) == [15]
    again, _ = load_newest(tmp_path, model, optimizers)
    assert again is not None and again.step == 15


def corrupting(
    monkeypatch: pytest.MonkeyPatch, name: str, times: int, damage: Callable[[Path], None], *, only: str = ""
) -> list[Path]:
    """Let a function that writes a file succeed, and leave something else on the disk, so many times."""
    real, done = getattr(state_module, name), []

    def write_and_damage(*args: object) -> None:
        real(*args)
        (path,) = [each for each in args if isinstance(each, Path)]
        if len(done) < times and path.name.startswith(only):
            done.append(path)
            damage(path)

    monkeypatch.setattr(state_module, name, write_and_damage)
    return done


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


SILENT = {
    "flipped bit in the model": ("save_file", flip_last, "model"),
    "flipped bit in the optimizer": ("save_file", flip_last, "optimizer"),
    "model cut short": ("save_file", halve, "model"),
    "trainer.json cut short": ("write_json_atomically", halve, ""),
}


@pytest.mark.parametrize(("name", "damage", "only"), SILENT.values(), ids=SILENT.keys())
def test_old_checkpoints_stay_until_a_newer_one_has_been_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None], only: str
) -> None:
    kept = save_steps(tmp_path, 1, 2)
    model, optimizers = make()
    step(model, optimizers, 0)
    with monkeypatch.context() as patched:
        done = corrupting(patched, name, 100, damage, only=only)
        with pytest.raises(UserError, match="step-000002") as caught:
            save_checkpoint(tmp_path, TrainerState(step=3), model, optimizers, keep=1)
    assert len(done) == 2, "it tried twice"
    told = str(caught.value)
    assert f"{tmp_path}/step-000002 is intact, continue from there with --resume" in told and "\n" not in told
    assert saved_steps(tmp_path) == [1, 2] and not list(tmp_path.glob(".*"))
    restored, others = make(seed=1)
    state, faults = load_newest(tmp_path, restored, others)
    assert state is not None and state.step == 2 and faults == []
    assert_equal(weights(restored), kept[2])


@pytest.mark.parametrize(("name", "damage", "only"), SILENT.values(), ids=SILENT.keys())
def test_a_write_that_went_wrong_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None], only: str
) -> None:
    save_steps(tmp_path, 1, 2)
    model, optimizers = make()
    step(model, optimizers, 0)
    done = corrupting(monkeypatch, name, 1, damage, only=only)
    save_checkpoint(tmp_path, TrainerState(step=3), model, optimizers, keep=1)
    assert len(done) == 1 and saved_steps(tmp_path) == [3]
    restored, others = make(seed=1)
    state, faults = load_newest(tmp_path, restored, others)
    assert state is not None and state.step == 3 and faults == []
    assert_equal(weights(restored), weights(model))


def test_a_checkpoint_that_is_half_deleted_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2)
    model, optimizers = make()

    def killed(path: Path, **options: object) -> None:
        if path.is_dir():
            raise KeyboardInterrupt

    monkeypatch.setattr(state_module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, TrainerState(step=3), model, optimizers, keep=2)
    assert saved_steps(tmp_path) == [2, 3]


def test_what_a_crash_left_under_a_temporary_name_does_not_count(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    leftover = tmp_path / ".step-000002.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step-000003").write_text("a file, not a checkpoint")
    (tmp_path / "step-final").mkdir()
    assert saved_steps(tmp_path) == [1]
    model, optimizers = make()
    save_checkpoint(tmp_path, TrainerState(step=2), model, optimizers, keep=5)
    assert saved_steps(tmp_path) == [1, 2]
    assert not leftover.exists()


def test_a_crash_before_the_rename_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = save_steps(tmp_path, 1)

    def crash(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(state_module.os, "fsync", crash)
        model, optimizers = make()
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, TrainerState(step=2), model, optimizers, keep=1)
    assert saved_steps(tmp_path) == [1]
    model, optimizers = make(seed=1)
    state, faults = load_newest(tmp_path, model, optimizers)
    assert state is not None and faults == []
    assert_equal(weights(model), kept[1])


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing past `size` bytes fails, as on a full disk (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 150_000])
def test_a_full_disk_leaves_the_earlier_ones(tmp_path: Path, size: int) -> None:
    kept = save_steps(tmp_path, 1, 2)
    model, optimizers = make()
    step(model, optimizers, 0)
    with largest_file(size), pytest.raises(UserError, match="checkpoint"):
        save_checkpoint(tmp_path, TrainerState(step=3), model, optimizers, keep=1)
    assert saved_steps(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".*")), "the half-written one is gone, and its space free"
    model, optimizers = make(seed=1)
    state, faults = load_newest(tmp_path, model, optimizers)
    assert state is not None and state.step == 2 and faults == []
    assert_equal(weights(model), kept[2])


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    model, optimizers = make()
    with pytest.raises(UserError, match="checkpoint"):
        save_checkpoint(tmp_path / "state", TrainerState(step=1), model, optimizers, keep=1)


def test_a_checkpoint_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with_norms, _ = make()
    install(with_norms, eot_token_id=EOT)
    with pytest.raises(UserError, match="another model"):
        load_newest(tmp_path, with_norms, None)
    from transformers import GPT2Config, GPT2LMHeadModel

    wider = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=CONTEXT, n_embd=48, n_layer=2, n_head=2))
    with pytest.raises(UserError, match="another model") as caught:
        load_newest(tmp_path, wider, None)
    assert "\n" not in str(caught.value)
    model, optimizers = make("muon")
    with pytest.raises(UserError, match="optimizer"):
        load_newest(tmp_path, model, optimizers)
