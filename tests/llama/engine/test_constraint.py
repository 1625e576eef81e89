"""Constrained output against `jsonschema`, `re` and Python's own parser."""

import ast
import asyncio
import json
import random
import re
import sys
import threading
from dataclasses import replace

import jsonschema
import pytest
import torch

from llama.engine import Engine, EngineConfig, SamplingParams
from llama.engine.constraint import MAX_CHARACTERS, ConstraintCompiler, mask_words
from llama.tokenizer import Tokenizer
from llama.tokenizer_training import train_tokenizer
from tests.llama.engine.models import DENSE, ByteTokenizer, random_model
from tests.llama.engine.test_engine import finish

BYTES = replace(DENSE, vocab_size=257, max_seq_len=400)
MANY = SamplingParams(max_tokens=380, seed=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(random_model(BYTES), ByteTokenizer(), EngineConfig(num_blocks=1024))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    texts = [json.dumps({"name": "value", "list": [1, 23, 456], "nested": {"flag": True, "none": None}})] * 20
    return train_tokenizer(texts, 330, "bpe")


def random_schema(rng: random.Random, depth: int = 0) -> dict:
    """One whose values are all short, so that any model comes to an end."""
    kinds = ["enum", "const", "boolean", "null", "integer", "number", "string", "pattern"]
    nested = ["array", "tuple", "object", "object", "anyOf"]
    if depth == 0:
        kinds = [*kinds[4:], *nested, *nested, "$ref"]
    elif depth < 3:
        kinds += nested
    kind = rng.choice(kinds)
    if kind == "enum":
        values = ["a", "b c", 'é"\\', 1, -2.5, True, None, [1, "x"], {"k": []}]
        return {"enum": rng.sample(values, rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["", "日本", 0, False, {"a": [None]}])}
    if kind in ("boolean", "null"):
        return {"type": rng.choice([kind, ["boolean", "null"]])}
    if kind == "integer":
        low = rng.randrange(-1000, 1000)
        bounds = rng.choice([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": "integer", bounds[0]: low, bounds[1]: low + rng.randrange(2, 500)}
    if kind == "number":
        return {"type": "number", "minimum": 0, "maximum": rng.randrange(1, 50)}
    if kind == "string":
        least = rng.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(5)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^(yes|no)!?$", "^[0-9]{3}-[A-Z]$"])}
    if kind == "array":
        least = rng.randrange(3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "$ref":
        return {
            "$defs": {"part": random_schema(rng, 1)},
            "type": "array",
            "items": {"$ref": "#/$defs/part"},
            "maxItems": 3,
        }
    names = rng.sample(["a", "b", "long name", "ü", 'quote"d'], rng.randrange(4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_200_random_schemas_are_obeyed(kind, engine, bpe):
    rng = random.Random(17)
    if kind == "bpe":
        model = random_model(replace(BYTES, vocab_size=bpe.vocab_size + 7))  # more rows than tokens
        engine = Engine(model, bpe, EngineConfig(num_blocks=1024))
    schemas = [random_schema(rng) for _ in range(200)]
    names = {}
    for number, schema in enumerate(schemas):
        jsonschema.Draft202012Validator.check_schema(schema)
        params = replace(MANY, json_schema=schema, seed=number, temperature=rng.choice([0.0, 1.0, 1.0]))
        names[engine.add_request(engine.encode("go"), params)] = schema
    texts, reasons = dict.fromkeys(names, ""), {}
    for chunk in finish(engine):
        texts[chunk.request_id] += chunk.text
        reasons[chunk.request_id] = chunk.finish_reason
    for name, schema in names.items():
        if reasons[name] == "stop":
            assert "\n" not in texts[name]
            jsonschema.validate(json.loads(texts[name]), schema, jsonschema.Draft202012Validator)
    assert list(reasons.values()).count("stop") >= 196, "a number may have too many digits for max_tokens"
    assert len(set(texts.values())) > 120, "the schemas or the model are too dull to test anything"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "pattern", [r"[a-c]{2,5}", r"(ab|a)*c", r"-?(0|[1-9][0-9]{0,3})(\.[0-9]{1,2})?", "日?本+!", "a/b//", ""]
)
def test_an_expression_matches_the_whole_output(engine, pattern, temperature):
    params = replace(MANY, temperature=temperature, regex=pattern, max_tokens=60)
    completions = engine.generate(["x"], replace(params, n=4 if temperature else 1))
    for completion in completions:
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text)
        else:
            assert len(completion.token_ids) == 60
    assert temperature == 0 or "stop" in [completion.finish_reason for completion in completions]


def test_a_grammar_derives_the_output(engine):
    rules = ['start: "[" (item ("," item){0,2})? "]"', 'item: NUMBER | "(" NUMBER ",)"', "NUMBER: /[1-9][0-9]{0,2}/"]
    grammar = "\n".join(rules)
    for seed in range(5):
        completion = engine.generate(["x"], replace(MANY, grammar=grammar, seed=seed))[0]
        assert completion.finish_reason == "stop"
        value = ast.literal_eval(completion.text)
        assert isinstance(value, list) and len(value) <= 3


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"type": "string", "minLength": 3, "maxLength": 1}},
        {"json_schema": {"type": "integer", "minimum": 0.2, "maximum": 0.8}},
        {"json_schema": {"type": "object", "properties": {"a": False}, "required": ["a"]}},
        {"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}},
        {"json_schema": {"$ref": "#"}},
        {"json_schema": {"enum": []}},
        {"json_schema": "false"},
        {"json_schema": "{"},
        {"json_schema": "[1]"},
        {"json_schema": {"type": "text"}},
        {"json_schema": {"not": {}}},
        {"json_schema": {"$ref": "https://example.invalid/schema"}},
        {"json_schema": {"x-guidance": {"lenient": True}}},
        {"json_schema": '{"items":' * 5000 + "{}" + "}" * 5000},
        {"json_schema": {"const": "x" * MAX_CHARACTERS}},
        {"regex": r"[^\s\S]"},
        {"regex": "("},
        {"regex": "(?=a)b"},
        {"regex": "(" * 30_000 + ")" * 30_000},
        {"grammar": ""},
        {"grammar": "start: missing"},
        {"grammar": 'start: start "a"'},
        {"grammar": "start: A\nA: /a/ & /b/"},
        {"grammar": "start: " + "(" * 30_000},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_an_impossible_constraint_is_named_before_it_is_queued(engine, fields):
    (field,) = fields
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^{field}=") as caught:
            engine.add_request([1], SamplingParams(**fields))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_an_impossible_constraint_among_many_is_found_before_anything_is_computed():
    engine = Engine(random_model(BYTES), ByteTokenizer(), EngineConfig(max_waiting=1))
    with pytest.raises(ValueError, match=r"^regex='\['"):
        engine.generate([[1], [2], [3]], [SamplingParams(), SamplingParams(), SamplingParams(regex="[")])
    assert engine.stats().generated_tokens == 0 and not engine.has_work


def test_long_chains_of_references_do_not_end_the_process(engine):
    names = ["r" + "".join(chr(97 + int(digit)) for digit in str(number)) for number in range(3500)]
    rules = "\n".join(f"{name}:{following}" for name, following in zip(names, names[1:], strict=False))
    grammar = f'start:{names[0]}\n{rules}\n{names[-1]}:"x"'
    assert 30_000 < len(grammar) < MAX_CHARACTERS
    assert engine.generate(["a"], SamplingParams(grammar=grammar))[0].text == "x"


def test_a_constraint_needs_bytes_and_the_library(monkeypatch):
    class Wordy(ByteTokenizer):
        @property
        def token_bytes(self):
            raise ValueError("the tokenizer's decoder is odd")

    for tokenizer, reason in [(None, "token_bytes"), (Wordy(), "decoder is odd")]:
        with pytest.raises(ValueError, match=rf"^regex='a' needs a tokenizer that tells .*{reason}"):
            Engine(random_model(BYTES), tokenizer).add_request([1], SamplingParams(regex="a"))
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match="^regex='a' needs llguidance; run: pip install 'llguidance"):
        Engine(random_model(BYTES), ByteTokenizer()).add_request([1], SamplingParams(regex="a"))
    assert Engine(random_model(BYTES), ByteTokenizer()).generate(["a"], SamplingParams(max_tokens=1))


def test_a_constraint_is_compiled_once_and_the_latest_are_kept():
    compiler = ConstraintCompiler(ByteTokenizer(), 257, capacity=2)
    compiled, compile = [], compiler._compile
    compiler._compile = lambda kind, text: (compiled.append(text), compile(kind, text))[1]
    assert compiler.start(SamplingParams()) is None
    for text in "abacabb":
        compiler.start(SamplingParams(regex=text))
    assert compiled == ["a", "b", "c", "b"]


def test_the_engine_goes_on_while_a_constraint_is_compiled(engine):
    compile, answered = engine._constraints._compile, []

    def slow(kind, text):
        thread = threading.Thread(target=lambda: answered.append((engine.step(), engine.stats())))
        thread.start()
        thread.join(20)
        return compile(kind, text)

    engine._constraints._compile = slow
    try:
        engine.generate(["a"], SamplingParams(regex="while"))
    finally:
        engine._constraints._compile = compile
    assert len(answered) == 1


def test_constrained_requests_notice_neither_preemption_nor_a_step_done_again(engine):
    model = random_model(BYTES)
    small = Engine(model, ByteTokenizer(), EngineConfig(num_blocks=14, block_size=4, max_batched_tokens=9))
    schema = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 4, "maxItems": 8}
    plain = replace(MANY, max_tokens=40, logprobs=1)
    settings = [replace(plain, seed=seed, json_schema=schema if seed % 2 else None) for seed in range(8)]
    names = [small.add_request(list(b"go"), params) for params in settings]
    run, runs = small._runner.run, 0

    def interrupted(inputs):
        nonlocal runs
        runs += 1
        computed = run(inputs)
        if runs % 5 == 0:
            raise KeyboardInterrupt
        return computed

    small._runner.run = interrupted
    tokens = {name: [] for name in names}
    while small.has_work:
        try:
            for chunk in small.step():
                tokens[chunk.request_id] += chunk.token_ids
        except KeyboardInterrupt:
            continue
    assert small.stats().preemptions > 0 and runs > 20
    for name, params in zip(names, settings, strict=True):
        assert tokens[name] == engine.generate(["go"], params)[0].token_ids


def test_each_of_n_completions_has_a_constraint_of_its_own(engine):
    params = replace(MANY, regex=r"[a-z]{3,9}\.", n=5)
    completions = engine.generate(["x", "go"], params)
    assert all(re.fullmatch(params.regex, completion.text) for completion in completions)
    assert len({completion.text for completion in completions}) > 8
    assert completions[0].text == engine.generate(["x"], replace(params, n=1))[0].text


def test_logprobs_of_constrained_tokens_are_the_models_own(engine):
    free = engine.generate(["go"], replace(MANY, temperature=0, max_tokens=1, logprobs=3))[0].logprobs[0]
    bound = engine.generate(["go"], replace(MANY, temperature=0, max_tokens=1, logprobs=3, regex="z+"))[0].logprobs[0]
    assert bound.token_id == ord("z") and bound.top == pytest.approx(free.top)
    assert bound.logprob < min(free.top.values()) or ord("z") in free.top


def test_limits_and_other_wishes_beside_a_constraint(engine):
    greedy = replace(MANY, temperature=0)
    for fields, text, reason in [
        ({"regex": "abc", "max_tokens": 2}, "ab", "length"),
        ({"regex": "a{3}b"}, "aaab", "stop"),
        ({"regex": "abcd", "stop": "c"}, "ab", "stop"),
        # It prevails over what would leave no token.
        ({"regex": "ab", "min_tokens": 9}, "ab", "stop"),
        ({"regex": "abc", "min_tokens": 3, "stop_token_ids": (98,)}, "abc", "stop"),
        ({"regex": "[ab]c", "logit_bias": {97: -100, 98: 100}}, "bc", "stop"),
        ({"regex": "[ab]{3}", "logit_bias": {97: 100}, "frequency_penalty": 0.5}, "aaa", "stop"),
        ({"regex": "a|b", "top_k": 1, "temperature": 1.0, "logit_bias": {98: 100}}, "b", "stop"),
    ]:
        completion = engine.generate(["x"], replace(greedy, **fields))[0]
        assert (completion.text, completion.finish_reason) == (text, reason), fields
    long = engine.generate(["x"], replace(greedy, regex="a+", min_tokens=7, logit_bias={256: 100}))[0]
    assert (long.text, long.token_ids[-1]) == ("a" * 7, 256)


def test_without_an_end_token_the_output_ends_where_nothing_may_follow():
    """The vocabulary is the bytes below 97: it lacks small letters, and the end token."""
    engine = Engine(random_model(DENSE), ByteTokenizer())
    for regex, token_ids, reason in [
        ("A{3}", [65] * 3, "stop"),
        ("12(a|b)?", [49, 50], "stop"),  # complete, and no token goes on
        ("12a", [49, 50], "length"),
        ("7+", [55] * 16, "length"),
    ]:
        completion = engine.generate([[1]], SamplingParams(regex=regex, logprobs=0))[0]
        assert (completion.token_ids, completion.finish_reason) == (token_ids, reason)
        assert completion.text == bytes(token_ids).decode() and len(completion.logprobs) == len(token_ids)
    with pytest.raises(ValueError, match="^regex='a' is impossible"):
        engine.add_request([1], SamplingParams(regex="a"))

    class Lines(ByteTokenizer):
        eos_ids = frozenset((10,))

    ended = Engine(random_model(DENSE), Lines()).generate([[1]], SamplingParams(regex="12(a|b)?", min_tokens=9))[0]
    assert (ended.token_ids, ended.text, ended.finish_reason) == ([49, 50, 10], "12", "stop")
    assert engine.stats().free_blocks == engine.stats().num_blocks


def test_a_request_that_is_too_complex_spoils_no_later_one(monkeypatch):
    """An automaton of 2¹⁰ states, of which few are allowed; those that one output has seen are kept for the next."""
    monkeypatch.setattr("llama.engine.constraint._MAX_LEXER_STATES", 150)
    engine = Engine(random_model(BYTES), ByteTokenizer())
    params = SamplingParams(regex="(a|b)*a(a|b){9}c", max_tokens=40, logit_bias={99: -5.0})
    lengths = [len(engine.generate(["x"], replace(params, seed=seed))[0].token_ids) for seed in range(8)]
    assert 10 < min(lengths) < 40, "none was cut, or one for what others had seen"
    assert len(engine.generate(["x"], SamplingParams(regex="a{30}", max_tokens=40))[0].token_ids) == 30
    with pytest.raises(ValueError, match="^regex=.*does not compile: .*too many states"):
        monkeypatch.setattr("llama.engine.constraint._MAX_LEXER_STATES", 5)
        engine.add_request([1], SamplingParams(regex="(a|b)*a(a|b){8}c"))


def test_a_constrained_stream():
    async def collect(engine, params):
        return [chunk async for chunk in engine.stream("x", params)]

    engine = Engine(random_model(BYTES), ByteTokenizer())
    try:
        chunks = asyncio.run(collect(engine, SamplingParams(regex="[ab]{4}-é", max_tokens=40)))
        assert re.fullmatch("[ab]{4}-é", "".join(chunk.text for chunk in chunks))
        assert chunks[-1].finish_reason == "stop"
        with pytest.raises(ValueError, match="^json_schema=.* is not JSON"):
            asyncio.run(collect(engine, SamplingParams(json_schema="nonsense")))
    finally:
        engine.close()


@pytest.mark.parametrize("vocab_size", [64, 65, 95, 97, 257, 300])
def test_a_mask_has_the_bits_of_the_tokens_that_may_come(vocab_size):
    """Not that of an end without a token; the bytes that the model has no token for are missing."""
    constraint = ConstraintCompiler(ByteTokenizer(), vocab_size).start(SamplingParams(regex="0[1-9A-za-z]?"))
    assert constraint is not None
    end = [256] if vocab_size > 256 else []
    for token_id, expected in [
        (48, b"0"),
        (49, b"123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`abcdefghijklmnopqrstuvwxyz"),
    ]:
        mask_W = torch.empty(mask_words(vocab_size), dtype=torch.int32)
        allowed = [byte for byte in expected if byte < vocab_size] + (end if token_id == 49 else [])
        assert constraint.fill(mask_W)
        words = [word & 0xFFFFFFFF for word in mask_W.tolist()]
        assert [token for token in range(32 * len(words)) if words[token // 32] >> token % 32 & 1] == allowed
        assert constraint.advance(token_id)
    assert constraint.ended and not constraint.fill(mask_W)
    lacking = ConstraintCompiler(ByteTokenizer(), 50).start(SamplingParams(regex="0a?"))
    assert lacking is not None and lacking.advance(48) and not lacking.ended
    assert not lacking.fill(torch.empty(mask_words(50), dtype=torch.int32)) and lacking.complete


def test_a_fork_goes_its_own_way():
    compiler, params = ConstraintCompiler(ByteTokenizer(), 257), SamplingParams(regex="a[bc]d")
    start, other = compiler.start(params), compiler.start(params)
    assert start is not None and start.advance(97) and not other.advance(98)
    fork = start.fork()
    assert fork.advance(98) and fork.advance(100) and fork.ended
    assert not start.ended and not start.advance(100) and start.advance(99) and not start.complete
