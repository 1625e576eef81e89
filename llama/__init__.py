"""The model: LLaMA decoders, dense and mixture of experts, in plain PyTorch. Nothing here imports Ray."""

from llama.config import ModelConfig, MoEConfig
from llama.model import Transformer

__all__ = ["MoEConfig", "ModelConfig", "Transformer"]
