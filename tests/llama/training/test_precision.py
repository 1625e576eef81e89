import pytest
import torch

from llama.training import precision
from llama.training.precision import fast_cpu_matmul


def product_error() -> float:
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(300, 200, generator=generator), torch.randn(200, 100, generator=generator)
    return float((a @ b - a.double() @ b.double()).norm() / (a @ b).norm())


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def test_products_stay_fp32_and_the_setting_comes_back():
    before = setting()
    with fast_cpu_matmul() as fast:
        assert product_error() < 1e-5
        assert (setting() != before) == fast
    assert setting() == before


def test_an_interrupted_probe_leaves_the_setting_as_it_was(monkeypatch):
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"

    def interrupted():
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patched:
            patched.setattr(precision, "_product_error", interrupted)
            with pytest.raises(KeyboardInterrupt), fast_cpu_matmul():
                pass
        assert setting() == "ieee"
        with fast_cpu_matmul():
            pass
        assert setting() == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_an_inaccurate_processor_is_left_alone(monkeypatch):
    before = setting()
    monkeypatch.setattr(precision, "_product_error", lambda: 2e-3)
    with fast_cpu_matmul() as fast:
        assert not fast
        assert setting() == before
