"""Peak memory of ln-prepare, of its whole process tree, as the corpus grows: it should not.

    python benchmarks/prepare_memory.py --megabytes 100 1000

Text and tokenizer as in prepare_throughput.py; the text is repeated to the size asked for.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from measuring import cores, machine, write_result
from prepare_throughput import run, source_texts, train_tokenizer, write_corpus

TEXT_MEGABYTES = 100
"""Of different text; more is a repetition."""


def main() -> None:
    """Prepare each size once, write benchmarks/results/prepare_memory-cpu-<processes>-processes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--processes", type=int, default=cores())
    parser.add_argument("--directory", type=Path, help="where temporary files go; default: the system's place")
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        texts = list(source_texts(min(max(options.megabytes), TEXT_MEGABYTES) * 2**20))
        tokenizer = train_tokenizer(texts, directory / "tokenizer", 50257)
        for megabytes in options.megabytes:
            corpus = write_corpus(texts, directory / "corpus.parquet", megabytes)
            figures = run("ours", corpus, tokenizer, directory / "out", options.processes)
            found[f"{megabytes} MB"] = figures
            print(
                f"{megabytes} MB: peak {figures['peak_memory_bytes'] / 2**20:,.0f} MiB, {figures['tokens']:,} tokens",
                flush=True,
            )
    result = {"machine": machine("cpu"), "processes": options.processes, "memory": found}
    write_result(f"prepare_memory-cpu-{options.processes}-processes", result, options.out)


if __name__ == "__main__":
    main()
