"""What models write after the same prompt, drawn with the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ln_removal.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURE = 0.8


@torch.inference_mode()
def sample_continuation(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 80,
    temperature: float = TEMPERATURE,
    top_k: int = 40,
    seed: int = 0,
) -> str:
    """Continue `prompt`, token by token, up to an end-of-text token or `max_new_tokens`.

    Each token is drawn by its own uniform number (inverse transform over the top_k tokens, likeliest first), and those
    numbers depend on the seed alone: models that predict alike write alike.

    Args:
        model: a language model in evaluation mode, where it is to run.
        temperature: 0 takes the likeliest token every time.

    Raises:
        UserError: the prompt gives no token, or leaves no room in the model's context.
    """
    positions = int(model.config.max_position_embeddings)
    ids = encode_prompt(tokenizer, prompt, positions)
    device = next(model.parameters()).device
    uniform = torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    written: list[int] = []
    cache = None
    step = torch.tensor([ids], device=device)
    for number in range(min(max_new_tokens, positions - len(ids))):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chosen = _draw(output.logits[0, -1], uniform[number], temperature, top_k)
        if chosen == tokenizer.eos_token_id:
            break
        written.append(chosen)
        step = torch.tensor([[chosen]], device=device)
    return str(tokenizer.decode(written))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, positions: int) -> list[int]:
    """The tokens of a prompt that a model with so many positions can continue.

    Raises:
        UserError: it gives no token, or leaves no room in the model's context.
    """
    ids: list[int] = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise UserError("the prompt is empty; give --prompt some text")
    if len(ids) >= positions:
        raise UserError(f"the prompt has {len(ids)} tokens, the model {positions} positions; shorten it")
    return ids


def _draw(logits: Tensor, uniform: float, temperature: float, top_k: int) -> int:
    values, tokens = logits.double().cpu().topk(min(top_k, logits.numel()))
    if temperature == 0:
        return int(tokens[0])
    cumulative = (values / temperature).softmax(dim=-1).cumsum(dim=-1)
    return int(tokens[min(int((cumulative < uniform).sum()), len(tokens) - 1)])
