"""The models that are pretrained here; among them GPT-2 and GPT-NeoX (Pythia) with a choice of norms, biases and activation.

Underneath are transformers' own classes: attention, rotary positions, generation, saving and loading are theirs. Llama and
Qwen2 are built as they are. In a GPT-2 or a Pythia, what is chosen in the configuration replaces modules when the model is built:

    block_norm, final_norm   "layernorm", "none" (an identity), "dyt" or "derf" (see chosen_parts.py)
    biases                   "all", or "paper": queries and keys have a bias, values and the other projections have none
    activation               "gelu" (the family's own), "relu", "leaky_relu" or "learnable_leaky_relu"
    negative_slope           of leaky ReLU; where training of a learnable one begins
    slopes                   "layer": a learnable slope for each layer; "network": one for all, and only one parameter

and in a GPT-2 alone, for a model that trains without any norm:

    residual_gain            "none", "fixed" or "learned": what attention and MLP are multiplied with before they are added to the
                             stream, 1 / sqrt(2 n_layer), or a scalar for each of them that begins there
    initialisation           "gpt2", or "unit": the stream begins with a root mean square of 1 and keeps it
    qk_norm                  an RMSNorm of the queries and keys of every head
    attention_scale          what attention scores are multiplied with, "1/sqrt(k)" or "1/k", for heads of width k

Without LayerNorm this is the architecture of Jha & Reagen 2024 (arXiv 2410.09637), who keep the final norm. With the paper's
biases the matrices also begin as in their code: a standard deviation of `initializer_range` for all of them, GPT-2's projections
back into the residual stream too, which transformers begins smaller by sqrt(2 n_layer).

The leaky ReLU has a slope that is fixed, learned for each layer, or learned once for the whole network:

    leaky(x) = max(x, 0) + slope * min(x, 0)

Jha & Reagen (section 3) train the slope, from 0.01, to see which activation a model without LayerNorm asks for. GELU is
transformers' own, and so is the ReLU of a model that is one of their classes.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from ln_removal.config.family_parts import LADDER_CHOICES, REVIVAL_CHOICES
from ln_removal.models.chosen_parts import (
    BiaslessConv1D,
    GainedConv1D,
    JointConv1D,
    LearnableLeakyReLU,
    QueryKeyBiasLinear,
    QueryKeyNorm,
    ReLU,
    Scale,
    branch_gain,
    embedding_scale,
    in_the_norms_place,
    keep_the_streams_size,
    query_scale,
)
from ln_removal.models.families import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ln_removal.config.recipe import ArchitectureSpec


def learnable_slopes(model: nn.Module) -> dict[str, Tensor]:
    """The learnable slopes of a model by parameter name, each once: one for the network, one a layer, or none at all."""
    modules = {f"{name}.slope": module for name, module in model.named_modules()}
    return {name: module.slope for name, module in modules.items() if isinstance(module, LearnableLeakyReLU)}


class RevivalGPT2Config(GPT2Config):
    """Configuration of `RevivalGPT2LMHeadModel`: GPT-2's and the choices of this module."""

    model_type = "revival_gpt2"

    block_norm: str = "layernorm"
    final_norm: str = "layernorm"
    biases: str = "all"
    activation: str = "gelu"
    negative_slope: float = 0.01
    slopes: str = "layer"
    residual_gain: str = "none"
    initialisation: str = "gpt2"
    qk_norm: bool = False
    attention_scale: str = "1/sqrt(k)"


class RevivalGPTNeoXConfig(GPTNeoXConfig):
    """Configuration of `RevivalGPTNeoXForCausalLM`: GPT-NeoX's and the choices of this module."""

    model_type = "revival_gpt_neox"

    block_norm: str = "layernorm"
    final_norm: str = "layernorm"
    biases: str = "all"
    activation: str = "gelu"
    negative_slope: float = 0.01
    slopes: str = "layer"


