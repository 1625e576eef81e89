"""Waiting for what threads do."""

import threading
import time


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def threads(*names):
    """The running threads of these names."""
    return {thread for thread in threading.enumerate() if thread.name in names}
