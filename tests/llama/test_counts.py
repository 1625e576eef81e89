"""FLOPs of generation, against counting them one product at a time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama import Transformer
from llama.attention import Scoring
from llama.config import ModelConfig, MoEConfig
from llama.counts import generation_flops

SIZES = {"vocab_size": 40, "dim": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 24}
CONFIGS = {
    "dense": ModelConfig(**SIZES),
    "untied, with biases": ModelConfig(**SIZES, tie_embeddings=False, attention_bias="qkvo", position="learned"),
    "windows": ModelConfig(**SIZES, sliding_window=5, full_attention_layers=1),
    "experts": ModelConfig(**SIZES, moe=MoEConfig(num_experts=8, top_k=2, num_shared_experts=1, expert_hidden_dim=8)),
}


def counted(config: ModelConfig, start: int, end: int) -> int:
    """One product and sum after the other: two FLOPs each."""
    assert config.head_dim is not None and config.num_kv_heads is not None
    attention = config.dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    total = config.vocab_size * config.dim
    for layer in range(config.num_layers):
        window = config.window(layer)
        for query in range(start, end):
            total += attention
            moe = config.moe
            if moe is None:
                total += 3 * config.dim * config.ffn_hidden_dim
            else:
                hidden = moe.top_k * moe.expert_hidden_dim + moe.shared_hidden_dim
                total += config.dim * moe.num_experts + 3 * config.dim * hidden
            seen = sum(1 for key in range(query + 1) if window is None or query - key < window)
            total += 2 * config.num_heads * config.head_dim * seen
    return 2 * total


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_generation_costs_what_counting_says(config: ModelConfig) -> None:
    prompt, new = 7, 6
    passes = [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + new - 1))]
    cached = [sum(counted(config, *each) for each in passes[: n + 1]) for n in range(new)]
    assert generation_flops(config, prompt, new, cached=True) == cached
    uncached = [sum(counted(config, 0, prompt + step) for step in range(n + 1)) for n in range(new)]
    assert generation_flops(config, prompt, new, cached=False) == uncached


def test_a_step_with_the_cache_costs_what_torch_counts() -> None:
    config = CONFIGS["dense"]
    model = Transformer(config)
    model.init_weights(0)
    context = 9

    def attend(
        layer: int, q_BLHD: torch.Tensor, k_BLGD: torch.Tensor, v_BLGD: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        cached = torch.zeros(1, context, *k_BLGD.shape[2:])
        k, v = (torch.cat((cached, x), dim=1).repeat_interleave(2, dim=2).transpose(1, 2) for x in (k_BLGD, v_BLGD))
        weights = (q_BLHD.transpose(1, 2) @ k.transpose(-1, -2) * scoring.scale).softmax(dim=-1)
        return (weights @ v).transpose(1, 2)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([[3]]), positions=torch.tensor([[context]]), attend=attend)
    first, second = generation_flops(config, context, 2, cached=True)
    assert counter.get_total_flops() == second - first
