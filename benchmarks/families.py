"""A tiny model of each family, pretrained and then robbed of its norms: how large is the gap to the control?

    ln-prepare python-source --tokenizer tiny --max-tokens 4000000 --out /tmp/python
    python benchmarks/families.py --tokens /tmp/python --out /tmp/families

Each family has a model of 4 layers, by default of width 128, trained on Python source with Muon. Its norms are removed on the same
batches by several methods: "staged" is the schedule of recipe `tiny`, in which every site begins one step after the one before, and
in "together" all sites begin in step 1. Both have that recipe's losses, with the original as the teacher. "gated", for models with a
gated MLP, has the schedule and the pulls of recipe `gated`, and the learning rate and the teacher of the others. The control is
fine-tuned on the same batches with its norms. All runs are complete ones: folded, verified, exported, scored and reported. What is
done already is not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import RESULTS, machine

from ln_removal.config.family_parts import FAMILY_PARTS
from ln_removal.config.presets import with_layers, with_steps
from ln_removal.config.recipe import Recipe, load_recipe, with_overrides
from ln_removal.evaluation import results as results_file
from ln_removal.files.metrics_log import METRICS_FILE, metrics_rows
from ln_removal.pipelines.pretraining import pretrain
from ln_removal.pipelines.removal import remove

LAYERS, CONTEXT, WIDTH_OF_HEAD = 4, 128, 32

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "pythia": {},
    "llama": {"n_kv_head": 1, "tied": True},
    "qwen2": {"n_kv_head": 1, "tied": True},
}
"""What each model has of its own in [architecture]: SmolLM2 and the small Qwen2.5 share keys and tie their unembedding."""

METHODS: dict[str, dict[str, Any]] = {
    "staged": {},
    "together": {
        **dict.fromkeys(("schedule.ln_2_gap", "schedule.qk_gap", "schedule.v_gap"), 0),
        **dict.fromkeys(("schedule.ln_2_start", "schedule.qk_start", "schedule.v_start", "schedule.ln_f_at"), 1),
        "schedule.taper": 19,
        "schedule.special_taper": 49,
    },
    "gated": {},
}
"""Changes to recipe `tiny`, of 200 steps; "gated" takes them from that recipe."""

TAKEN = ("std_statistic", "auxiliary_weight", "auxiliary_early", "outlier_weight", "outlier_ratio")
"""What "gated" has from [training] of that recipe."""


def pretraining(family: str, steps: int, width: int) -> Recipe:
    """The recipe of a model to start from."""
    architecture = {
        "family": family,
        "n_layer": LAYERS,
        "n_head": width // WIDTH_OF_HEAD,
        "n_embd": width,
        "n_positions": CONTEXT,
        "vocab_size": 4096,
        **FAMILIES[family],
    }
    recipe = load_recipe(
        "tiny-gpt2",
        {
            "name": f"tiny-{family}",
            "data.tokenizer": "tiny",
            "data.context": CONTEXT,
            "architecture": architecture,
            "training.tokens_per_step": 4096,
            "training.micro_batch": "auto",
            "training.compile": False,
            "export.dtype": "float32",
        },
    )
    return with_steps(recipe, steps)


def removal(model: Path, method: str, steps: int, changes: dict[str, Any]) -> Recipe:
    """The recipe of a removal: `tiny`, fitted to the depth, changed by one of METHODS."""
    recipe = with_layers(load_recipe("tiny", {"model": str(model), "name": method}), written_for=6, n_layer=LAYERS)
    changed = dict(METHODS[method])
    if method == "gated":
        taken = with_steps(load_recipe("gated"), recipe.training.steps)
        changed = {f"training.{key}": getattr(taken.training, key) for key in TAKEN}
        changed["schedule"] = taken.schedule.model_dump(exclude_none=True) if taken.schedule is not None else {}
    changed |= {"data.context": CONTEXT, "training.compile": False, "export.formats": ["normfree"]}
    return with_overrides(with_steps(with_overrides(recipe, changed), steps), changes)


def methods_of(family: str) -> list[str]:
    """The methods for a family: "gated" for gated MLPs alone."""
    return [method for method in METHODS if method != "gated" or FAMILY_PARTS[family].gated]


def run_family(family: str, given: argparse.Namespace) -> dict[str, Any]:
    """Losses of the original, the control and both LN-free models of one family, and the curves of their trainings."""
    place: Path = given.out / family
    done = (place / "pretrained" / "model" / "config.json").is_file()
    if not done:
        pretrain(
            pretraining(family, given.pretraining_steps, given.width),
            place / "pretrained",
            tokens=given.tokens,
            resume=(place / "pretrained" / "recipe.toml").is_file(),
            device=given.device,
            progress="lines",
        )
    found: dict[str, Any] = {"runs": {}}
    for number, method in enumerate(methods_of(family)):
        out = place / method
        began = time.perf_counter()
        results = remove(
            removal(place / "pretrained" / "model", method, given.steps, given.changes),
            out,
            tokens=given.tokens,
            control=number == 0,  # the second one would be the same
            questions=None,
            resume=(out / "recipe.toml").is_file(),
            device=given.device,
            progress="lines",
        )
        losses = results.cross_entropy
        if number == 0:
            found |= {"original": losses.original, "control": losses.control}
        found["runs"][method] = {
            "cross_entropy": losses.ln_free,
            "gap": losses.ln_free - found["control"],
            "seconds": round(time.perf_counter() - began, 1),
            "training": [row["loss"] for row in metrics_rows(out / METRICS_FILE) if row["kind"] == "train"],
            "recipe": results_recipe(out),
        }
    return found


def results_recipe(out: Path) -> dict[str, Any]:
    """The recipe of a run, as plain values."""
    results_file.read(out / "results.json")  # it is complete
    return load_recipe(out / "recipe.toml").model_dump(mode="json", exclude={"description", "model"})


def table(families: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row a family."""
    lines = [
        "| family | original | control | " + " | ".join(f"LN-free, {name} | gap" for name in METHODS) + " |",
        "|---|" + "---:|" * (2 + 2 * len(METHODS)),
    ]
    for family, found in families.items():
        cells = [f"{found['original']:.4f}", f"{found['control']:.4f}"]
        for method in METHODS:
            run = found["runs"].get(method)
            cells += ["", ""] if run is None else [f"{run['cross_entropy']:.4f}", f"{run['gap']:+.4f}"]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help="of the tokenizer of `tiny`, from ln-prepare")
    parser.add_argument("--out", type=Path, required=True, help="a directory for all runs")
    parser.add_argument("--families", nargs="+", default=[*FAMILIES], choices=[*FAMILIES])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--pretraining-steps", type=int, default=400, help="of 4,096 tokens")
    parser.add_argument("--steps", type=int, default=200, help="of each removal, of 4,096 tokens")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the removals' recipe")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, default=RESULTS / "families.json")
    given = parser.parse_args()

    from ln_removal.config.recipe import parse_overrides

    given.changes = parse_overrides(given.set)
    families: dict[str, dict[str, Any]] = {}
    for family in given.families:
        families[family] = run_family(family, given)
        print(table(families), flush=True)
        report = {
            "machine": machine(given.device),
            "width": given.width,
            "pretraining_steps": given.pretraining_steps,
            "steps": given.steps,
        }
        given.json.write_text(json.dumps(report | {"families": families}, indent=1) + "\n")


if __name__ == "__main__":
    main()
