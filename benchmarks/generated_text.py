"""A removal on text that the model wrote itself, beside one on real text: equal tokens, both scored on real held-out text.

    python benchmarks/generated_text.py --tokens DIR --out DIR --seeds 0

`--tokens` is real text from ln-prepare. The model writes as many training tokens as a run reads (`ln-prepare generated`) into
OUT/generated. On each text the model loses its LayerNorms by the recipe `tiny`, and a control keeps them. A gap is between the two
of the same text. Runs that are in OUT already are not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measuring import machine, write_result
from measuring import table as aligned
from removal_quality import mean_and_error, scores, train_one

from ln_removal.config.presets import with_steps
from ln_removal.config.recipe import Recipe, load_recipe
from ln_removal.data.open_corpus import Writer, open_corpus
from ln_removal.data.prepare import prepare
from ln_removal.models.loading import load_tokenizer, tokenizer_fingerprint

VALIDATION_SHARE = 0.05


def recipe_of(model: str, seed: int, steps: int) -> Recipe:
    """The recipe `tiny` at the budget of removal_quality.py."""
    changed = {
        "model": model,
        "seed": seed,
        "data.context": 256,
        "data.weights": {},
        "data.validation_tokens": 131_072,
        "training.tokens_per_step": 2_048,
        "training.evaluate_every": 100_000,
        "training.evaluation_tokens": 32_768,
        "training.checkpoint_every": 100_000,
        "training.compile": False,
        "export.formats": ["normfree"],
    }
    return with_steps(load_recipe("tiny", changed), steps)


def written(model: str, max_tokens: int, out: Path) -> dict[str, Any]:
    """Let the model write its corpus into `out`; how long that took."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(model)
    corpus = open_corpus("generated", writer=Writer(model, max_tokens), validation_fraction=VALIDATION_SHARE)
    data = prepare(
        corpus,
        tokenizer,
        out,
        tokenizer_name=model,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        max_tokens=max_tokens,
    )
    tokens = {split: data.split(split).tokens for split in ("train", "validation")}  # type: ignore[arg-type]
    return {"tokens": tokens, "seconds": round(time.perf_counter() - began, 1)}


def trained(
    recipe: Recipe, tokens: Path, work: Path, texts: dict[str, Path], *, control: bool, device: str
) -> dict[str, Any]:
    """Train on `tokens`; the scores on the held-out part of each of `texts`."""
    began = time.perf_counter()
    model = train_one(recipe, tokens, work, control=control, device=device)
    found = {name: scores(recipe, model, place, device)["cross_entropy"] for name, place in texts.items()}
    return {"held_out": found, "seconds": round(time.perf_counter() - began, 1)}


def rows_of(runs: dict[str, dict[str, Any]], original: dict[str, float], seeds: list[int]) -> list[dict[str, Any]]:
    """One row for each text that was trained on: mean held-out losses over the seeds, and the gaps."""
    rows = []
    for text in original:
        row: dict[str, Any] = {"trained_on": text, "seeds": len(seeds)}
        for held_out in original:
            free, control = (
                [runs[f"{text}-{kind}-{seed}"]["held_out"][held_out] for seed in seeds]
                for kind in ("removal", "control")
            )
            gap = [one - other for one, other in zip(free, control, strict=True)]
            found = {
                "original": original[held_out],
                "control": mean_and_error(control),
                "ln_free": mean_and_error(free),
            }
            row[held_out] = found | {"gap": mean_and_error(gap)}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    cells = [["trained on", "scored on", "original", "control", "LN-free", "gap"]]
    for row in rows:
        for text in ("real", "generated"):
            found = row[text]
            means = [found["control"][0], found["ln_free"][0]]
            cells.append(
                [
                    row["trained_on"],
                    f"held-out {text}",
                    f"{found['original']:.4f}",
                    *(f"{mean:.4f}" for mean in means),
                    f"{found['gap'][0]:+.4f}",
                ]
            )
    return aligned(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tokens", type=Path, required=True, help="real text, prepared with the model's tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    texts = {"real": given.tokens, "generated": given.out / "generated"}
    writing = written(given.model, recipe_of(given.model, 0, given.steps).tokens, texts["generated"])
    print(f"written: {writing}", flush=True)
    runs: dict[str, dict[str, Any]] = {}
    for seed in given.seeds:
        recipe = recipe_of(given.model, seed, given.steps)
        for text, tokens in texts.items():
            for kind in ("control", "removal"):
                name = f"{text}-{kind}-{seed}"
                file = given.out / f"{name}.json"
                if not file.exists():
                    work, control = given.out / name, kind == "control"
                    found = trained(recipe, tokens, work, texts, control=control, device=given.device)
                    file.write_text(json.dumps(found))
                runs[name] = json.loads(file.read_text())
                print(name, runs[name], flush=True)
    loaded = Path(given.model) if Path(given.model).is_dir() else given.model
    recipe = recipe_of(given.model, 0, given.steps)
    original = {name: scores(recipe, loaded, place, given.device)["cross_entropy"] for name, place in texts.items()}
    rows = rows_of(runs, original, given.seeds)
    print(show(rows))
    report = {"model": given.model, "steps": given.steps, "recipe": recipe.model_dump(mode="json")}
    report |= {"machine": machine(given.device), "writing": writing, "table": rows, "runs": runs}
    write_result("generated_text", json.loads(json.dumps(report).replace("NaN", "null")), given.json)


if __name__ == "__main__":
    main()
