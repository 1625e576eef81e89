"""Small models and a tokenizer for the engine's tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from llama import ModelConfig, MoEConfig, Transformer

VOCAB_SIZE = 97
MAX_SEQ_LEN = 96


DENSE = ModelConfig(
    vocab_size=VOCAB_SIZE,
    dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    multiple_of=16,
    max_seq_len=MAX_SEQ_LEN,
    tie_embeddings=False,
)
MOE = replace(DENSE, moe=MoEConfig(num_experts=4, top_k=2, num_shared_experts=1))


def random_model(config: ModelConfig = DENSE, *, seed: int = 0) -> Transformer:
    """A model with weights large enough that its greedy output is varied, not one repeated token."""
    model = Transformer(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
            else:
                # Biases start at 0 and norms at 1, where they could be forgotten unnoticed.
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for name, buffer in model.named_buffers():
            buffer.normal_(0, 0.2, generator=generator)
            if name.endswith("running_var"):
                buffer.abs_().add_(0.05)
    return model


@torch.inference_mode()
def plain_greedy(model: Transformer, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy generation that computes the whole sequence anew for every token."""
    token_ids = list(prompt)
    for _ in range(max_tokens):
        token_ids.append(int(model(torch.tensor([token_ids]))[0, -1].argmax()))
    return token_ids[len(prompt) :]


class ScriptedModel(Transformer):
    """At position p it is certain that the next token is `script[p + 1]`; fails at the `fail_at`-th forward pass."""

    def __init__(self, script: Sequence[int], *, fail_at: int | None = None) -> None:
        nn.Module.__init__(self)
        self.config = ModelConfig(
            vocab_size=257, dim=2, num_layers=1, num_heads=1, multiple_of=2, max_seq_len=len(script)
        )
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = torch.tensor(script)
        self.forwards = 0
        self.fail_at = fail_at

    def forward(
        self,
        tokens_BL: Tensor,
        *,
        positions=None,
        attend=None,
        routing=None,
        output_index=None,
        labels=None,
        rope_length=None,
    ) -> Tensor:
        self.forwards += 1
        if self.forwards == self.fail_at:
            raise ArithmeticError("scripted failure")
        following = self.script[positions.flatten()[output_index] + 1]
        return nn.functional.one_hot(following, 257).float() * 100


class ByteTokenizer:
    """Token id = byte; 256 is the end of text."""

    eos_ids = frozenset((256,))
    token_bytes = (*(bytes([byte]) for byte in range(256)), None)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token_id for token_id in ids if token_id < 256).decode(errors="replace")
