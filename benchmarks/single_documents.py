"""A model that was trained on single documents loses its LayerNorms: in windows of a stream, and in documents.

    python benchmarks/single_documents.py --work DIR                     # about 10 minutes on one core

A GPT-2 of 0.9M parameters is trained on functions of Python's standard library, each one a document
(`data.windows = "document"`). It has never seen a second document behind the first, nor most of its positions. Then, for each
seed: `remove` with the method of recipes/tiny.toml in document mode, the schedule of Baroni et al. 2025 (the arm "paper-2" of
removal_arms.py) in document mode, and their control; for the first seed also `remove` in stream mode and its control. A gap is
the loss on held-out documents, each read from its start, minus that of the control of the same mode and seed. DIR keeps what is
done, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import random
import shutil
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import machine, table, write_result
from removal_arms import ARMS
from removal_quality import BASE, train_one

from ln_removal.config.presets import with_layers, with_steps
from ln_removal.config.recipe import Recipe, TrainingSpec, WindowKind, load_recipe, validate_recipe, with_overrides
from ln_removal.data.encoder import train_code_tokenizer
from ln_removal.data.tokens import Shard, TokenDataset, TokenIndex, write_index
from ln_removal.evaluation.loss import cross_entropy
from ln_removal.files.atomic import checksum
from ln_removal.files.metrics_log import METRICS_FILE, WINDOWS, metrics_rows
from ln_removal.models.loading import load_config, load_model, tokenizer_fingerprint
from ln_removal.pipelines.pretraining import pretrain
from ln_removal.pipelines.removal import remove

CONTEXT, LAYERS, VOCABULARY = 256, 4, 512
SHORTEST, LONGEST = 16, 120
"""Tokens of a document. The longest fill half a context, so a stream shows positions that the model does not know."""

HELD_OUT = 400
"""Documents that are scored."""


def write_functions(directory: Path) -> TokenDataset:
    """The functions of the standard library as prepared tokens, unless they are there."""
    if (directory / "index.json").exists():
        return TokenDataset.open(directory)
    sources = set()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and "test" not in path.parts:
            sources |= set(_functions(path))
    texts = sorted(sources)
    random.Random(0).shuffle(texts)
    tokenizer = train_code_tokenizer(iter(texts), VOCABULARY, model_max_length=CONTEXT)
    tokenizer.save_pretrained(directory / "tokenizer")
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    documents = [[*ids, tokenizer.eos_token_id] for ids in encoded if SHORTEST <= len(ids) < LONGEST]
    name = {"name": str(directory / "tokenizer"), "sha256": tokenizer_fingerprint(tokenizer)}
    index = TokenIndex({"name": "functions"}, name, len(tokenizer), tokenizer.eos_token_id, "uint16")
    for split, chosen in (("train", documents[HELD_OUT:]), ("validation", documents[:HELD_OUT])):
        file, data = f"{split}-functions-00000.bin", np.concatenate(chosen).astype(np.uint16)
        data.tofile(directory / file)
        shard = Shard(file, split, "functions", len(data), len(chosen), 0, checksum(directory / file))  # type: ignore[arg-type]
        index.shards.append(shard)
    write_index(directory, index)
    return TokenDataset.open(directory)


def _functions(path: Path) -> list[str]:
    """The text of each function and method in a file, without its indentation."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [ast.unparse(node) + "\n" for node in found]


def model_of(work: Path, tokens: Path, steps: int) -> Path:
    """The model that knows single documents, trained unless it is there."""
    if not (work / "model" / "config.json").exists():
        recipe = {
            "name": "functions",
            "model": "functions",
            "data": {"corpus": "functions", "context": CONTEXT, "windows": "document"},
            "architecture": {
                "n_layer": LAYERS,
                "n_head": 4,
                "n_embd": 128,
                "n_positions": CONTEXT,
                "vocab_size": VOCABULARY,
            },
            "training": {
                "steps": steps,
                "tokens_per_step": 2_048,
                "learning_rate": 3e-3,
                "minimum_learning_rate": 1e-4,
                "warmup_steps": 20,
                "precision": "float32",
                "compile": False,
                "evaluate_every": 100,
                "checkpoint_every": 100_000,
            },
        }
        pretrain(validate_recipe(recipe, source="of this benchmark"), work, tokens=tokens, progress="lines")
    return work / "model"


