"""A finished run as files, made up but whole: what the tests of the report start from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from ln_removal.config.recipe import dump_toml, load_recipe
from ln_removal.evaluation.results import (
    ByRole,
    Calibration,
    DataScores,
    Difference,
    LossSpread,
    PositionLoss,
    PromptScores,
    ResidualStd,
    Results,
    Samples,
    Settings,
    StressText,
    WorstSample,
    write,
)

SCRIPT = "<script>document.title = 'planted'</script>"
IMAGE = "<img src=x onerror=\"document.title = 'planted'\">"
LOSSES = {"original": 2.7281, "control": 2.7689, "ln_free": 2.8262}
LAYERS = 3
STEPS = 60


def results(*, text: str = "plain") -> Results:
    """All that results.json can hold; `text` stands wherever text of a corpus or of a user can."""
    spreads = {
        role: LossSpread(standard_error=0.0222, median=loss - 0.7, percentile_95=loss + 5, percentile_99_9=loss + 10)
        for role, loss in LOSSES.items()
    }
    gap = LOSSES["ln_free"] - LOSSES["control"]
    difference = Difference(
        model="ln_free", than="control", mean=gap, low=0.05, high=0.06, confidence=0.95, unit="documents", units=57
    )
    bins = {
        role: tuple(PositionLoss(first=p, last=2 * p, loss=loss + 3 / (p + 1), tokens=64) for p in (0, 1, 3, 7, 15, 31))
        for role, loss in LOSSES.items()
    }
    sample = WorstSample(
        ranked_by="ln_free",
        loss=ByRole[float](original=3.5, control=3.6, ln_free=4.25),
        tokens=512,
        shard=0,
        start=1024,
        position=100,
        token_loss=13.5,
        before=f"before \f\x00 {text}",
        token=text,
        after=f"{text}\n\tafter \ufffd",
    )
    data = DataScores(
        data=f"python-source {text}",
        tokens=262_144,
        windows=512,
        context=512,
        stride=512,
        cross_entropy=ByRole[float](**LOSSES),
        bits_per_byte=ByRole[float](original=1.07, control=1.09, ln_free=1.11),
        loss_spread=ByRole[LossSpread](**spreads),
        differences=(difference,),
        calibration=ByRole[Calibration](
            **{
                role: Calibration(expected_calibration_error=0.0123, top_1_accuracy=0.45, confidence=0.46, entropy=2.7)
                for role in LOSSES
            }
        ),
        by_position=ByRole[tuple[PositionLoss, ...]](**bins),
        worst=(sample, sample),
    )
    stds = {
        role: ResidualStd(
            ordinary_pre=tuple(0.1 + layer for layer in range(LAYERS + 1)),
            ordinary_mid=tuple(0.5 + layer for layer in range(LAYERS)),
            first_pre=tuple(0.3 + 5 * layer for layer in range(LAYERS + 1)),
            first_mid=tuple(0.9 + 5 * layer for layer in range(LAYERS)),
            tokens=16_384,
        )
        for role in LOSSES
    }
    odd = StressText(
        kind="tabs",
        sequences=16,
        context=512,
        loss=ByRole[float](**LOSSES),
        median=ByRole[float](**LOSSES),
        worst=ByRole[float](original=9.5, control=9.6, ln_free=99.125),
        ranked_by="ln_free",
        sample=f"\t\t{text}",
    )
    return Results(
        models=ByRole[str](original=f"tiny {text}", control="run/control/model", ln_free="run/model"),
        cross_entropy=ByRole[float](**LOSSES),
        bits_per_byte=data.bits_per_byte,
        accuracy=ByRole[float](original=0.761, control=0.759, ln_free=0.7545),
        accuracy_standard_error=ByRole[float](original=0.0095, control=0.0096, ln_free=0.0097),
        loss_spread=data.loss_spread,
        gap=gap,
        tokens=262_144,
        seconds=317.1,
        device="cpu",
        settings=Settings(
            data=data.data, context=512, questions=2000, question_set=f"completions {text}", protocol="code"
        ),
        prompts=prompts(),
        by_data=(data, data.model_copy(update={"data": "wikitext"})),
        residual_std=ByRole[ResidualStd](**stds),
        odd_text=(odd, odd.model_copy(update={"bos": True})),
        continuations=(
            Samples(
                prompt=f"def {text}",
                temperature=0.8,
                seed=0,
                texts=ByRole[str](original=text, control=text, ln_free=text),
            ),
        ),
    )


def prompts() -> tuple[PromptScores, ...]:
    """Losses on two kinds of prompt: BOS adds 0.25 nats to the LN-free model's gap of the second, nothing to that of the first."""
    losses = {
        ("document start", False): (3.3125, 3.3625, 3.4125),
        ("document start", True): (3.2925, 3.3425, 3.3925),
        ("second copy, text", False): (0.885, 0.945, 0.995),
        ("second copy, text", True): (0.905, 0.955, 1.255),
    }
    return tuple(
        PromptScores(
            kind=kind,
            bos=bos,
            sequences=56,
            tokens=7112,
            loss=ByRole[float](original=original, control=control, ln_free=ln_free),
            differences=(
                Difference(
                    model="ln_free",
                    than="control",
                    mean=ln_free - control,
                    low=ln_free - control - 0.01,
                    high=ln_free - control + 0.02,
                    confidence=0.95,
                    unit="prompts",
                    units=56,
                ),
            ),
        )
        for (kind, bos), (original, control, ln_free) in losses.items()
    )


