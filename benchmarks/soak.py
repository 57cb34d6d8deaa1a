"""python benchmarks/soak.py --minutes 60: does a long training keep its memory and its files?

`ln-remove` on the embedded model, as a user starts it (teacher, freezing sites, evaluation, a checkpoint about every minute), is
watched from outside until the time is up and then stopped with SIGTERM. A short run before it says how many steps a minute has; the
schedule is spread over the hour. Every ten seconds: resident, proportional and anonymous memory, open files and threads of the
process, the memory and number of its children, files and bytes in the run's directory. Growth is the median of the last tenth
against that of the tenth after the warm-up, which is the first tenth: a single high sample changes neither.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import machine, resident_bytes, table, write_result

from ln_removal.config.recipe import load_recipe

SAMPLES_KEPT = 400
MEMORY = ("resident_bytes", "proportional_bytes", "anonymous_bytes", "children_bytes")
HANDLES = ("open_files", "threads", "children", "files_in_run", "bytes_in_run")
CALIBRATION_STEPS = 30
STEPS_IN_STORE = 12
"""Times the steps that should fit into the time: a run that ends by itself, on a machine that has become less busy since its
speed was measured, would not have been watched to the end."""

SECONDS_TO_STOP = 120


def main() -> None:
    """Watch one run, write benchmarks/results/soak.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    parser.add_argument("--tokens", type=Path, help="tokens of the tiny model; default: prepared from Python source")
    parser.add_argument("--directory", type=Path, help="where temporary files go; default: the system's place")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        tokens = options.tokens or prepare(directory / "tokens")
        per_minute = steps_per_minute(tokens, directory / "calibration")
        result = soak(tokens, directory / "run", options.minutes, options.every, per_minute)
    print(table(summary_rows(result)), flush=True)
    write_result("soak", result, options.out)


def prepare(directory: Path) -> Path:
    """Python source of this machine as tokens of the embedded model."""
    arguments = ["python-source", "--tokenizer", "tiny", "--max-tokens", "4000000", "--out", str(directory)]
    subprocess.run([command("ln-prepare"), *arguments], check=True, stdout=subprocess.DEVNULL)
    return directory


def steps_per_minute(tokens: Path, directory: Path) -> float:
    """Of a run too short to be compiled, so rather too few; it is stopped once it has trained."""
    rows: list[dict[str, Any]] = []
    with start(tokens, directory, steps=CALIBRATION_STEPS, checkpoint_every=1000, evaluate_every=1000) as process:
        while len(rows) < CALIBRATION_STEPS:
            time.sleep(0.5)
            rows = rows_of(directory / "metrics.jsonl", "train")
            if process.poll() not in (None, 0):
                raise SystemExit(f"the run that measures the speed failed:\n{process.stderr_text()}")
        process.kill()
    return 60.0 * rows[-1]["tokens_per_second"] / load_recipe("tiny").training.tokens_per_step


class Training(subprocess.Popen[bytes]):
    """A running `ln-remove`, with what it says in a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as file:
            super().__init__(arguments, stdout=file, stderr=subprocess.STDOUT)

    def stderr_text(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


def start(tokens: Path, directory: Path, *, steps: int, checkpoint_every: int, evaluate_every: int) -> Training:
    """`ln-remove` on the embedded model without questions and other exports."""
    settings = {
        "training.checkpoint_every": checkpoint_every,
        "training.evaluate_every": evaluate_every,
        "export.formats": ["normfree"],
    }
    arguments = [command("ln-remove"), "--model", "tiny", "--steps", str(steps), "--tokens", str(tokens)]
    arguments += ["--questions", "none", "--device", "cpu", "--out", str(directory)]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={json.dumps(value)}"]
    return Training(arguments, directory.with_suffix(".log"))


def command(name: str) -> str:
    """The console command that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def soak(tokens: Path, directory: Path, minutes: float, every: float, per_minute: float) -> dict[str, Any]:
    """Train for `minutes`, sampling; returns figures, samples and the machine."""
    checkpoint_every = max(1, round(per_minute))
    steps = max(CALIBRATION_STEPS, round(STEPS_IN_STORE * minutes * per_minute))
    samples: list[dict[str, float]] = []
    checkpoints: set[str] = set()
    process = start(
        tokens, directory, steps=steps, checkpoint_every=checkpoint_every, evaluate_every=3 * checkpoint_every
    )
    began = time.monotonic()
    try:
        while (seconds := time.monotonic() - began) < 60 * minutes:
            time.sleep(min(every, max(0.0, 60 * minutes - seconds)))
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself ({process.returncode}):\n{process.stderr_text()}")
            samples.append({"seconds": round(time.monotonic() - began, 1), **sample(process.pid, directory)})
            checkpoints |= {path.name for path in (directory / "state").glob("step-*")}
    except BaseException:
        process.kill()
        raise
    stopped_at = time.monotonic()
    process.terminate()  # not SIGINT, which whoever was started in the background ignores
    try:
        process.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return {
        "machine": machine("cpu"),
        "minutes": minutes,
        "seconds_between_samples": every,
        "steps_planned": steps,
        "steps_trained": len(rows_of(directory / "metrics.jsonl", "train")),
        "evaluations": len(rows_of(directory / "metrics.jsonl", "evaluation")),
        "checkpoint_every": checkpoint_every,
        "checkpoints_written": len(checkpoints),
        "exit_code": process.returncode,
        "seconds_to_stop": round(time.monotonic() - stopped_at, 1),
        "last_words": process.stderr_text().splitlines()[-1:],
        "growth": {name: growth([row[name] for row in samples]) for name in MEMORY},
        "range": {name: extremes([row[name] for row in after_warm_up(samples)]) for name in (*MEMORY, *HANDLES)},
        "samples": thinned(samples),
    }


