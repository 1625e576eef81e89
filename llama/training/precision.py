"""How matrices are multiplied on the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from llama.training.process import ProcessSetting

_MAX_ERROR = 1e-5
"""Relative error of a product, Frobenius norm: fp32 stays near 3e-7, bf16 is near 2e-3."""


def fast_cpu_matmul() -> AbstractContextManager[bool]:
    """Lets oneDNN multiply fp32 matrices inside the block, where that is still fp32; yields whether it does.

    The default library is slow on some processors. The switch that selects oneDNN also allows it bf16: a processor
    with matrix units (AMX) takes that up and loses accuracy, others compute in fp32 and only gain speed. So the error
    is measured, and where it is not that of fp32 nothing is changed.
    """
    return _SETTING.on()


class _Switch:
    """The process's setting, and what it was before."""

    def __init__(self) -> None:
        self._matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # made at import, unseen by mypy
        self._before = self._matmul.fp32_precision

    def turn_on(self) -> bool:
        if not torch.backends.mkldnn.is_available():
            return False
        accurate = False
        self._before = self._matmul.fp32_precision
        self._matmul.fp32_precision = "bf16"
        try:
            accurate = _product_error() < _MAX_ERROR
        finally:
            if not accurate:
                self.turn_off()
        return accurate

    def turn_off(self) -> None:
        self._matmul.fp32_precision = self._before


def _product_error() -> float:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())


_SWITCH = _Switch()
_SETTING = ProcessSetting(_SWITCH.turn_on, _SWITCH.turn_off)