def write_run(directory: Path, *, text: str = "plain") -> Path:
    """results.json, metrics.jsonl of removal and control, recipe.toml, training.json, a checkpoint's constants."""
    (directory / "control").mkdir(parents=True)
    found = results(text=text)
    write(found, directory / "results.json")
    recipe = load_recipe("tiny").model_copy(update={"name": f"tiny {text}", "description": f"A run. {text}"})
    (directory / "recipe.toml").write_text(dump_toml(recipe), encoding="utf-8")
    (directory / "training.json").write_text(json.dumps({"tokens": 819_200, "seconds": 93.8, "skipped_steps": 0}))
    for place, offset in ((directory, 0.1), (directory / "control", 0.0)):
        rows: list[dict[str, object]] = []
        for step in range(STEPS):
            loss = 2.5 + offset + math.exp(-step / 10)
            rows.append({"kind": "train", "step": step, "loss": None if step == 40 else loss})
        rows.append({"kind": "evaluation", "step": STEPS, "cross_entropy": 2.8 + offset})
        if offset:
            for number, site in enumerate(["ln_2.0", "ln_1_qk.0", "ln_1_v.0", "ln_f", "eot", "first"]):
                rows.append({"kind": "event", "step": 5 + 4 * number, "site": site, "action": "freeze", "value": 0.5})
                rows.append({"kind": "event", "step": 8 + 4 * number, "site": site, "action": "freeze", "value": 1.0})
        lines = [json.dumps(row) for row in rows]
        (place / "metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tra', encoding="utf-8")
    write_checkpoint(directory / "state" / f"step-{STEPS:06d}")
    return directory


def write_checkpoint(directory: Path) -> None:
    """The constants alone: ordinary 1.5 + layer, end-of-text 2, position 0 17.25."""
    directory.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for name, readers in ((f"h.{layer}.attn.c_attn.norm", 2), (f"h.{layer}.ln_2", 1)):
            captured = torch.tensor([[1.5 + layer, 2.0, 17.25]] * readers)
            tensors[f"transformer.{name}.captured_std"] = captured
            tensors[f"transformer.{name}.frozen_std"] = captured[:, :1].expand(-1, 3).contiguous()
    tensors["transformer.ln_f.captured_std"] = torch.tensor([[5.625, 5.0, 4.0]])
    tensors["transformer.ln_f.frozen_std"] = torch.full((1, 3), 5.625)
    save_file(tensors, directory / "model.safetensors")
