"""Tokens per second of ln-prepare against nanoGPT's way of preparing.

    python benchmarks/prepare_throughput.py

The text is Python source of this machine's packages; the tokenizer a byte-level BPE of GPT-2's size and pattern, trained on a sample
of it on the spot (`--tokenizer DIR` takes another). Every way runs in a process of its own, all of them in turns; figures are medians.
The token ids of all ways are compared. What ln-prepare needs as the corpus grows: prepare_memory.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import cores, machine, spread, table, write_result

HERE = Path(__file__).parent
WAYS = ("ours", "nanogpt", "nanogpt_batched", "nanogpt_trainer", "nanogpt_tiktoken")
END_OF_TEXT = "<|endoftext|>"
DOCUMENT_CHARACTERS = 5_000
"""About the mean of OpenWebText: source files are cut to this, so that the number of documents is as there."""


def main() -> None:
    """Compare throughput, measure memory, write benchmarks/results/prepare_throughput-<cores>.json."""
    options = _parse()
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        texts = list(source_texts(options.megabytes * 2**20))
        tokenizer = options.tokenizer or train_tokenizer(texts, directory / "tokenizer", options.vocabulary)
        corpus = write_corpus(texts, directory / "corpus.parquet", options.megabytes)
        speed = compare(options, corpus, tokenizer, directory)
    result = {
        "machine": machine("cpu"),
        "processes": options.processes,
        "corpus": {
            "megabytes": options.megabytes,
            "documents": len(texts),
            "text": "Python source, cut into documents",
        },
        "tokenizer": str(options.tokenizer or f"byte-level BPE of {options.vocabulary}, GPT-2's pattern, trained here"),
        "speed": speed,
    }
    write_result(f"prepare_throughput-cpu-{cores()}-cores", result, options.out)


def compare(options: argparse.Namespace, corpus: Path, tokenizer: Path, directory: Path) -> dict[str, Any]:
    """All ways in turns; their tokens must be the same."""
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    for _ in range(options.samples):
        for way in options.ways:
            results[way].append(run(way, corpus, tokenizer, directory / "out", options.processes))
            print(f"{way}: {json.dumps(results[way][-1])}", file=sys.stderr, flush=True)
    rows = [["", "tokens/s", "ours is", "peak memory"]]
    speed: dict[str, Any] = {}
    for way, found in results.items():
        if "error" in found[0]:
            speed[way] = found[0]
            rows.append([way, "failed", "", ""])
            continue
        figures = spread(sample["tokens"] / sample["seconds"] for sample in found)
        speed[way] = {
            "tokens_per_second": figures,
            "peak_memory_bytes": max(sample["peak_memory_bytes"] for sample in found),
            "tokens": found[0]["tokens"],
            "same_tokens_as_ours": [found[0][key] for key in ("tokens", "sum_of_ids")]
            == [results["ours"][0].get(key) for key in ("tokens", "sum_of_ids")],
            "samples": found,
        }
        factor = speed["ours"]["tokens_per_second"]["median"] / figures["median"]
        memory = f"{speed[way]['peak_memory_bytes'] / 2**20:,.0f} MiB"
        rows.append([way, f"{figures['median']:,.0f}", f"{factor:.2f} x", memory])
    print(table(rows), flush=True)
    return speed


def run(way: str, corpus: Path, tokenizer: Path, out: Path, processes: int) -> dict[str, Any]:
    """One preparation in a process of its own; its figures and the peak memory of the process tree."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    settings = {
        "way": way,
        "corpus": str(corpus),
        "tokenizer": str(tokenizer),
        "out": str(out),
        "processes": processes,
    }
    process = subprocess.Popen(
        [sys.executable, str(HERE / "contestants" / "preparation.py"), json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{HERE}:{HERE.parent}:{os.environ.get('PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
        },
    )
    watch = _MemoryWatch(process.pid)
    output, errors = process.communicate()
    peak = watch.stop()
    shutil.rmtree(out, ignore_errors=True)
    if process.returncode != 0:
        return {"error": "\n".join(errors.strip().splitlines()[-4:])}
    return {**json.loads(output.strip().splitlines()[-1]), "peak_memory_bytes": peak}


class _MemoryWatch:
    """The largest proportional set size (shared pages counted once) of a process and its descendants."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak

    def _watch(self) -> None:
        while not self._stopped.wait(0.25):
            self._peak = max(self._peak, sum(map(_proportional_bytes, _tree(self._process))))


def _tree(process: int) -> list[int]:
    found = [process]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _proportional_bytes(process: int) -> int:
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def train_tokenizer(texts: list[str], directory: Path, vocabulary: int) -> Path:
    """A byte-level BPE of GPT-2's kind, trained on the first 20 MB."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    began = time.perf_counter()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[: 20 * 2**20 // DOCUMENT_CHARACTERS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT).save_pretrained(directory)
    print(f"tokenizer of {tokenizer.get_vocab_size()} trained in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return directory


def write_corpus(texts: list[str], path: Path, megabytes: int) -> Path:
    """A parquet file with the texts, repeated until there are so many megabytes (of characters)."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("text", pyarrow.string())])
    wanted = megabytes * 2**20
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while wanted > 0:
            for start in range(0, len(texts), 1000):
                rows = texts[start : start + 1000]
                writer.write_table(pyarrow.table({"text": rows}, schema=schema))
                wanted -= sum(map(len, rows))
                if wanted <= 0:
                    break
    return path


def source_texts(characters: int) -> Iterator[str]:
    """Python source of this machine in documents of about DOCUMENT_CHARACTERS, without repeats while there is enough."""
    paths = sysconfig.get_paths()
    seen: set[int] = set()
    remaining = characters
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if hash(text) in seen or len(text) > 2**20:
                continue
            seen.add(hash(text))
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                piece = text[start : start + DOCUMENT_CHARACTERS]
                yield piece
                remaining -= len(piece)
                if remaining <= 0:
                    return


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of text for the comparison")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--processes", type=int, default=cores(), help="of each way")
    parser.add_argument("--tokenizer", type=Path, help="directory with a tokenizer.json")
    parser.add_argument("--vocabulary", type=int, default=50257, help="of the tokenizer trained here")
    parser.add_argument("--directory", type=Path, help="where temporary files go; default: the system's place")
    parser.add_argument(
        "--out", type=Path, help="result file; default benchmarks/results/prepare_throughput-cpu-N-cores.json"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
