"""When a request ends: minimum lengths, stop strings and end tokens."""

from dataclasses import replace

import pytest

from llama.engine import Engine, SamplingParams
from tests.llama.engine.models import ByteTokenizer, ScriptedModel

PARAMS = SamplingParams(temperature=0, max_tokens=50)


def run(script: str | list[int], params: SamplingParams):
    token_ids = list(script.encode()) if isinstance(script, str) else script
    return Engine(ScriptedModel([*token_ids, 256]), ByteTokenizer()).generate(["a"], params)[0]


def test_the_end_token_does_not_come_before_its_time():
    """Where the model wants it too early, it gets its second choice, token 0."""
    script = [*b"abcd", 256, *b"ef", 256, *b"gh"]
    for least, expected in [(0, b"bcd"), (3, b"bcd"), (4, b"bcd\0ef"), (6, b"bcd\0ef"), (7, b"bcd\0ef\0gh")]:
        completion = run(script, replace(PARAMS, min_tokens=least))
        assert completion.token_ids == [*expected, 256] and completion.finish_reason == "stop"
    ignored = run(script, replace(PARAMS, min_tokens=7, ignore_eos=True))
    assert ignored.token_ids == [*b"bcd", 256, *b"ef", 256, *b"gh", 256]


def test_stop_tokens_do_not_come_before_their_time():
    params = replace(PARAMS, stop_token_ids=(ord("d"),))
    assert run("abcdefgdh", params).text == "bc"
    late = run("abcdefgdh", replace(params, min_tokens=4))
    assert (late.text, late.token_ids, late.finish_reason) == ("bc\0efg", [*b"bc\0efgd"], "stop")


def test_transformers_bans_the_end_token_for_as_long():
    transformers = pytest.importorskip("transformers")
    import torch

    processor = transformers.MinNewTokensLengthLogitsProcessor(1, 3, 256, device="cpu")
    banned = [
        processor(torch.zeros(1, 1 + length, dtype=torch.int64), torch.zeros(1, 257))[0, 256].item() < 0
        for length in range(6)
    ]
    params = replace(PARAMS, min_tokens=3)
    produced = [len(run([97, *[98] * length, *[256] * 9], params).token_ids) for length in range(6)]
    assert [tokens != length + 1 for length, tokens in enumerate(produced)] == banned


def test_stop_strings_count_from_the_minimum_on():
    script, params = "a one STOP two STOP three", replace(PARAMS, stop="STOP")
    end = len(" one STOP")
    for least, text in [(0, " one "), (end, " one "), (end + 1, " one STOP two "), (30, " one STOP two STOP three")]:
        completion = run(script, replace(params, min_tokens=min(least, 24)))
        assert completion.text == text and completion.finish_reason == "stop"
