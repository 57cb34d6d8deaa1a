"""The figures of the soak benchmark: what counts as growth, and what is sampled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import soak


def test_growth_is_that_of_medians_after_the_warm_up() -> None:
    warm_up, flat = [100.0] * 10, [1000.0] * 90
    assert soak.growth(warm_up + flat)["share"] == 0
    assert soak.growth(warm_up + flat[:-1] + [9000.0])["share"] == 0, "one high sample is no growth"
    rising = warm_up + [1000.0 + 2 * step for step in range(90)]
    assert soak.growth(rising)["share"] == pytest.approx(160 / 1009, rel=0.01)
    assert soak.growth([0.0] * 40)["share"] == 0
    assert soak.growth([5.0])["share"] == 0


def test_few_samples_are_kept_all_and_many_evenly() -> None:
    rows: list[dict[str, Any]] = [{"seconds": second} for second in range(3600)]
    assert soak.thinned(rows[:400]) == rows[:400]
    kept = soak.thinned(rows)
    assert len(kept) == 400 and kept[0] == rows[0] and kept[-1] == rows[-1]


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_a_process_is_sampled_from_outside(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_bytes(b"12345")
    keeps = "kept = [open(os.devnull) for _ in range(20)]; block = bytearray(b'1') * 50_000_000"
    code = f"import os, sys; {keeps}; print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        found = soak.sample(process.pid, tmp_path)
        assert process.pid in soak.descendants(os.getpid())
        process.communicate()
    assert found["resident_bytes"] > 50_000_000 and found["anonymous_bytes"] > 50_000_000
    assert found["open_files"] == 23 and found["threads"] == 1 and found["children"] == 0
    assert (found["files_in_run"], found["bytes_in_run"]) == (1, 5)
    gone = soak.sample(process.pid, tmp_path)
    assert gone["resident_bytes"] == gone["open_files"] == 0


def test_a_row_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert soak.rows_of(path, "train") == []
    path.write_text('{"kind": "train", "step": 0}\n{"kind": "event", "step": 0}\n{"kind": "train", "st')
    assert soak.rows_of(path, "train") == [{"kind": "train", "step": 0}]
