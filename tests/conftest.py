"""Fixtures that several folders share."""

import os
import socket
from pathlib import Path

import torch

pytest_plugins = ("tests.swift",)

# Matplotlib keeps its font cache in the home folder unless told otherwise, and so does llama.kernels its libraries.
_CACHE = Path(__file__).parent.parent / ".cache"
os.environ.setdefault("MPLCONFIGDIR", str(_CACHE / "matplotlib"))
os.environ.setdefault("XDG_CACHE_HOME", str(_CACHE))

if not torch.cuda.is_available():
    # Triton decides when it is imported; without it installed this means nothing.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def find_free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
