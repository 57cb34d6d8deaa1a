"""Pretraining without norms through the command: it trains, is observed, resumes, exports, and says how it breaks."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from small_model import write_corpus, write_model
from typer.testing import CliRunner

from ln_removal.data.tokens import TokenDataset
from ln_removal.errors import UserError
from ln_removal.models.loading import load_model
from ln_removal.models.norm_choice import learnable_slopes

SIZES = {
    "data.corpus": "texts",
    "data.tokenizer": "model",
    "data.weights": "{}",
    "data.context": 32,
    "architecture.n_positions": 32,
    "architecture.n_layer": 3,
    "architecture.n_head": 2,
    "architecture.n_embd": 32,
    "architecture.vocab_size": 320,
    "training.tokens_per_step": 256,
    "training.micro_batch": "auto",
    "training.compile": "false",
    "training.precision": "float32",
    "training.learning_rate": 0.01,
    "observation.every": 4,
    "observation.sequences": 3,
}


def run(command: str, **settings: Any) -> Result:
    name, *arguments = shlex.split(command)
    for key, value in (SIZES | {key.replace("__", "."): value for key, value in settings.items()}).items():
        arguments += ["--set", f"{key}={value}"]
    app = importlib.import_module("ln_removal.cli.pretrain").app
    return CliRunner().invoke(app, ["--recipe", "normfree/small-python", *arguments], prog_name=name)


def done(command: str, **settings: Any) -> dict[str, Any]:
    result = run(f"{command} --json", **settings)
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return json.loads(result.stdout)


def rows(out: str, kind: str) -> list[dict[str, Any]]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    write_model(place / "model")
    write_corpus(place / "texts")
    return place


@pytest.fixture(autouse=True)
def _inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)


PYTHIA = {
    "architecture__family": "pythia",
    "architecture__block_norm": "none",
    "architecture__activation": "learnable_leaky_relu",
    "training__checkpoint_every": 5,
}


class Stop(Exception):
    pass


def test_a_pythia_without_norms_trains_resumes_exports_and_reloads(
    monkeypatch: pytest.MonkeyPatch, world: Path, tmp_path: Path
) -> None:
    whole = done("ln-pretrain --steps 14 --out whole", **PYTHIA)

    # The same run, cut short after its second checkpoint.
    from ln_removal.training import loop

    kept = loop.save_checkpoint

    def saves_twice(directory: Path, state: Any, *rest: Any, **options: Any) -> Path:
        saved = kept(directory, state, *rest, **options)
        if state.step == 10:
            raise Stop
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", saves_twice)
        assert isinstance(run("ln-pretrain --steps 14 --out cut", **PYTHIA).exception, Stop)
    with monkeypatch.context() as patch:  # from a directory in which there is neither the corpus nor the tokenizer
        patch.chdir(tmp_path)
        resumed = done(f"ln-pretrain --steps 14 --out {world / 'cut'} --resume", **PYTHIA)
    assert resumed["cross_entropy"] == whole["cross_entropy"]
    assert (Path("cut/model/model.safetensors")).read_bytes() == (Path("whole/model/model.safetensors")).read_bytes()
    for kind in ("train", "observation", "evaluation"):
        old, new = (
            [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows(out, kind)]
            for out in ("whole", "cut")
        )
        assert old == new and old

    # What was written loads as what it is, and gives the logits that the trained weights give.
    loaded = load_model("whole/model").model
    assert type(loaded).__name__ == "RevivalGPTNeoXForCausalLM" and loaded.config.block_norm == "none"
    assert not [name for name, module in loaded.named_modules() if "layernorm" in name and list(module.parameters())]
    ids = torch.arange(24).view(1, -1)
    again = type(loaded)(loaded.config).eval()
    from safetensors.torch import load_file

    again.load_state_dict(load_file(next(Path("whole/state").glob("step-000014")) / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_a_pythia_without_norms_is_scored_like_any_model(tmp_path: Path) -> None:
    figures = done("ln-pretrain --steps 3 --out scored", **PYTHIA)
    questions = tmp_path / "questions.jsonl"
    endings = ["return 1", "return total", "total", "value"]
    rows_of_questions = [{"ind": n, "ctx": f"def f{n}(value):", "label": n % 4, "endings": endings} for n in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows_of_questions), encoding="utf-8")
    evaluate = importlib.import_module("ln_removal.cli.evaluate").app
    result = CliRunner().invoke(evaluate, ["scored", "--json"], prog_name="ln-evaluate")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["cross_entropy"]["original"] == pytest.approx(figures["cross_entropy"], abs=1e-4)
    hellaswag = importlib.import_module("ln_removal.cli.evaluate_hellaswag").app
    arguments = ["scored/model", "--data", str(questions), "--protocol", "nanogpt", "--json"]
    result = CliRunner().invoke(hellaswag, arguments, prog_name="evaluate-hellaswag")
    assert result.exit_code == 0, result.output
    assert '"questions": 4' in result.stdout


@pytest.mark.parametrize(("slopes", "count"), [("layer", 3), ("network", 1)])
def test_learnable_slopes_are_logged_and_move(slopes: str, count: int) -> None:
    changes = {**PYTHIA, "architecture__family": "gpt2", "architecture__slopes": slopes}
    done(f"ln-pretrain --steps 9 --out slopes-{slopes}", **changes)
    observed = rows(f"slopes-{slopes}", "observation")
    assert [row["step"] for row in observed] == [0, 4, 8]
    assert observed[0]["slopes"] == [pytest.approx(0.01)] * count
    moved = observed[-1]["slopes"]
    assert len(moved) == count and all(abs(slope - 0.01) > 1e-4 for slope in moved)
    loaded = load_model(f"slopes-{slopes}/model").model
    assert len(learnable_slopes(loaded)) == count


def test_the_entropy_penalty_brings_heads_and_thresholds_together_and_they_survive_a_resume() -> None:
    from safetensors import safe_open

    changes = {
        "architecture__activation": "gelu",
        "training__learning_rate": 0.03,
        "training__entropy_weight": 1.0,
        "training__entropy_tolerance": 0.0,
        "training__checkpoint_every": 10,
    }
    whole = done("ln-pretrain --steps 20 --out penalised", **changes)
    first, last = (torch.tensor(rows("penalised", "observation")[i]["entropy"]).flatten() for i in (0, -1))
    with safe_open(Path("penalised/state/step-000020/model.safetensors"), "pt") as file:
        thresholds = file.get_tensor("entropy.thresholds")
    before, after = first - 0.5 * math.log(32), last - thresholds * math.log(32)
    assert float(before.abs().min()) > 0.5 and float(after.abs().max()) < 0.3
    assert float((thresholds - 0.5).abs().min()) > 0.05
    shutil.rmtree("penalised/state/step-000020")
    shutil.rmtree("penalised/model")
    resumed = done("ln-pretrain --steps 20 --out penalised --resume", **changes)
    assert resumed["cross_entropy"] == whole["cross_entropy"]
    # The exported model is what was chosen, and knows nothing of thresholds.
    with safe_open(Path("penalised/model/model.safetensors"), "pt") as file:
        assert not [name for name in file.keys() if "thresholds" in name]  # noqa: SIM118


WITHOUT_ANY_NORM = {
    "architecture__block_norm": "none",
    "architecture__final_norm": "none",
    "architecture__activation": "relu",
    "architecture__residual_gain": "learned",
    "architecture__initialisation": "unit",
    "training__spectral_cap": 1.2,
    "training__checkpoint_every": 6,
}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpt2_without_any_norm_resumes_bit_for_bit_and_is_an_ln_free_model(optimizer: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    from ln_removal.evaluation.loss import cross_entropy
    from ln_removal.interpret.models import load

    settings = {**WITHOUT_ANY_NORM, "training__optimizer": optimizer}
    out = Path(f"bare-{optimizer}")
    whole = done(f"ln-pretrain --steps 12 --out {out}", **settings)
    trained = (out / "model" / "model.safetensors").read_bytes()
    losses = [row["loss"] for row in rows(str(out), "train")]
    assert losses[-1] < losses[0] - 0.1
    # The vectors of the cap are those of the step before.
    last = max((out / "state" / "step-000012").glob("optimizer-*.safetensors"))
    with safe_open(last, "pt") as file:
        assert {name.partition(".")[2] for name in file.keys()} == {"vector"}  # noqa: SIM118
    shutil.rmtree(out / "state" / "step-000012")
    shutil.rmtree(out / "model")
    resumed = done(f"ln-pretrain --steps 12 --out {out} --resume", **settings)
    assert resumed["cross_entropy"] == whole["cross_entropy"]
    assert (out / "model" / "model.safetensors").read_bytes() == trained
    # Exported, it scores the same. The analyses take the run itself.
    export = importlib.import_module("ln_removal.cli.export").app
    result = CliRunner().invoke(export, [str(out), "--out", str(tmp_path / "free")], prog_name="ln-export")
    assert result.exit_code == 0, result.output
    from ln_removal.export.hub import HubTarget
    from ln_removal.pipelines.publishing import export_files

    with pytest.raises(UserError, match="hf upload alice/free"):
        export_files(tmp_path / "free", str(out), HubTarget("alice/free", private=False), form="normfree")
    free, bridge = load_model(tmp_path / "free").model, load(out).original
    assert type(free).__name__ == "NormFreeGPT2LMHeadModel" and bridge is not None
    assert bridge.cfg.normalization_type is None
    data = TokenDataset.open(out / "tokens").split("validation")
    assert cross_entropy(free, data, context=32).cross_entropy == pytest.approx(whole["cross_entropy"], abs=1e-5)


def test_float16_has_the_gradients_of_float32() -> None:
    changes: dict[str, Any] = {"architecture__block_norm": "none", "architecture__activation": "relu"}
    for precision in ("float32", "float16"):
        done(f"ln-pretrain --steps 6 --out in-{precision}", **changes, training__precision=precision)
    wide, narrow = rows("in-float32", "train"), rows("in-float16", "train")
    # The scale of the loss is taken out again before gradients are measured, clipped and used.
    assert [row["gradient_norm"] for row in narrow] == pytest.approx([row["gradient_norm"] for row in wide], rel=0.02)
    assert [row["loss"] for row in narrow] == pytest.approx([row["loss"] for row in wide], rel=0.005)
    assert wide[-1]["loss"] < wide[0]["loss"] - 0.05


UNSTABLE = {
    "architecture__block_norm": "none",
    "architecture__activation": "relu",
    "training__precision": "float16",
    "training__learning_rate": 10.0,
    "observation__every": 1,
}


def test_a_run_that_breaks_says_in_which_layers_and_keeps_what_was_seen(world: Path) -> None:
    """A learning rate far too high, no norms, float16: the residual stream leaves its range, and attention is NaN."""
    result = run("ln-pretrain --steps 30 --out broken", **UNSTABLE)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "the loss was not finite for 3 steps in a row" in result.stderr
    assert "with NaN in the attention of layer" in result.stderr and "ln-analyze nans broken" in result.stderr
    assert "training.learning_rate=5" in result.stderr and "schedule" not in result.stderr
    # The metrics are back at the beginning; what was seen on the way is beside them.
    assert not rows("broken", "train") and len(rows("broken", "rollback")) == 1
    analyze = importlib.import_module("ln_removal.cli.analyze").app
    shown = CliRunner().invoke(analyze, ["nans", "broken", "--json"], prog_name="ln-analyze")
    assert shown.exit_code == 0, shown.output
    (counts,) = [found["nan_counts"] for found in json.loads(shown.stdout)["runs"]]
    assert len(counts[0]) == 3 and sum(counts[0]) == 0 and sum(counts[-1]) > 0
    assert (world / "broken" / "analysis" / "nans.png").stat().st_size > 5000
    assert (world / "broken" / "analysis" / "nans.pdf").is_file()