def sample(process: int, directory: Path) -> dict[str, float]:
    """What the system says about a process, its children and the run's directory; 0 where it does not say."""
    children = descendants(process)
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        "resident_bytes": resident_bytes(process=process),
        "proportional_bytes": rolled_up(process, "Pss"),
        "anonymous_bytes": rolled_up(process, "Pss_Anon"),
        "children_bytes": sum(rolled_up(child, "Pss") for child in children),
        "children": len(children),
        "open_files": count(lambda: os.listdir(f"/proc/{process}/fd")),
        "threads": count(lambda: os.listdir(f"/proc/{process}/task")),
        "files_in_run": len(files),
        "bytes_in_run": sum(size_of(path) for path in files),
    }


def rolled_up(process: int, field: str) -> int:
    """A sum over the mappings of a process, in bytes: "Pss" shares what several processes map, "Pss_Anon" leaves files out."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def descendants(process: int) -> list[int]:
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        try:
            direct = [int(number) for number in file.read_text().split()]
        except OSError:  # the thread is gone
            continue
        for child in direct:
            found += [child, *descendants(child)]
    return found


def count(listing: Callable[[], list[str]]) -> int:
    try:
        return len(listing())
    except OSError:
        return 0


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # replaced since it was listed
        return 0


def after_warm_up(rows: list[Any]) -> list[Any]:
    """All but the first tenth."""
    return rows[len(rows) // 10 :] or rows


def growth(values: list[float]) -> dict[str, float]:
    """The median of the last tenth against that of the tenth after the warm-up."""
    tenth = max(1, len(values) // 10)
    settled = after_warm_up(values)
    before, after = statistics.median(settled[:tenth]), statistics.median(settled[-tenth:])
    return {"before": before, "after": after, "share": round(after / before - 1, 5) if before else 0.0}


def extremes(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "most": max(values)}


def thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most SAMPLES_KEPT of them, evenly spaced."""
    if len(rows) <= SAMPLES_KEPT:
        return rows
    return [rows[round(place * (len(rows) - 1) / (SAMPLES_KEPT - 1))] for place in range(SAMPLES_KEPT)]


def rows_of(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    rows = (json.loads(line) for line in lines if line.endswith("\n"))  # the last one may be half written
    return [row for row in rows if row["kind"] == kind]


def summary_rows(result: dict[str, Any]) -> list[list[str]]:
    """The figures as text."""
    rows = [["", "after warm-up", "in the end", "growth"]]
    for name, found in result["growth"].items():
        mebibytes = [f"{found[moment] / 2**20:,.1f} MiB" for moment in ("before", "after")]
        rows.append([name, *mebibytes, f"{found['share']:+.2%}"])
    for name in HANDLES:
        found = result["range"][name]
        rows.append([name, f"{found['least']:,.0f}", f"{found['most']:,.0f}", "least, most"])
    steps, minutes = result["steps_trained"], result["minutes"]
    written = f"{result['checkpoints_written']} checkpoints"
    rows.append([f"{steps} steps in {minutes:g} minutes", written, f"{result['evaluations']} evaluations", ""])
    return rows


if __name__ == "__main__":
    main()
