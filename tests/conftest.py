"""Fixtures that several folders share."""

import os
import socket
from pathlib import Path

pytest_plugins = ("tests.swift",)

# Matplotlib keeps its font cache in the home folder unless told otherwise.
os.environ.setdefault("MPLCONFIGDIR", str(Path(__file__).parent.parent / ".cache" / "matplotlib"))


def find_free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
