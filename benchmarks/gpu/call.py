"""Run the parts of a call on a machine where nothing of this project is installed, and stop when its time is up.

    python3 benchmarks/gpu/call.py speed OUT

Calls: speed, removal, longer (plan.py). The work folder keeps what parts make for one another. Its results.json has the state and the
result of every part; it is written after every change, also to OUT. The same call again runs only the parts that have not ended
well, also on another machine of the same kind to which the work folder was copied. Nothing is installed into this Python: the wheels of
carry.sh are unpacked into a folder, and the path is set for the parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from plan import GPU, HERE, LIMITS, TRIAL, Part, parts_of

CARRIED = HERE / "carried"
GRACE = 10.0
"""Seconds before the end of a call at which parts are asked to stop."""

MARGIN = 4.0
"""GiB of the GPU that stay free."""


@dataclass
class Running:
    """A part that has been started."""

    part: Part
    process: subprocess.Popen[bytes]
    log: BinaryIO
    began: float


class Call:
    """A call in progress.

    Args:
        name: of the call.
        parts: in the order of their value.
        work: the work folder.
        out: where results.json goes, too.
        limit: seconds from `began` on.
        began: `time.monotonic()` at the start.
        device: what machine this is: "gpu" and "gib", the memory that parts may fill.
    """

    def __init__(
        self, name: str, parts: list[Part], work: Path, out: Path, limit: float, began: float, device: dict[str, Any]
    ) -> None:
        self.name = name
        self.parts = parts
        self.work = work
        self.out = out
        self.limit = limit
        self.began = began
        self.gib = float(device["gib"])
        self.running: list[Running] = []
        self.states: dict[str, dict[str, Any]] = {}
        self.retried: set[str] = set()
        self.results = earlier_results(work, device)
        call = {"call": name, "limit": limit, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        self.results["calls"].append(call)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> bool:
        """Run what is not done; whether all parts have ended well."""
        for part in self.parts:
            if self._is_done(part):
                self._note(part, "done", say="was done before")
        try:
            while len(self.states) < len(self.parts) or self.running:
                self._collect()
                self._start_what_can_start()
                if self.seconds > self.limit - GRACE:
                    self._stop_all(f"{self.limit:.0f} s were over")
                time.sleep(0.1)
        finally:  # Ctrl-C, too
            self._stop_all("the call was stopped")
        return all(state["state"] == "done" for state in self.states.values())

    def _is_done(self, part: Part) -> bool:
        known = self.results["parts"].get(part.name, {})
        return known.get("state") == "done" and all(path.exists() for path in part.leaves)

    def _start_what_can_start(self) -> None:
        """Start parts in their order, as far as memory and time reach; settle those that cannot run any more."""
        active = {running.part.name for running in self.running}
        waited_for = {part.name for part in self.parts} - self.states.keys()
        for part in self.parts:
            if part.name in self.states or part.name in active:
                continue
            left = self.limit - GRACE - self.seconds
            if left < part.seconds:
                self._note(part, "skipped", f"{left:.0f} s were left, it needs {part.seconds:.0f}")
            elif part.memory > self.gib:
                self._note(part, "skipped", f"it needs {part.memory:.0f} GiB, the GPU has {self.gib:.0f} free")
            elif waited_for & set(part.after):
                continue
            elif missing := [str(path) for path in part.needs if not path.exists()]:
                self._note(part, "skipped", f"missing: {', '.join(missing)}")
            elif part.memory + sum(running.part.memory for running in self.running) <= self.gib:
                self._start(part)

    def _start(self, part: Part) -> None:
        retried = self.results["parts"].get(part.name, {}).get("state") == "failed"
        for path in part.clears:
            shutil.rmtree(path, ignore_errors=True)
        file = self.work / f"{part.name}.json"
        if not file.exists() and (found := self.results["parts"].get(part.name, {}).get("result")):
            file.write_text(json.dumps(found))  # of another machine's work folder: the part goes on with it
        log = (self.work / f"{part.name}.log").open("wb")
        output = file.open("wb") if part.prints_json else log
        command = [sys.executable, *part.command, *(part.retry if retried else ())]
        self._say(part, "starts: " + " ".join(command[1:]))
        process = subprocess.Popen(
            command, stdout=output, stderr=log, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True
        )
        if output is not log:
            output.close()
        self.running.append(Running(part, process, log, time.monotonic()))

    def _collect(self) -> None:
        for running in list(self.running):
            pid, status, usage = os.wait4(running.process.pid, os.WNOHANG)
            if pid:
                running.process.returncode = os.waitstatus_to_exitcode(status)
                self._end(running, "", usage.ru_utime + usage.ru_stime)

    def _stop_all(self, why: str) -> None:
        """Ask all parts to stop, give them the rest of GRACE, and end their processes."""
        for running in self.running:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGINT)
        deadline = time.monotonic() + GRACE - 2
        for running in list(self.running):
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(max(0.1, deadline - time.monotonic()))
            with suppress(ProcessLookupError):  # also what the part itself started and left
                os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
            self._end(running, why)
        for part in self.parts:
            if part.name not in self.states:
                self._note(part, "skipped", why)

    def _end(self, running: Running, stopped: str, processor: float = 0) -> None:
        self.running.remove(running)
        running.log.close()
        part, code = running.part, running.process.returncode
        found = self._result(part)
        missing = [str(path) for path in part.leaves if not path.exists()]
        if code == 0 and found is not None and not missing:
            state, why = "done", ""
        elif stopped:
            state, why = "stopped", stopped
        else:
            state = "failed"
            why = f"ended with {code}" if code else f"has not written {missing or f'{part.name}.json'}"
        spent = time.monotonic() - running.began
        self._note(part, state, why, seconds=round(spent, 1), processor_seconds=round(processor, 1), result=found)
        if state == "failed" and part.retry and part.name not in self.retried:
            self.retried.add(part.name)
            del self.states[part.name]

    def _result(self, part: Part) -> Any:
        """What the part has written, also if it is not all; None if it is no JSON."""
        with suppress(OSError, ValueError):
            return json.loads((self.work / f"{part.name}.json").read_text())
        return None

    def _note(self, part: Part, state: str, why: str = "", *, say: str = "", **more: Any) -> None:
        """Keep the state of a part and write everything. A skipped part keeps what an earlier call has of it."""
        self.states[part.name] = {"state": state, "why": why}
        known = self.results["parts"].setdefault(part.name, {})
        if not say and (state != "skipped" or not known):
            log = self.work / f"{part.name}.log"
            tail = log.read_text(errors="replace")[-1000 if state == "done" else -3000 :] if log.exists() else ""
            known.clear()
            known |= {"state": state, "why": why, "call": self.name, "log": tail, **more}
        call = self.results["calls"][-1]
        call |= {"seconds": round(self.seconds, 1), "parts": self.states}
        took = f" after {more['seconds']:.0f} s" if "seconds" in more else ""
        self._say(part, f"{state}{took}{': ' if why else ''}{why}{say and f', {say}'}")
        for folder in {self.work, self.out}:
            partial = folder / "results.json.part"
            partial.write_text(json.dumps(self.results, indent=1) + "\n")
            partial.replace(folder / "results.json")

    def _say(self, part: Part, text: str) -> None:
        print(f"[{self.seconds:4.0f} s] {part.name} {text}", flush=True)


def earlier_results(work: Path, device: dict[str, Any]) -> dict[str, Any]:
    """What earlier calls have written on such a machine. What is of another one is moved aside."""
    file = work / "results.json"
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(file.read_text())
        if found["machine"]["gpu"] == device["gpu"]:
            return found
        file.replace(work / f"results-{found['machine']['gpu'].replace(' ', '-')}.json")
    return {"machine": device, "calls": [], "parts": {}}


def environment() -> dict[str, str]:
    """That of the parts: the path to this copy and to the carried packages."""
    paths = (Path.cwd(), Path.cwd() / "benchmarks", Path.cwd() / CARRIED / "site")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "HF_HUB_OFFLINE": "1",
        # Several programs compile at once.
        "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, (os.cpu_count() or 1) // 4)),
    }


def install_carried() -> None:
    """Unpack the carried wheels, once."""
    site = CARRIED / "site"
    if site.is_dir() or all(map(importlib.util.find_spec, ("pydantic", "tomli_w"))):
        return
    wheels = sorted((CARRIED / "wheels").glob("*.whl"))
    if not wheels:
        sys.exit(
            f"{CARRIED / 'wheels'} is empty, and pydantic or tomli_w is not installed; run benchmarks/gpu/carry.sh before"
        )
    partial = site.with_name("site.part")
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(partial)]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    partial.replace(site)


def find_device(kind: str) -> dict[str, Any]:
    """Name and free memory of the GPU. The trial on a CPU counts with the memory of an H100."""
    if kind == "cpu":
        return {"gpu": "none", "gib": 75}
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        sys.exit(f"no GPU was found ({error}); --device cpu makes a trial at small sizes")
    name, total, used, busy = (part.strip() for part in line.split(","))
    if float(used) > 1024:
        print(f"warning: {used} MiB of the GPU are in use by others, its load is {busy} %", flush=True)
    return {"gpu": name, "gib": (float(total) - float(used)) / 1024 - MARGIN}


def main() -> None:
    """Run a call and print the state of every part; status 1 if one has not ended well."""
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # a job in the background ignores Ctrl-C, and so would its parts
        signal.signal(number, signal.default_int_handler)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("call", choices=list(LIMITS))
    parser.add_argument("out", type=Path, help="folder for results.json")
    parser.add_argument("--seconds", type=float, help=f"limit of the call; default {LIMITS}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a trial at small sizes")
    parser.add_argument("--work", type=Path, help="what parts keep for one another; default benchmarks/gpu/parts")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone")
    parser.add_argument("--again", nargs="+", metavar="PART", default=[], help="run these although they are done")
    options = parser.parse_args()
    out = options.out.resolve()
    work = (options.work or Path(__file__).parent / "parts").resolve()
    os.chdir(Path(__file__).resolve().parent.parent.parent)
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    install_carried()
    parts = parts_of(options.call, GPU if options.device == "cuda" else TRIAL, work)
    if unknown := {*(options.only or ()), *options.again} - {part.name for part in parts}:
        sys.exit(
            f"no part of {options.call}: {', '.join(sorted(unknown))}; it has {', '.join(part.name for part in parts)}"
        )
    parts = [part for part in parts if part.name in (options.only or [part.name])]
    call = Call(
        options.call, parts, work, out, options.seconds or LIMITS[options.call], began, find_device(options.device)
    )
    for name in options.again:
        call.results["parts"].pop(name, None)
        (work / f"{name}.json").unlink(missing_ok=True)
        shutil.rmtree(work / f"removals-{name}", ignore_errors=True)
    well = False
    with suppress(KeyboardInterrupt):
        well = call.run()
    print("\n".join(f"{name:10} {state['state']:8} {state['why']}" for name, state in call.states.items()))
    print(f"{call.seconds:.0f} s of {call.limit:.0f}; {work / 'results.json'}")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