class RevivalGPT2LMHeadModel(GPT2LMHeadModel):
    """GPT-2 language model with the norms, biases and activation that its configuration chooses.

    Takes the inputs and gives the outputs of GPT2LMHeadModel.
    """

    config_class = RevivalGPT2Config

    def __init__(self, config: RevivalGPT2Config) -> None:
        super().__init__(config)
        width = config.n_embd
        scale = query_scale(config.attention_scale, width // config.n_head)
        # A norm of the queries would undo a scale in front of it.
        before, behind = (1.0, scale) if config.qk_norm else (scale, 1.0)
        for block in self.transformer.h:
            if config.block_norm != "layernorm":
                block.ln_1 = in_the_norms_place(config.block_norm, width)
                block.ln_2 = in_the_norms_place(config.block_norm, width)
            # In this order: a Conv1D draws numbers when it is made, and all arms of a seed begin with the same matrices.
            if config.biases == "paper" or before != 1:
                block.attn.c_attn = JointConv1D(width, value_bias=config.biases == "all", query_scale=before)
            block.attn.c_proj = _projection(block.attn.c_proj, config)
            if config.biases == "paper":
                block.mlp.c_fc = BiaslessConv1D(block.mlp.c_fc.nf, width)
            block.mlp.c_proj = _projection(block.mlp.c_proj, config)
            if config.qk_norm:
                norm = QueryKeyNorm(config.n_head, width // config.n_head, query_scale=behind)
                block.attn.c_attn = nn.Sequential(OrderedDict(map=block.attn.c_attn, norm=norm))
        if config.final_norm != "layernorm":
            self.transformer.ln_f = in_the_norms_place(config.final_norm, width)
        if config.initialisation == "unit":
            # What follows the sum of the two embeddings. Models are trained without dropout here.
            self.transformer.drop = Scale(embedding_scale(config.initializer_range))
        _choose_activation(self.transformer, [block.mlp for block in self.transformer.h], config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_scalar(module)


class RevivalGPTNeoXForCausalLM(GPTNeoXForCausalLM):
    """GPT-NeoX language model with the norms, biases and activation that its configuration chooses.

    Takes the inputs and gives the outputs of GPTNeoXForCausalLM.
    """

    config_class = RevivalGPTNeoXConfig

    def __init__(self, config: RevivalGPTNeoXConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        for layer in self.gpt_neox.layers:
            if config.block_norm != "layernorm":
                layer.input_layernorm = in_the_norms_place(config.block_norm, width)
                layer.post_attention_layernorm = in_the_norms_place(config.block_norm, width)
            if config.biases == "paper":
                layer.attention.query_key_value = QueryKeyBiasLinear(width, config.num_attention_heads)
                layer.attention.dense = nn.Linear(width, width, bias=False)
                layer.mlp.dense_h_to_4h = nn.Linear(width, config.intermediate_size, bias=False)
                layer.mlp.dense_4h_to_h = nn.Linear(config.intermediate_size, width, bias=False)
        if config.final_norm != "layernorm":
            self.gpt_neox.final_layer_norm = in_the_norms_place(config.final_norm, width)
        _choose_activation(self.gpt_neox, [layer.mlp for layer in self.gpt_neox.layers], config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        _init_scalar(module)


def _choose_activation(body: nn.Module, mlps: list[Any], config: Any) -> None:
    """Give every MLP the configured activation; the family's own GELU is in place."""
    assert config.activation in ("gelu", "relu", "leaky_relu", "learnable_leaky_relu"), config.activation
    if config.activation == "relu":
        for mlp in mlps:
            mlp.act = ReLU()
    elif config.activation == "leaky_relu":
        for mlp in mlps:
            mlp.act = nn.LeakyReLU(config.negative_slope)
    elif config.activation == "learnable_leaky_relu" and config.slopes == "layer":
        for mlp in mlps:
            mlp.act = LearnableLeakyReLU(config.negative_slope)
    elif config.activation == "learnable_leaky_relu":
        body.activation = LearnableLeakyReLU(config.negative_slope)
        for mlp in mlps:
            # Used by every MLP and owned by none: one name in the state dict, one parameter for the optimizer.
            del mlp.act
            mlp.__dict__["act"] = body.activation


def _projection(own: Any, config: Any) -> Any:
    """GPT-2's projection into the residual stream, without its bias or with a gain where the configuration says so."""
    bias = config.biases == "all"
    if config.residual_gain != "none":
        learned = config.residual_gain == "learned"
        return GainedConv1D(own.nf, own.nx, bias=bias, initial=branch_gain(config.n_layer), learned=learned)
    return own if bias else BiaslessConv1D(own.nf, own.nx)


def _init_scalar(module: nn.Module) -> None:
    if isinstance(module, (LearnableLeakyReLU, GainedConv1D)):
        module.reset_parameters()


_CLASSES: dict[tuple[str, bool], tuple[Any, Any]] = {
    ("gpt2", True): (GPT2Config, GPT2LMHeadModel),
    ("gpt2", False): (RevivalGPT2Config, RevivalGPT2LMHeadModel),
    ("pythia", True): (GPTNeoXConfig, GPTNeoXForCausalLM),
    ("pythia", False): (RevivalGPTNeoXConfig, RevivalGPTNeoXForCausalLM),
    ("llama", True): (LlamaConfig, LlamaForCausalLM),
    ("qwen2", True): (Qwen2Config, Qwen2ForCausalLM),
    ("qwen3", True): (Qwen3Config, Qwen3ForCausalLM),
}
"""By the family in [architecture], and whether it is plain."""


def build_model(architecture: ArchitectureSpec, *, eot_token_id: int) -> PreTrainedModel:
    """A freshly initialised model without dropout, on the CPU and in float32.

    It is of transformers' own class if that has the architecture, else of a class of this module, and initialised as
    its class does it. Models of one shape and with the same `biases` begin with the same matrices if they are built from the
    same random state, whatever else differs.
    """
    entries: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "bos_token_id": eot_token_id,
        "eos_token_id": eot_token_id,
        "tie_word_embeddings": architecture.tied,
        "attention_bias": architecture.attention_bias,
        "mlp_bias": architecture.mlp_bias,
    }
    entries = {name: value for name, value in entries.items() if value is not None}
    if architecture.family == "gpt2":
        entries |= architecture.model_dump(include={"n_positions", "n_embd", "n_layer", "n_head", "n_inner"})
        entries |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        entries |= {theirs: getattr(architecture, ours) for ours, theirs in SIZES.items()}
        entries |= {"intermediate_size": architecture.width_of_mlp}
        # Some configurations have 32 heads of keys by themselves, and heads of width 128.
        if "n_kv_head" in architecture.parts.choices:
            entries |= {"num_key_value_heads": architecture.n_kv_head or architecture.n_head}
            entries |= {"head_dim": architecture.width_of_head}
    if not architecture.is_plain:
        entries |= architecture.model_dump(include={*architecture.parts.choices} & {*REVIVAL_CHOICES, *LADDER_CHOICES})
    elif architecture.activation == "relu":
        entries["activation_function" if architecture.family == "gpt2" else "hidden_act"] = "relu"
    config_class, model_class = _CLASSES[architecture.family, architecture.is_plain]
    model: PreTrainedModel = model_class(config_class(**entries))
    if architecture.initialisation == "unit":
        keep_the_streams_size(model)
    return model
