"""Fixtures that several folders share."""

import socket

pytest_plugins = ("tests.swift",)


def find_free_port() -> int:
    """A TCP port on loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
