"""What a benchmark says beside its figures: the machine, versions and thread counts; and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "numpy", "triton", "lm-eval")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: str, threads: int | None = None) -> dict[str, Any]:
    """The machine and the software, for the head of a result."""
    import torch

    found: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": cores(),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found


def device_label(device: str) -> str:
    """A name for result files: "nvidia-h200", or "cpu-2-cores"."""
    import torch

    name = torch.cuda.get_device_name(0) if device.startswith("cuda") else f"cpu {cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def spread(samples: Iterable[float]) -> dict[str, Any]:
    """Median, extremes and the samples themselves."""
    values = list(samples)
    return {
        "median": statistics.median(values),
        "least": min(values),
        "most": max(values),
        "samples": values,
    }


def write_result(name: str, result: dict[str, Any], out: Path | None) -> Path:
    """Write `result` to `out`, or to benchmarks/results/<name>.json; returns the path."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}", file=sys.stderr)
    return path


def table(rows: list[list[str]]) -> str:
    """Rows as aligned text, the first column left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def reset_peak_memory() -> None:
    """Make `peak_memory` start from now: on CUDA the allocator's peak, else the process's resident set (Linux)."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Not Linux: then the peak counts from the start of the process.
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the CUDA allocator's peak, or the peak resident set of this process without a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resident_bytes("VmHWM")


def resident_bytes(field: str = "VmRSS", process: int | str = "self") -> int:
    """Resident set of a process now ("VmRSS") or at its peak ("VmHWM"), in bytes; 0 where the system does not say."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(rf"{field}:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1] if found else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
