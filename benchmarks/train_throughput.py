"""Tokens per second, MFU and peak memory of a training step: this project, Hugging Face Trainer and the peers, in one run.

    python benchmarks/train_throughput.py --shape tiny --peers DIR

Each contestant is a process of its own. On a CPU all are warmed up first and then take turns, sample by sample, so that other work
on the machine slows all of them alike; on a GPU they run one after the other, each with the GPU to itself. Figures are medians over
the samples, and every sample is in the JSON. MFU: tokens/s * (6 N + 12 L D T) / peak, with ln_removal.config.estimate's table of peaks.

DIR holds checkouts of ApolloResearch/gpt2_noLN and submarat/removing-layer-norm in folders whose names contain those of the
repositories. Their code is run where it lies and is no part of this project; without --peers they are left out. `--before DIR`
adds another version of this project, whose checkout is in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import cores, device_label, machine, spread, table, write_result
from pacing import Contestant
from shapes import SHAPES, Shape, write_token_directory

HERE = Path(__file__).parent

WHAT = {
    "ours": "this project: freezable norms, all real, compiled, statistics gathered",
    "ours_teacher": "this project with the losses of recipes/gpt2.toml: teacher, std loss at every norm",
    "ours_documents": "this project on rows of documents (data.windows), padding counted as tokens",
    "ours_before": "this project as it is in the checkout of --before",
    "ours_eager": "this project, not compiled",
    "hf_trainer_compiled": "Hugging Face Trainer, GPT2LMHeadModel, SDPA, torch_compile",
    "hf_trainer": "Hugging Face Trainer, GPT2LMHeadModel, SDPA, not compiled",
    "gpt2_noln": "gpt2_noLN: its train.py, not compiled as in its config (dropout 0)",
    "removing_layer_norm": "removing-layer-norm: its LayerNorm wrapper and Trainer arguments, dropout 0, masters in float32",
    "removing_layer_norm_as_published": "removing-layer-norm as published: bfloat16 weights, dropout 0.1",
}
OURS = ("ours", "ours_teacher", "ours_documents", "ours_before", "ours_eager")
PEER_FOLDERS = {
    "gpt2_noln": "gpt2_noLN",
    "removing_layer_norm": "removing-layer-norm",
    "removing_layer_norm_as_published": "removing-layer-norm",
}


def main() -> None:
    """Measure every shape and precision asked for; the device's result file is written after each contestant or round."""
    options = _parse()
    label = device_label(options.device)
    path = options.out or HERE / "results" / f"train_throughput-{label}.json"
    about = machine(options.device, options.threads)
    runs = [] if options.fresh else _earlier_runs(path, about if options.resume else None)
    failed = []
    for name in options.shape:
        for precision in options.precision:
            before = [old for old in runs if (old["shape"], old["precision"]) == (name, precision)]
            others = [old for old in runs if old not in before]
            run: dict[str, Any] = {}
            for run in measure(name, precision, options, before[0] if before else {}):
                runs = [*others, run]
                write_result(f"train_throughput-{label}", {"machine": about, "runs": runs}, path)
            print(report(run), flush=True)
            failed += [who for who in _chosen(options, precision, SHAPES[name]) if not _whole(run, who)]
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}")


