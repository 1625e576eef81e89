"""The model: LLaMA decoders, dense and mixture of experts, and encoder–decoders, in plain PyTorch; without Ray."""

from typing import TYPE_CHECKING

from llama.config import ModelConfig, MoEConfig
from llama.seq2seq_config import Seq2SeqConfig

if TYPE_CHECKING:
    from llama.model import Transformer
    from llama.seq2seq import Seq2Seq

__all__ = ["MoEConfig", "ModelConfig", "Seq2Seq", "Seq2SeqConfig", "Transformer"]


def __getattr__(name: str) -> object:
    # Configs and tokenizers are read by processes that need no model, and torch takes seconds to import.
    if name == "Transformer":
        from llama.model import Transformer

        return Transformer
    if name == "Seq2Seq":
        from llama.seq2seq import Seq2Seq

        return Seq2Seq
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
