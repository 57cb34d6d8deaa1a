"""What a finished run leaves on disk, made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from small_model import write_tokenizer

from ln_removal.config.recipe import dump_toml, load_recipe
from ln_removal.evaluation.results import ByRole, Results, Settings, write


def make_run(run: Path, *, seed: int = 0, corpus: str = "openwebtext") -> Path:
    """A run without its training: a random LN-free model in both forms, scores, a plot; its recipe is that of gpt2."""
    from transformers import AutoTokenizer

    from ln_removal.export.stock import to_stock
    from ln_removal.export.write import save_model
    from ln_removal.models.normfree_gpt2 import NormFreeGPT2Config, NormFreeGPT2LMHeadModel

    eot = write_tokenizer(run.parent / "tokenizer")
    config = NormFreeGPT2Config(
        vocab_size=320, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=eot, eos_token_id=eot
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NormFreeGPT2LMHeadModel(config).eval()
    with torch.no_grad():  # what a folded norm leaves: weights whose mean over their inputs is zero
        for block in model.transformer.h:
            for reader in (block.attn.c_attn, block.mlp.c_fc):
                reader.weight -= reader.weight.mean(dim=0, keepdim=True)
        model.lm_head.weight -= model.lm_head.weight.mean(dim=1, keepdim=True)
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "tokenizer")
    save_model(model, tokenizer, run / "model")
    save_model(to_stock(model), tokenizer, run / "stock")
    (run / "model" / "README.md").write_text("the card of the directory", encoding="utf-8")
    recipe = load_recipe("gpt2", {"data.corpus": corpus})
    (run / "recipe.toml").write_text(dump_toml(recipe), encoding="utf-8")
    results = Results(
        models=ByRole[str](original="gpt2", ln_free="run/model"),
        cross_entropy=ByRole[float](original=3.1, ln_free=3.2),
        tokens=1000,
        seconds=1.0,
        device="cpu",
        settings=Settings(data=corpus, context=32),
        versions={},
    )
    write(results, run / "results.json")
    (run / "plots").mkdir()
    (run / "plots" / "loss.png").write_bytes(b"\x89PNG" + bytes(range(256)) * 100)
    (run / "plots" / "loss.npy").write_bytes(b"not a plot")
    return run