def recipe_of(arm: str, model: Path, seed: int, steps: int) -> Recipe:
    """The method of the tiny recipe, or the published schedule, on windows of the kind that the arm's name ends with."""
    windows = arm.rpartition(" ")[2]
    changes: dict[str, object] = {
        **{key: value for key, value in BASE.items() if key.startswith(("data.", "export."))},
        "data.windows": windows,
        "data.weights": {},
        "data.context": CONTEXT,
        "model": str(model),
        "name": arm,
        "seed": seed,
        "training.tokens_per_step": 2_048,
        "training.precision": "float32",
        "training.compile": False,
        "training.evaluate_every": 100_000,
        "training.checkpoint_every": 100_000,
    }
    if arm.startswith("published"):
        schedule = ARMS["paper-2"].schedule(LAYERS, steps).model_dump(exclude_none=True)
        training = {key: value for key, value in BASE.items() if key.startswith("training.")}
        return load_recipe("tiny", {**training, **changes, "schedule": schedule, "training.steps": steps})
    default = with_layers(load_recipe("tiny"), written_for=load_config("tiny").n_layer, n_layer=LAYERS)
    # A model of one's own gets the default lag; the one of `tiny` is for a model that fine-tuning does not improve.
    lag = TrainingSpec.model_fields["distillation_lag"].default
    return with_overrides(with_steps(default, steps), {**changes, "training.distillation_lag": lag})


def run(recipe: Recipe, tokens: Path, work: Path, *, control: bool) -> dict[str, Any]:
    """Train one arm or one control; returns its losses on both kinds of windows, and what `remove` warned of."""
    began, said = time.perf_counter(), io.StringIO()
    shutil.rmtree(work, ignore_errors=True)
    if control:
        train_one(recipe, tokens, work, control=True, device="cpu")
    else:
        with contextlib.redirect_stderr(said):
            remove(recipe, work, tokens=tokens, questions=None, device="cpu", progress=False)
    model = work / ("control/model" if control else "model")
    result: dict[str, Any] = {
        **losses(model, tokens),
        "warnings": [line for line in said.getvalue().splitlines() if line.startswith("warning")],
        "before": next((row for row in metrics_rows(work / METRICS_FILE) if row["kind"] == WINDOWS), None),
        "seconds": round(time.perf_counter() - began, 1),
    }
    shutil.rmtree(work)
    return result


def losses(model: Path, tokens: Path) -> dict[str, float]:
    """Loss on the held-out text, in nats per token: of documents from their start, and of windows of the stream."""
    split, loaded = TokenDataset.open(tokens).split("validation"), load_model(str(model)).model
    kinds: tuple[WindowKind, ...] = ("document", "stream")
    return {kind: cross_entropy(loaded, split, context=CONTEXT, windows=kind).cross_entropy for kind in kinds}


CONTROLS = ("control document", "control stream")
REMOVALS = ("default document", "published document", "default stream")
"""A stream, the wrong kind of windows, is shown with the first seed only."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=150, help="of a removal; in fewer, layer by layer is not possible")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    tokens = given.work / "tokens"
    data = write_functions(tokens)
    model = model_of(given.work / "pretraining", tokens, given.model_steps)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in given.seeds:
        for arm in (*REMOVALS, *CONTROLS) if seed == given.seeds[0] else (*REMOVALS[:2], CONTROLS[0]):
            file = given.work / f"{arm.replace(' ', '-')}-{seed}-{given.steps}.json"
            if not file.exists():
                recipe = recipe_of(arm, model, seed, given.steps)
                result = run(recipe, tokens, given.work / "run", control=arm in CONTROLS)
                file.write_text(json.dumps(result, indent=1))
            found.setdefault(arm, {})[seed] = json.loads(file.read_text())
            print(f"{arm}, seed {seed}: {found[arm][seed]['document']:.3f}", flush=True)
    original = losses(model, tokens)
    gaps = {
        arm: [
            result["document"] - found[f"control {arm.split()[1]}"][seed]["document"]
            for seed, result in found[arm].items()
        ]
        for arm in REMOVALS
    }
    rows = [["nats per token, held out", "documents", "stream", "gap to control"]]
    rows.append(["original", f"{original['document']:.3f}", f"{original['stream']:.3f}", ""])
    for arm, by_seed in found.items():
        means = [statistics.mean(result[kind] for result in by_seed.values()) for kind in ("document", "stream")]
        rows.append(
            [arm, *(f"{mean:.3f}" for mean in means), f"{statistics.mean(gaps[arm]):+.4f}" if arm in gaps else ""]
        )
    print(table(rows))
    result = {
        "machine": machine("cpu", 1),
        "train_tokens": data.split("train").tokens,
        "train_documents": data.split("train").documents,
        "original": original,
        "steps": given.steps,
        "gaps": {arm: {"mean": statistics.mean(values), "by_seed": values} for arm, values in gaps.items()},
        "default_over_published": statistics.mean(gaps["default document"])
        / statistics.mean(gaps["published document"]),
        "runs": found,
    }
    write_result("single_documents", result, given.out)


if __name__ == "__main__":
    main()
