"""An adapter that lets TransformerLens 4 read LN-free models.

Importing this module imports TransformerLens; importing the package does not.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.supported_architectures.gpt2 import GPT2ArchitectureAdapter


class NormFreeGPT2Adapter(GPT2ArchitectureAdapter):
    """TransformerLens' GPT-2 with identities where it expects norms.

    The slots ln1, ln2 and ln_final keep their hooks, which see the residual stream itself.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.cfg.normalization_type = None
        assert self.component_mapping is not None
        blocks = self.component_mapping["blocks"].submodules
        blocks["ln1"] = GeneralizedComponent(name="ln_1", config=self.cfg)
        blocks["ln2"] = GeneralizedComponent(name="ln_2", config=self.cfg)
        self.component_mapping["ln_final"] = GeneralizedComponent(name="transformer.ln_f", config=self.cfg)
