"""Prepare a corpus in one way and print what it took: `ours`, or nanoGPT's data/openwebtext/prepare.py in four variants.

nanoGPT maps a function that encodes one document over an Arrow data set with several processes, then writes the ids through a
memory map in 1,024 batches. It encodes with tiktoken (`nanogpt_tiktoken`; here with the same vocabulary as the others); `nanogpt`
does the same with the tokenizers library, `nanogpt_batched` with its batch call, 1,000 documents at a time, and `nanogpt_trainer`
with the transformers tokenizer in batches of 512, as removing-layer-norm prepares its data.

Opening the corpus as an Arrow data set is not counted for the variants; for `ours` reading the file is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = 1024


def main() -> None:
    """Argument: JSON with way, corpus (parquet), tokenizer (directory), out, processes."""
    settings = json.loads(sys.argv[1])
    out = Path(settings["out"])
    prepare = ours if settings["way"] == "ours" else nanogpt
    print(json.dumps(prepare(settings, out)), flush=True)


def ours(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """`ln_removal.data.prepare.prepare` on the corpus as a local file."""
    from ln_removal.data.corpora import LocalFiles
    from ln_removal.data.prepare import prepare
    from ln_removal.models.loading import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(settings["tokenizer"])
    began = time.perf_counter()
    data = prepare(
        LocalFiles(settings["corpus"]),
        tokenizer,
        out,
        tokenizer_name="benchmark",
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        workers=settings["processes"],
    )
    seconds = time.perf_counter() - began
    splits = [data.split("train"), data.split("validation")]
    total = sum(_sum_of_file(out / shard.file, split.maps[0].dtype) for split in splits for shard in split.shards)
    return {"seconds": seconds, "tokens": sum(split.tokens for split in splits), "sum_of_ids": total}


def _sum_of_file(path: Path, dtype: np.dtype[Any]) -> int:
    """Block by block: the pages of a memory map would count as memory of the preparation."""
    total = 0
    with path.open("rb") as file:
        while len(block := np.fromfile(file, dtype=dtype, count=2**20)):
            total += int(block.sum(dtype=np.int64))
    return total


def nanogpt(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """datasets.map, then the memory map."""
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    cache = out / "cache"
    dataset = load_dataset("parquet", data_files=settings["corpus"], split="train", cache_dir=str(cache))
    function, batch_size = encoder(settings["way"], settings["tokenizer"])
    began = time.perf_counter()
    mapped = dataset.map(
        function,
        batched=batch_size is not None,
        batch_size=batch_size or 1000,
        remove_columns=dataset.column_names,
        num_proc=settings["processes"],
    )
    mapped_after = time.perf_counter() - began
    total = int(np.sum(mapped["len"], dtype=np.uint64))
    path = out / "train.bin"
    ids = np.memmap(path, dtype=np.uint16, mode="w+", shape=(total,))
    at = 0
    for number in range(min(BATCHES, len(mapped))):
        shard = mapped.shard(num_shards=min(BATCHES, len(mapped)), index=number, contiguous=True).with_format("numpy")
        rows = np.concatenate(shard["ids"])
        ids[at : at + len(rows)] = rows
        at += len(rows)
    ids.flush()
    seconds = time.perf_counter() - began
    result = {
        "seconds": seconds,
        "map_seconds": mapped_after,
        "tokens": total,
        "sum_of_ids": int(ids.sum(dtype=np.int64)),
    }
    shutil.rmtree(cache)
    return result


def encoder(way: str, directory: str) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], int | None]:
    """The function to map, and its batch size (None: one document at a time)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    tokenizer.encode_special_tokens = True
    end = tokenizer.token_to_id("<|endoftext|>")
    if way == "nanogpt_tiktoken":
        fast = tiktoken_twin(tokenizer)

        def one_by_tiktoken(example: dict[str, Any]) -> dict[str, Any]:
            ids = [*fast.encode_ordinary(example["text"]), end]
            return {"ids": ids, "len": len(ids)}

        return one_by_tiktoken, None
    if way == "nanogpt":

        def one(example: dict[str, Any]) -> dict[str, Any]:
            ids = [*tokenizer.encode(example["text"], add_special_tokens=False).ids, end]
            return {"ids": ids, "len": len(ids)}

        return one, None
    if way == "nanogpt_batched":

        def batch(examples: dict[str, Any]) -> dict[str, Any]:
            found = tokenizer.encode_batch_fast(examples["text"], add_special_tokens=False)
            rows = [[*encoding.ids, end] for encoding in found]
            return {"ids": rows, "len": list(map(len, rows))}

        return batch, 1000
    assert way == "nanogpt_trainer", way
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")

    def trainer(examples: dict[str, Any]) -> dict[str, Any]:
        rows = [[*ids, end] for ids in wrapped(examples["text"], truncation=False, padding=False)["input_ids"]]
        return {"ids": rows, "len": list(map(len, rows))}

    return trainer, 512


def tiktoken_twin(tokenizer: Any) -> Any:
    """tiktoken with the vocabulary and the pattern of a byte-level tokenizer: an id is the rank of its merge."""
    import tiktoken

    from ln_removal.data.encoder import _byte_alphabet, word_pattern

    contents = json.loads(tokenizer.to_str())
    byte_of = {chr(character): byte for byte, character in _byte_alphabet().items()}
    special = {token["content"] for token in contents["added_tokens"]}
    ranks = {
        bytes(byte_of[character] for character in text): rank
        for text, rank in contents["model"]["vocab"].items()
        if text not in special
    }
    return tiktoken.Encoding("twin", pat_str=word_pattern(contents), mergeable_ranks=ranks, special_tokens={})


if __name__ == "__main__":
    main()
