"""Rates of a training: what they are of, and that all ranks have the same."""

import math
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama.config import ModelConfig
from llama.lora import LoraConfig, apply_lora, init_adapters
from llama.model import Transformer
from llama.training import meter as meter_module
from llama.training.batch import Batch, loss_sum
from llama.training.mesh import process_group
from llama.training.meter import Meter
from llama.training.peak import gemm_flops, named_flops, peak_flops
from tests.distributed import run_ranks
from tests.llama.training.helpers import DENSE, samples, train_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA GB200", 2450),
        ("NVIDIA L40S", 362),
    ],
)
def test_the_peak_of_a_known_device(name, tflops):
    assert named_flops(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["Quantum 9000", "NVIDIA L40", "NVIDIA RTX A4000"])
def test_an_unknown_device_has_no_peak(name):
    assert named_flops(name) is None


def test_the_cpus_peak_is_measured_quickly_and_draws_no_random_number():
    state = torch.get_rng_state()
    began = time.perf_counter()
    peak = peak_flops(CPU, torch.float32)
    assert time.perf_counter() - began < 2  # tens of milliseconds on a quiet machine
    assert torch.equal(torch.get_rng_state(), state)
    assert peak > 0.5 * gemm_flops(128, torch.float32)


def rates(rank, world_size):
    """A rank that is slow to save, and one that has more memory."""
    meter_module.peak_flops = lambda device, dtype: 1e9 * (rank + 1)
    meter_module.peak_bytes = lambda device: 1000 * (rank + 1)
    meter = Meter(DENSE, train_config(), CPU, tokens=100)
    with meter.saving():
        time.sleep(0.2 * (1 - rank))
    with meter.validating():
        time.sleep(0.6)
    first = meter.measure(1100)
    return first, meter.measure(1100)


@pytest.mark.integration
def test_rates_are_those_of_all_ranks_and_the_same_on_each():
    (first, second), other = run_ranks(rates, 2)
    assert (first, second) == other
    assert 0.2 <= first.checkpoint_seconds < 0.5 and second.checkpoint_seconds == 0
    assert 1000 / 0.5 < first.tokens_per_second < 1000 / 0.19  # validation's 0.6 s are no training
    assert first.mfu == pytest.approx(first.tokens_per_second * DENSE.flops_per_token(16) / 3e9)
    assert first.memory_bytes == 2000
    assert second.tokens_per_second == 0


def test_no_mfu_where_a_peak_is_unknown(monkeypatch):
    monkeypatch.setattr(meter_module, "peak_flops", lambda device, dtype: None)
    with process_group():
        measured = Meter(DENSE, train_config(), CPU, tokens=0).measure(10)
    assert measured.mfu is None and measured.tokens_per_second > 0
    assert measured.memory_bytes > 100 * 2**20 and math.isfinite(measured.checkpoint_seconds)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=1, targets=("wq",))])
def test_the_arithmetic_is_what_torch_counts(monkeypatch, lora):
    """But for what short attention and small adapters make."""
    config = ModelConfig(vocab_size=256, dim=128, num_layers=8, num_heads=4, max_seq_len=64)
    model = Transformer(config)
    model.init_weights(0)
    if lora is not None:
        init_adapters(apply_lora(model, lora), 0)
    tokens = samples(0, 2, train_config(), config.vocab_size)
    with FlopCounterMode(display=False) as counter:
        loss_sum(model, Batch(tokens[:, :-1], tokens[:, 1:])).backward()
    counted = counter.get_total_flops() / tokens[:, 1:].numel()
    monkeypatch.setattr(meter_module, "peak_flops", lambda device, dtype: 1.0)
    with process_group():
        rates = Meter(config, train_config(lora=lora), CPU, tokens=0).measure(10)
    assert rates.mfu / rates.tokens_per_second == pytest.approx(counted, rel=0.05)
