"""Throughput at each stage of a removal, and the graphs compiled over the whole run: freezing must cost neither.

    python benchmarks/stages.py --shape tiny

One training run goes through its stages: every norm real, the first half of the sites frozen, everything frozen and the special
constants dropped. Beside it, in turns on a CPU and after it on a GPU, a second process trains the folded model, which has no norms.
`graphs` counts what torch.compile has made by the end of a sample: it must not grow after the first. On a GPU the places where the
host waited for it are counted, too: one a log step is expected, where the losses are read.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measuring import cores, device_label, machine, spread, table, write_result
from pacing import Contestant
from shapes import SHAPES, write_token_directory

HERE = Path(__file__).parent
BLOCK = 10  # steps in a sample
STAGES = ("all real", "half frozen", "all frozen")


def main() -> None:
    """Run the stages and write benchmarks/results/stages-<device>.json."""
    options = _parse()
    shape = SHAPES[options.shape]
    cuda = options.device == "cuda"
    tokens_per_step = options.tokens_per_step or (shape.tokens_per_step if cuda else 8 * shape.context)
    with tempfile.TemporaryDirectory() as directory:
        tokens = Path(directory) / "tokens"
        write_token_directory(shape, tokens, max(2**22, 4 * tokens_per_step))
        settings: dict[str, Any] = {
            "shape": asdict(shape),
            "precision": options.precision,
            "tokens_per_step": tokens_per_step,
            "tokens": str(tokens),
            "device": options.device,
            "compile": not options.eager,
            "warmup_steps": BLOCK,
            "sample_steps": BLOCK,
            **({"micro_batch": tokens_per_step // shape.context} if options.without_folded else {}),
        }
        # One block of warm-up, then `samples` blocks a stage; a freeze falls on the first step of a block.
        first = BLOCK * (1 + options.samples)
        removal = {**settings, "half_at": first, "all_at": first + BLOCK * options.samples, "watch_syncs": cuda}
        removal |= {"teacher": options.teacher}
        folded = None if options.without_folded else {**settings, "folded": True}
        samples = _run(removal, folded, options, in_turns=not cuda)
    result = summary(samples, tokens_per_step, options.samples)
    print(report(result))
    result |= {
        "shape": options.shape,
        "precision": options.precision,
        "compiled": not options.eager,
        "tokens_per_step": tokens_per_step,
        "teacher": options.teacher,
        "machine": machine(options.device, options.threads),
    }
    write_result(f"stages-{options.shape}-{device_label(options.device)}", result, options.out)
    if result["graphs"]["at the end"] > result["graphs"]["after the warm-up"]:
        sys.exit("torch.compile made new graphs after the first steps")


def summary(samples: dict[str, list[dict[str, Any]]], tokens_per_step: int, count: int) -> dict[str, Any]:
    """Throughput of each stage and the number of graphs, from the samples of the two processes."""
    speeds = {
        who: [sample["steps"] * tokens_per_step / sample["seconds"] for sample in samples[who]]
        for who in ("removal", "folded")
        if who in samples
    }
    by_stage = {
        stage: spread(speeds["removal"][number * count : (number + 1) * count]) for number, stage in enumerate(STAGES)
    }
    if "folded" in speeds:
        by_stage["folded"] = spread(speeds["folded"])
    graphs = [sample["graphs"] for sample in samples["removal"]]
    return {
        "tokens_per_second": by_stage,
        "graphs": {"after the warm-up": samples["ready"][0]["graphs"], "at the end": graphs[-1], "samples": graphs},
        "stage_labels": [sample["stage"] for sample in samples["removal"]],
        "synchronisations": samples["end"][0].get("synchronisations"),
    }


def report(result: dict[str, Any]) -> str:
    """The stages as a text table."""
    real = result["tokens_per_second"]["all real"]["median"]
    rows = [["stage", "tokens/s", "of all real"]]
    for stage, figures in result["tokens_per_second"].items():
        rows.append([stage, f"{figures['median']:,.0f}", f"{figures['median'] / real:.2f}"])
    graphs = result["graphs"]
    return f"{table(rows)}\ncompiled graphs: {graphs['after the warm-up']} after 10 steps, {graphs['at the end']} at the end"


def _run(
    removal: dict[str, Any], folded: dict[str, Any] | None, options: argparse.Namespace, *, in_turns: bool
) -> dict[str, list[dict[str, Any]]]:
    blocks = {"removal": len(STAGES) * options.samples, "folded": options.samples}
    environment = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(options.threads),
    }
    contestants = {}
    try:
        for who, settings in (("removal", removal), ("folded", folded)):
            if settings is None:
                continue
            contestants[who] = Contestant(who, HERE / "contestants" / "ours.py", settings, environment)
            contestants[who].wait_until_ready(options.limit)
            if not in_turns:
                _sample(contestants[who], blocks[who], options.limit)
                contestants[who].stop()
        if in_turns:
            for _ in range(blocks["removal"]):
                for contestant in contestants.values():
                    _sample(contestant, 1, options.limit)
    finally:
        for contestant in contestants.values():
            contestant.stop()
    for contestant in contestants.values():
        if contestant.error:
            sys.exit(f"{contestant.name}: {contestant.error}")
    ready = [contestants["removal"].ready["details"]]
    end = [contestants["removal"].end.get("details", {})]
    return {"ready": ready, "end": end, **{who: contestant.samples for who, contestant in contestants.items()}}


def _sample(contestant: Contestant, count: int, limit: float) -> None:
    for _ in range(count):
        if contestant.alive:
            contestant.sample(limit)


def _parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=5, help="samples of 10 steps at each stage")
    parser.add_argument("--tokens-per-step", type=int, help="default: by shape on a GPU, 8 sequences on a CPU")
    parser.add_argument("--teacher", action="store_true", help="with the losses of recipes/gpt2.toml")
    parser.add_argument("--without-folded", action="store_true", help="leave the folded model out")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=cores(), help="CPU threads of each process")
    parser.add_argument("--limit", type=float, default=900, help="seconds that a warm-up or a sample may take")
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/stages-<shape>-<device>.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
