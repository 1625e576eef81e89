import pytest

from llama.bench.ceilings import bandwidth_ceiling, gemm_ceiling, measure_ceilings, weight_bytes
from llama.bench.workload import Cell
from llama.config import ModelConfig
from llama.model import Transformer
from llama.presets import preset

SHAPE = {"vocab_size": 100, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 48}
TIED, UNTIED = ModelConfig(**SHAPE), ModelConfig(**SHAPE, tie_embeddings=False)


def test_a_step_reads_every_weight_but_an_embedding_table_of_its_own() -> None:
    parameters = sum(parameter.numel() for parameter in Transformer(TIED).parameters())
    assert weight_bytes(TIED) == weight_bytes(UNTIED) == 2 * parameters


def test_the_bandwidth_ceiling_reads_the_weights_once_a_step_and_every_sequence_its_own_cache() -> None:
    per_token = 2 * 2 * 2 * 8 * 2  # layers, keys and values, kv heads, head dim, bytes
    step = weight_bytes(TIED) + 8 * per_token * (256 + 16)
    assert bandwidth_ceiling(TIED, Cell("decode", 8, 256), 32, 10.0) == pytest.approx(8 * 10e9 / step)


def _products(context: float, outputs: float) -> float:
    """FLOPs of a token, by hand: projections, feed-forward, scores and values, outputs."""
    dim, kv, hidden, vocab = 32, 16, 48, 100
    norms = 2 * (2 * 2 * dim + dim)  # counted like matrices by `flops_per_token`: of no weight
    layer = 2 * (2 * dim * dim + 2 * dim * kv + 3 * dim * hidden) + 4 * dim * context
    return 2 * layer + 2 * dim * vocab * outputs + norms


def test_the_gemm_ceiling_of_decode_sees_the_whole_context_and_of_prefill_half_of_it_and_one_output() -> None:
    decode = gemm_ceiling(TIED, Cell("decode", 8, 256), 32, 1.0)
    assert decode == pytest.approx(1e9 / _products(256 + 16, outputs=1), rel=1e-6)
    prefill = gemm_ceiling(TIED, Cell("prefill", 8, 256), 32, 1.0)
    assert prefill == pytest.approx(1e9 / _products(128, outputs=1 / 256), rel=1e-6)


def test_what_the_machine_does_is_measured() -> None:
    ceilings = measure_ceilings(preset("tiny"))
    assert 0.1 < ceilings.read_gbps < 10_000 and ceilings.gflops == max(ceilings.bf16_gflops, ceilings.fp32_gflops) > 1