def measure(name: str, precision: str, options: argparse.Namespace, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All contestants on one shape in one precision, as far as they are, after each contestant or round.

    Figures of `before`, an earlier run of this kind, are kept; with --resume, what is whole there is not measured again.
    """
    shape = SHAPES[name]
    cuda = options.device.startswith("cuda")
    tokens_per_step = options.tokens_per_step or (shape.tokens_per_step if cuda else 8 * shape.context)
    earlier = before if before.get("tokens_per_step") == tokens_per_step else {}
    chosen = [who for who in _chosen(options, precision, shape) if not (options.resume and _whole(earlier, who))]
    one_by_one = cuda and not options.together
    run = {
        "shape": name,
        "architecture": asdict(shape),
        "precision": precision,
        "tokens_per_step": tokens_per_step,
        "order": "one after the other" if one_by_one else "in turns, sample by sample",
        "flops_per_token": _flops_per_token(shape),
        "peak_flops": _peak(precision, options.device),
        "contestants": dict(earlier.get("contestants", {})),
    }
    yield run
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        write_token_directory(shape, tokens, max(2**22, 4 * tokens_per_step))

        def start(who: str, micro_batch: int) -> Contestant:
            return _start(who, shape, precision, tokens_per_step, micro_batch, tokens, options)

        for contestants in (_one_by_one if one_by_one else _in_turns)(chosen, start, shape, options):
            for entry in map(_entry, contestants):
                run["contestants"][entry["name"]] = _summary(entry, shape, precision, tokens_per_step, options)
            yield run


def _chosen(options: argparse.Namespace, precision: str, shape: Shape) -> list[str]:
    return [who for who in _available(options, precision, shape) if who in (options.only or WHAT)]


def _whole(run: dict[str, Any], who: str) -> bool:
    """Whether a contestant has all its samples."""
    entry = run.get("contestants", {}).get(who, {"error": "not measured"})
    return "error" not in entry and entry.get("whole", True)


def _earlier_runs(path: Path, about: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The runs of a result file; none where it is of another machine than `about`, or broken."""
    try:
        earlier = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if about is not None and any(earlier["machine"].get(key) != about.get(key) for key in ("gpu", "cpu")):
        return []
    return list(earlier["runs"])


def report(run: dict[str, Any]) -> str:
    """A run as a text table."""
    rows = [["", "tokens/s", "MFU", "peak memory", "ours is"]]
    ours = run["contestants"].get("ours", {}).get("tokens_per_second", {}).get("median")
    for name, entry in run["contestants"].items():
        if "error" in entry:
            rows.append([name, "failed", "", "", ""])
            continue
        speed = entry["tokens_per_second"]["median"]
        mfu = f"{entry['mfu']:.1%}" if entry["mfu"] is not None else "-"
        factor = f"{ours / speed:.2f} x" if ours else "-"
        rows.append([name, f"{speed:,.0f}", mfu, f"{entry['peak_memory_bytes'] / 2**30:.2f} GiB", factor])
    return f"\n{run['shape']}, {run['precision']}, {run['tokens_per_step']:,} tokens a step\n{table(rows)}"


def _available(options: argparse.Namespace, precision: str, shape: Shape) -> list[str]:
    names = [*OURS, "hf_trainer_compiled", "hf_trainer"]
    names = [name for name in names if name != "ours_before" or options.before is not None]
    if options.peers is not None:
        # Its table of constants ends at layer 11.
        names += ["gpt2_noln"] if shape.n_layer <= 12 else []
        names += ["removing_layer_norm"]
        names += ["removing_layer_norm_as_published"] if precision == "bfloat16" else []
    return names


def _start(
    who: str,
    shape: Shape,
    precision: str,
    tokens_per_step: int,
    micro_batch: int,
    tokens: Path,
    options: argparse.Namespace,
) -> Contestant:
    settings: dict[str, Any] = {
        "shape": asdict(shape),
        "precision": precision,
        "tokens_per_step": tokens_per_step,
        "tokens": str(tokens),
        "device": options.device,
        "compile": who != "ours_eager" and (who in OURS or who == "hf_trainer_compiled"),
        "warmup_steps": 10 if who in OURS else options.warmup_steps,
        "sample_steps": 10 if who in OURS else options.sample_steps,
    }
    if who in OURS:
        settings["teacher"] = who == "ours_teacher"
        if who == "ours_teacher" and options.stages:  # a freeze falls on the first step of a sample
            share = 10 * (options.samples // 3)
            settings |= {"half_at": 10 + share, "all_at": 10 + 2 * share, "watch_syncs": True}
        settings |= {"windows": "document"} if who == "ours_documents" else {}
        if options.together or options.micro_batch:
            settings["micro_batch"] = min(micro_batch, tokens_per_step // shape.context)
    else:
        settings |= {"micro_batch": micro_batch, "weights": "float32", "dropout": 0.0}
    if who in PEER_FOLDERS:
        settings["peer"] = str(_peer(options.peers, PEER_FOLDERS[who]))
    if who == "removing_layer_norm_as_published":
        settings |= {"weights": "bfloat16", "dropout": 0.1}
    script = "ours.py" if who in OURS else "gpt2_noln.py" if who == "gpt2_noln" else "hf_trainer.py"
    benchmarks = options.before.resolve() / "benchmarks" if who == "ours_before" else HERE
    environment = {
        "PYTHONPATH": os.pathsep.join([str(benchmarks), str(benchmarks.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
    }
    print(f"{who}: starting", file=sys.stderr, flush=True)
    waits = who != "ours_before" or "warm_up" in (benchmarks / "pacing.py").read_text()
    return Contestant(who, benchmarks / "contestants" / script, settings, environment, options.turns, waits=waits)


def _in_turns(names: list[str], start: Any, shape: Shape, options: argparse.Namespace) -> Iterator[list[Contestant]]:
    """Warm up one contestant after the other, or with --together all at once; then sample them in turns."""
    running: list[Contestant] = []
    try:
        running += [start(name, options.micro_batch or shape.peer_micro_batch) for name in names]
        for contestant in running:
            if options.together:
                contestant.warm_up()
        for contestant in running:
            contestant.wait_until_ready(options.limit)
        for _ in range(options.samples):
            for contestant in running:
                if contestant.alive:
                    contestant.sample(options.limit)
            yield running
    finally:
        for contestant in running:
            contestant.stop()
    yield running


def _one_by_one(names: list[str], start: Any, shape: Shape, options: argparse.Namespace) -> Iterator[list[Contestant]]:
    """Each contestant with the GPU to itself, while the next ones import; a micro-batch that does not fit is halved."""
    largest = options.micro_batch or shape.peer_micro_batch
    waiting: dict[str, Contestant] = {name: start(name, largest) for name in names}
    try:
        for name in names:
            micro_batch = largest
            while True:
                contestant = waiting[name]
                contestant.wait_until_ready(options.limit)
                for _ in range(options.samples):
                    if contestant.alive:
                        contestant.sample(options.limit)
                contestant.stop()
                if not contestant.ran_out_of_memory or micro_batch == 1:
                    break
                micro_batch //= 2
                waiting[name] = start(name, micro_batch)
            yield [waiting.pop(name)]
    finally:
        for contestant in waiting.values():
            contestant.stop()


def _entry(contestant: Contestant) -> dict[str, Any]:
    error = contestant.error or ("out of memory with one sequence" if contestant.ran_out_of_memory else None)
    if error:
        print(f"{contestant.name}: {error}", file=sys.stderr)
    return {
        "name": contestant.name,
        "settings": contestant.settings,
        "samples": contestant.samples,
        "warmup_seconds": contestant.ready.get("seconds"),
        "end": contestant.end,
        "error": error,
    }


def _summary(
    entry: dict[str, Any], shape: Shape, precision: str, tokens_per_step: int, options: argparse.Namespace
) -> dict[str, Any]:
    what = {"what": WHAT[entry["name"]], "precision": _precision_in_words(entry["settings"], options.device)}
    if entry["error"] or not entry["samples"]:
        return {**what, "error": entry["error"] or "no sample"}
    speeds = [sample["steps"] * tokens_per_step / sample["seconds"] for sample in entry["samples"]]
    figures = spread(speeds)
    peak = _peak(precision, options.device)
    last = entry["samples"][-1]
    stages = {key: [sample[key] for sample in entry["samples"]] for key in ("stage", "graphs") if key in last}
    return {
        **what,
        "tokens_per_second": figures,
        "mfu": figures["median"] * _flops_per_token(shape) / peak if peak else None,
        "peak_memory_bytes": entry["end"].get("peak_memory", last.get("peak_memory", 0)),
        "peak_memory_is": "CUDA allocator" if options.device.startswith("cuda") else "resident set while sampling",
        "warmup_seconds": entry["warmup_seconds"],
        "steps_a_sample": entry["settings"]["sample_steps"],
        "seconds": [sample["seconds"] for sample in entry["samples"]],
        "whole": len(speeds) >= options.samples,
        "by_sample": stages,
        **{key: value for key, value in entry["end"].get("details", {}).items() if key != "loss"},
    }


def _precision_in_words(settings: dict[str, Any], device: str) -> str:
    if settings["precision"] == "float32":
        return "float32 (TensorFloat-32 matrix products)" if device.startswith("cuda") else "float32"
    return f"bfloat16 autocast, weights and moments in {settings.get('weights', 'float32')}"


def _flops_per_token(shape: Shape) -> int:
    from ln_removal.config.estimate import flops_per_token
    from ln_removal.config.recipe import ArchitectureSpec

    sizes = {key: getattr(shape, key) for key in ("family", "n_layer", "n_head", "n_embd", "vocab_size")}
    return flops_per_token(ArchitectureSpec(n_positions=shape.context, **sizes), shape.context)


def _peak(precision: str, device: str) -> float | None:
    """FLOP/s of the device in this precision; None on a CPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    from ln_removal.config.estimate import peak_of

    peak = peak_of(torch.cuda.get_device_name(0))
    return None if peak is None else peak.bfloat16 if precision == "bfloat16" else peak.float32


def _peer(directory: Path, name: str) -> Path:
    found = sorted(path for path in directory.iterdir() if path.is_dir() and name in path.name)
    if not found:
        raise SystemExit(
            f"--peers {directory}: no folder there has {name} in its name; check the repository out into it"
        )
    return found[0].resolve()


def _parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["tiny"], choices=list(SHAPES))
    parser.add_argument("--precision", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--peers", type=Path, help="folder with checkouts of the peers; default: leave them out")
    parser.add_argument("--before", type=Path, help="checkout of another version of this project, to compare with")
    parser.add_argument("--only", nargs="+", choices=list(WHAT), help="only these contestants")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--sample-steps", type=int, help="steps in a sample (ours: always 10); default 10, on a GPU 3")
    parser.add_argument(
        "--warmup-steps", type=int, help="steps before the first sample (ours: 10); default 5, on a GPU 3"
    )
    parser.add_argument("--tokens-per-step", type=int, help="default: by shape on a GPU, 8 sequences on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each contestant")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a warm-up or a sample may take")
    parser.add_argument(
        "--together", action="store_true", help="warm all up at once and sample them in turns, on a GPU too"
    )
    parser.add_argument(
        "--micro-batch", type=int, help="sequences a pass; default: by shape (on a CPU ours chooses its own)"
    )
    parser.add_argument(
        "--stages", action="store_true", help="`ours_teacher` freezes half, then all norms, and counts synchronisations"
    )
    parser.add_argument(
        "--turns", type=Path, help="a file to lock in each sample, where several of this script run at once"
    )
    parser.add_argument("--fresh", action="store_true", help="drop the runs that the result file already holds")
    parser.add_argument(
        "--resume", action="store_true", help="do not measure again what the result file has from this machine"
    )
    parser.add_argument(
        "--out", type=Path, help="result file; default benchmarks/results/train_throughput-<device>.json"
    )
    options = parser.parse_args()
    cuda = options.device == "cuda"
    options.sample_steps = options.sample_steps or (3 if cuda else 10)
    options.warmup_steps = options.warmup_steps or (3 if cuda else 5)
    return options


if __name__ == "__main__":
    main()
