"""The model: LLaMA decoders, dense and mixture of experts, in plain PyTorch. Nothing here imports Ray."""

from typing import TYPE_CHECKING

from llama.config import ModelConfig, MoEConfig

if TYPE_CHECKING:
    from llama.model import Transformer

__all__ = ["MoEConfig", "ModelConfig", "Transformer"]


def __getattr__(name: str) -> object:
    # Configs and tokenizers are read by processes that need no model, and torch takes seconds to import.
    if name == "Transformer":
        from llama.model import Transformer

        return Transformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
