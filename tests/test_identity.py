"""What a run was made from is decided once: later uses take it from there, from any directory, whatever folders are there."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import done, refused
from fake_hub import FakeHub, read_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from small_model import STEP, write_corpus, write_model
from test_publishing import TOKEN, run_commands

from ln_removal.export.hub import HubTarget
from ln_removal.models.identity import identity_for, locate, model_of_run, read_identity, record, weights_sha256
from ln_removal.models.loading import load_model
from ln_removal.pipelines.publishing import run_files

RESUME = "--resume --control --questions none --device cpu"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(run: Path) -> list[float]:
    """Of the training steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows if row["kind"] == "train"]


def same_weights(one: Path, other: Path) -> bool:
    first, second = (load_file(place / "model.safetensors") for place in (one, other))
    return first.keys() == second.keys() and all(bool((first[name] == second[name]).all()) for name in first)


@pytest.fixture
def run(world: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which was made with `--model model` in the world."""
    shutil.copytree(world / "run", tmp_path / "somewhere" / "run", symlinks=True)
    return tmp_path / "somewhere" / "run"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: another one, in which `model` is another model of the same shape."""
    write_model(tmp_path / "elsewhere" / "model", seed=5)
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


# ------------------------------------------------------------------------------- a folder, and another one of its name


def test_the_identity_is_written_when_a_run_begins(world: Path) -> None:
    found = read_identity(world / "run")
    assert found is not None and found.name == "model" and found.commit == ""
    assert found.place == str((world / "model").resolve())
    assert found.weights_sha256 == weights_sha256(str(world / "model"))


@pytest.mark.usefixtures("elsewhere")
def test_a_resumed_run_trains_its_control_from_its_own_model(world: Path, run: Path) -> None:
    shutil.rmtree(run / "control")
    (run / "results.json").unlink()
    done(f"ln-remove --out {run} {RESUME}")
    assert same_weights(run / "control" / "model", world / "run" / "control" / "model")
    assert read(run / "results.json")["cross_entropy"] == read(world / "run" / "results.json")["cross_entropy"]


@pytest.mark.usefixtures("elsewhere")
def test_a_run_is_scored_against_its_own_model(world: Path, run: Path) -> None:
    done(f"ln-evaluate {run} --device cpu --out scores.json")
    found, before = read(Path("scores.json")), read(world / "run" / "results.json")
    assert found["cross_entropy"] == pytest.approx(before["cross_entropy"], abs=1e-6)
    assert found["models"]["original"] == "model"


@pytest.mark.usefixtures("elsewhere")
def test_a_checkpoint_is_folded_in_its_own_model(world: Path, run: Path) -> None:
    shutil.rmtree(run / "model")
    done(f"ln-export {run} --out folded")
    assert same_weights(Path("folded"), world / "run" / "model")


def test_a_published_card_names_the_license_of_the_own_model(run: Path, elsewhere: Path, tmp_path: Path) -> None:
    """`models/plain` could be a Hub id where there is no such folder."""
    own = write_model(tmp_path / "models" / "plain")
    (own / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n", encoding="utf-8")
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace('model = "model"', 'model = "models/plain"'))
    sha256 = weights_sha256(str(own))
    identity = {"name": "models/plain", "place": str(own), "commit": "", "weights_sha256": sha256}
    (run / "identity.json").write_text(json.dumps({"model": identity}), encoding="utf-8")

    def card() -> ModelCard:
        text = run_files(run, HubTarget("alice/x"))["README.md"]
        assert isinstance(text, bytes)
        return ModelCard(text.decode())

    assert (card().data.base_model, card().data.license) == (None, "cc-by-4.0")
    write_model(own, seed=3)  # other weights: nothing is known about their license
    assert (card().data.base_model, card().data.license) == (None, "unknown")
    shutil.rmtree(own)
    assert card().data.license == "unknown"
    assert str(tmp_path / "models") not in card().content


@pytest.mark.usefixtures("elsewhere")
def test_a_model_that_was_moved_is_found_where_the_user_says(run: Path, tmp_path: Path, world: Path) -> None:
    moved = shutil.copytree(world / "model", tmp_path / "moved")
    identity = read(run / "identity.json")
    identity["model"]["place"] = str(tmp_path / "gone")
    (run / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    shutil.rmtree(run / "control")
    message = refused(f"ln-remove --out {run} {RESUME}")
    assert str(tmp_path / "gone") in message and "--model" in message
    assert "gone" in refused(f"ln-evaluate {run} --device cpu")
    recipe = f"--recipe {run}/recipe.toml"
    assert "another model" in refused(f"ln-remove {recipe} --model ./model --out {run} {RESUME}")
    done(f"ln-remove {recipe} --model {moved} --out {run} {RESUME}")
    assert same_weights(run / "control" / "model", world / "run" / "control" / "model")
    assert model_of_run(run, "model") == str(moved.resolve())


def test_a_model_that_moved_together_with_its_run_is_found_by_its_name(
    run: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "model", run.parent / "model")
    identity = read(run / "identity.json")
    identity["model"]["place"] = "/no/such/place/model"
    (run / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    monkeypatch.chdir(run.parent)
    assert model_of_run(run, "model") == str((run.parent / "model").resolve())


def test_a_model_that_has_changed_is_refused_in_one_line(run: Path, tmp_path: Path, elsewhere: Path) -> None:
    identity = read(run / "identity.json")
    identity["model"]["place"] = str(elsewhere / "model")
    (run / "identity.json").write_text(json.dumps(identity), encoding="utf-8")
    shutil.rmtree(run / "control")
    shutil.rmtree(run / "model")
    for command in (f"ln-remove --out {run} {RESUME}", f"ln-export {run} --out new"):
        assert str(elsewhere / "model") in refused(command)
    assert not (run / "control").exists() and not Path("new").exists()
    (run / "model").mkdir()
    assert str(elsewhere / "model") in refused(f"ln-evaluate {run} --device cpu")
    (run / "identity.json").write_text("{}}", encoding="utf-8")
    assert "identity.json" in refused(f"ln-evaluate {run} --device cpu")
    (run / "identity.json").write_text('{"model": {"name": "x", "place": 3}}', encoding="utf-8")
    assert "identity.json" in refused(f"ln-evaluate {run} --device cpu")


def test_the_tokenizer_of_a_pretraining_stays_the_same(
    world: Path, tmp_path: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(world)
    found = identity_for("model", tmp_path / "run", "tokenizer", resume=False)
    assert found is not None
    record(found, tmp_path / "run", "tokenizer")
    monkeypatch.chdir(elsewhere)
    again = identity_for("model", tmp_path / "run", "tokenizer", resume=True)
    assert again == found and again.reference == str((world / "model").resolve())
    assert read_identity(tmp_path / "run") is None, "it has no model"
    another = identity_for("./model", tmp_path / "run", "tokenizer", resume=True)
    assert another is not None and another.name == "./model", "not trained yet: the recipe may still change"


def test_the_hash_is_of_the_files(world: Path, tmp_path: Path) -> None:
    from ln_removal.files.atomic import checksum

    assert weights_sha256(str(world / "model")) == checksum(world / "model" / "model.safetensors")
    shards = shutil.copytree(world / "model", tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    load_model(world / "model").model.save_pretrained(shards, max_shard_size="20KB")
    whole = weights_sha256(str(shards))
    assert len(list(shards.glob("*.safetensors"))) > 1
    last = max(shards.glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1] + b"?")
    assert weights_sha256(str(shards)) != whole


# -------------------------------------------------------------------------------- a Hub id, and a folder that hides it


@pytest.mark.slow
def test_a_run_of_a_hub_model_stays_with_its_commit(tmp_path: Path) -> None:
    """The output has the name of the Hub id, the Hub's repository moves on, and elsewhere a folder hides the id."""
    write_model(tmp_path / "first")
    write_model(tmp_path / "second", seed=1)
    write_corpus(tmp_path / "texts")
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    write_model(here / "gpt2", seed=2)
    out = there / "gpt2"
    options = f"--recipe gpt2 --set data.context=32 --set data.corpus={tmp_path / 'texts'} --set training.compile=false"
    removal = f"ln-remove --model gpt2 {options} --steps 6 --questions none {STEP}"
    with FakeHub() as hub:
        hub.add_account(TOKEN, "alice")
        repo = hub.add("models", "gpt2", read_folder(tmp_path / "first"))
        commit = repo.commit("main")
        ((code, _, errors),) = run_commands(hub, there, f"{removal} --out gpt2")
        assert code == 0, errors
        repo.advance("main", read_folder(tmp_path / "second"))
        shutil.rmtree(out / "model")
        shutil.copytree(there / "hub", here / "hub", symlinks=True)
        export, resume, again, push, new = run_commands(
            hub,
            here,
            f"ln-export {out} --out folded",
            f"ln-remove --out {out} {RESUME}",
            f"{removal} --control --out {out} --resume",
            f"ln-export {out} --push-to-hub alice/mine",
            "ln-remove --model gpt2@main --dry-run",
        )
    (score,) = run_commands(hub, here, f"ln-evaluate {out} --device cpu --json")  # the Hub cannot be reached any more
    for code, _, errors in (export, resume, again, push, new, score):
        assert code == 0, errors
    assert read(out / "identity.json")["model"] == {
        "name": "gpt2",
        "place": "gpt2",
        "commit": commit,
        "weights_sha256": weights_sha256(str(tmp_path / "first")),
    }
    assert same_weights(here / "folded", out / "model")
    assert losses(out / "control")[0] == losses(out)[0], (
        "the first step is that of the original, with or without a schedule"
    )
    expected = done(f"ln-evaluate {out} --original {tmp_path / 'first'} --device cpu --json").stdout
    assert json.loads(score[1])["cross_entropy"] == pytest.approx(json.loads(expected)["cross_entropy"], abs=1e-5)
    assert str(here / "gpt2") in resume[2], "it says that the folder is not what is used"
    card = ModelCard(hub.repos["models", "alice/mine"].revisions["main"]["README.md"].decode())
    assert (card.data.base_model, card.data.license) == ("openai-community/gpt2", "mit")
    assert commit in card.content


def test_a_folder_that_hides_a_hub_id_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "openai-community/gpt2", "some/model", "model"):
        write_model(Path(name))

    def said(action: Any) -> bool:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            action()
        return any("@main" in message for message in caplog.messages)

    assert said(lambda: locate("gpt2")) and said(lambda: locate("some/model"))
    assert said(lambda: load_model("openai-community/gpt2"))
    assert not said(lambda: load_model("openai-community/gpt2")), "once"
    for name in ("model", "./gpt2", str(tmp_path / "gpt2"), "tiny"):
        assert not said(lambda name=name: locate(name)), name
    assert not said(lambda: load_model("model"))
