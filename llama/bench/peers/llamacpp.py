"""llama.cpp's side of `python -m llama.bench engine`; runs as a script in the peer's own environment.

Through its C interface, by the bindings of llama-cpp-python: several sequences in one `llama_decode`, each with a cache
of its own in f16, with flash attention or without it, whichever is faster at the task: on a CPU that depends on its
kind and size. The weights become a GGUF of the same bf16 values beside those they are read from.
"""

from __future__ import annotations

import ctypes
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from driver import Answer, fastest, serve

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BATCH = 512
"""Tokens of one `llama_decode`: what it computes at once unless told otherwise."""
_ATTENTION = {
    "flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "no flash attention": llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in _TENSORS:
        return f"{_TENSORS[name]}.weight"
    layer, own = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_LAYER_TENSORS[own]}.weight"


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp's rotation, which turns neighbours."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(directory: Path) -> Path:
    """A Hugging Face directory of a Llama in bf16 as a GGUF file, without a vocabulary."""
    config = json.loads((directory / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise ValueError(f"the weights are of {config['architectures']}; only LlamaForCausalLM is written as GGUF")
    path = directory / "model.gguf"
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # A safetensors file: the header's length in 8 bytes, the header as JSON, the tensors.
    stored = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(stored[:8], "little")
    for name, entry in json.loads(stored[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(stored[begin:end], np.uint16).reshape(entry["shape"])
        for kind, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if kind in name:
                bits = _interleaved(bits, count)
        if bits.ndim == 1:
            writer.add_tensor(_gguf_name(name), (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(bits).view(np.uint8)
            writer.add_tensor(_gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Sequences:
    """A context of llama.cpp that holds so many sequences of so many tokens."""

    def __init__(self, model: Any, count: int, length: int, threads: int, attention: str) -> None:
        params = llama_cpp.llama_context_default_params()
        # The context is divided among the sequences, in steps of 256.
        params.n_ctx = count * -(-length // 256) * 256
        params.n_seq_max = count
        params.n_batch = params.n_ubatch = max(_BATCH, count)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = _ATTENTION[attention]
        params.kv_unified = False
        params.no_perf = True
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {count} sequences of {length} tokens")
        self._size = params.n_batch
        self._batch = llama_cpp.llama_batch_init(self._size, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._memory = llama_cpp.llama_get_memory(self._context)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)

    def keep(self, length: int) -> None:
        """Drops all but the first `length` tokens of every sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, -1, length, -1)

    def prefill(self, prompts: list[list[int]]) -> list[int]:
        """Every sequence's next token after its prompt."""
        tokens = []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), self._size):
                part = enumerate(prompt[begin : begin + self._size], begin)
                found = self._compute([(token, position, sequence) for position, token in part], only_last=True)
            tokens += found
        return tokens

    def decode(self, tokens: list[int], position: int) -> list[int]:
        """Every sequence's next token after its own, which stands at `position`."""
        return self._compute([(token, position, sequence) for sequence, token in enumerate(tokens)], only_last=False)

    def _compute(self, entries: list[tuple[int, int, int]], only_last: bool) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(entries)
        for index, (token, position, sequence) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
            batch.logits[index] = not only_last or index == len(entries) - 1
        code = llama_cpp.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        outputs = 1 if only_last else len(entries)
        logits = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(logits, (outputs, self._vocab_size)).argmax(1).tolist()


class Worker:
    """Keeps the contexts of its last task: the next is mostly the same again."""

    def __init__(self, model: Any, threads: int) -> None:
        self._model, self._threads = model, threads
        self._task: tuple[str, int, int] | None = None
        self._prompts: list[list[int]] = []
        self._contexts: dict[str, Sequences] = {}
        self._first: list[int] = []

    def __call__(self, task: dict[str, Any]) -> Answer:
        prompts, steps = task["prompts"], task.get("generate", 0)
        shape = (task["kind"], len(prompts), len(prompts[0]) + steps)
        work = partial(self._prefill, prompts) if task["kind"] == "prefill" else partial(self._decode, prompts, steps)
        if shape != self._task or (steps and prompts != self._prompts):
            self._close(*self._contexts)
            self._contexts = {name: Sequences(self._model, *shape[1:], self._threads, name) for name in _ATTENTION}
            if steps:
                self._first = [context.prefill(prompts) for context in self._contexts.values()][0]
            best = fastest({name: partial(work, context) for name, context in self._contexts.items()})
            self._close(*(name for name in _ATTENTION if name != best))
            self._task, self._prompts = shape, prompts
        ((name, context),) = self._contexts.items()
        return work(context) | {"settings": name}

    def _close(self, *names: str) -> None:
        for name in names:
            self._contexts.pop(name).close()

    @staticmethod
    def _prefill(prompts: list[list[int]], context: Sequences) -> Answer:
        context.keep(0)
        began = time.perf_counter()
        tokens = context.prefill(prompts)
        return {"seconds": time.perf_counter() - began, "tokens": tokens}

    def _decode(self, prompts: list[list[int]], steps: int, context: Sequences) -> Answer:
        length = len(prompts[0])
        context.keep(length)
        tokens = self._first
        began = time.perf_counter()
        for step in range(steps):
            tokens = context.decode(tokens, length + step)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "generated": steps * len(prompts), "tokens": self._first}


def start(settings: dict[str, Any]) -> tuple[Answer, Any]:
    llama_cpp.llama_backend_init()
    path = write_gguf(Path(settings["directory"]))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load {path}")
    # "CPU : AVX512 = 1 | AVX512_BF16 = 1 | ...": what it was built with.
    built = llama_cpp.llama_print_system_info().decode().replace(":", "|").split("|")
    units = [part.split("=")[0].strip() for part in built if "AVX512" in part or "AMX" in part]
    text = f"an f16 cache for each sequence, batches of {_BATCH}, built with {', '.join(units) or 'no AVX512'}"
    return {"version": llama_cpp.__version__, "settings": text}, Worker(model, settings["threads"])


if __name__ == "__main__":
    serve(start)
