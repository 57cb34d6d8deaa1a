"""Train a tokenizer of GPT-2's vocabulary size on the Python source of this environment, for benchmarks/gpu/removal.sh.

python benchmarks/gpu/tokenizer.py OUT
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ln_removal.data.encoder import train_code_tokenizer

CHARACTERS = 60_000_000


def texts() -> Iterator[str]:
    """Files of this environment in a random order, until there is enough."""
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    random.Random(0).shuffle(files)
    total = 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        total += len(text)
        yield text
        if total > CHARACTERS:
            return


if __name__ == "__main__":
    train_code_tokenizer(texts(), 50_257, model_max_length=1024).save_pretrained(sys.argv[1])
