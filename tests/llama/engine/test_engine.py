import math
import random
import threading
from dataclasses import replace

import pytest
import torch

from llama.engine import (
    Chunk,
    Engine,
    EngineClosed,
    EngineConfig,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    SamplingParams,
    generation_root,
    hash_blocks,
)
from tests.llama.engine.models import (
    MAX_SEQ_LEN,
    VOCAB_SIZE,
    ByteTokenizer,
    ScriptedModel,
    plain_greedy,
    random_model,
)
from tests.llama.engine.test_blocks import Replica

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def finish(engine: Engine) -> list[Chunk]:
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    return chunks


def test_the_second_turn_finds_the_first_one_in_the_cache():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4))
    prompt = list(range(10))
    first = engine.generate([prompt], replace(GREEDY, max_tokens=9))[0]
    assert first.num_cached_tokens == 0 and len(first.token_ids) == 9
    # 10 + 9 tokens, of which the last was never fed back: 18 are in the cache, 4 full blocks of them.
    second_prompt = prompt + first.token_ids + [1, 2, 3]
    second = engine.generate([second_prompt], GREEDY)[0]
    assert second.num_cached_tokens == 16
    assert second.token_ids == plain_greedy(model, second_prompt, 8)
    # A prompt that is in the cache entirely still computes its last token.
    assert engine.generate([second_prompt[:16]], GREEDY)[0].num_cached_tokens == 12
    stats = engine.stats()
    assert (stats.cached_tokens, stats.prompt_tokens, stats.generated_tokens) == (28, 48, 25)


def test_weights_and_salts_do_not_share_and_a_flush_forgets():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=32, block_size=4), weights_id="w")
    prompt = list(range(17))

    def cached(salt: str) -> int:
        engine.add_request(prompt, GREEDY, salt=salt)
        return finish(engine)[-1].num_cached_tokens

    assert [cached(""), cached(""), cached("tenant"), cached("tenant")] == [0, 16, 0, 16]
    hashes = set(engine.snapshot().hashes)
    assert hashes >= set(hash_blocks(generation_root("w", "", "tenant"), prompt, 4))
    engine.flush_cache()
    assert engine.snapshot().hashes == ()
    assert cached("") == 0


def test_events_are_out_before_the_finishing_chunk():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=32, block_size=4))
    replica = Replica()
    calls = []

    def on_events() -> None:
        calls.append(threading.current_thread())
        replica.apply(engine.drain_events())

    engine.on_events = on_events
    prompt = list(range(9))
    output: list[int] = []
    engine.add_request(prompt, replace(GREEDY, max_tokens=8))
    while engine.has_work:
        for chunk in engine.step():
            output += chunk.token_ids
            computed = (prompt + output)[: len(prompt) + len(output) - 1]
            assert chunk.event_seq == replica.seq == engine.event_seq
            assert replica.hashes == set(hash_blocks(generation_root(""), computed, 4))
    assert len(output) == 8
    assert len(calls) == 3, "only steps that changed the cache call"
    engine.flush_cache()
    assert replica.hashes == set()


def test_flush_in_mid_request_changes_nothing_for_it():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4))
    prompt = list(range(14))
    engine.add_request(prompt, replace(GREEDY, max_tokens=12))
    output: list[int] = []
    while engine.has_work:
        output += [token for chunk in engine.step() for token in chunk.token_ids]
        if len(output) == 5:
            engine.flush_cache()
        engine.check_integrity()
    assert output == plain_greedy(model, prompt, 12)
    assert engine.snapshot().hashes == ()


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], ValueError, "prompt is empty"),
        ([1, VOCAB_SIZE], ValueError, rf"prompt\[1\]={VOCAB_SIZE} is not a token id"),
        ([-1], ValueError, r"prompt\[0\]=-1"),
        ([1, "a"], ValueError, r"prompt\[1\]='a'"),
        ([1.5], ValueError, r"prompt\[0\]=1.5"),
        ("text", ValueError, "has no tokenizer"),
        ([1] * MAX_SEQ_LEN, PromptTooLong, f"{MAX_SEQ_LEN} tokens.*context of {MAX_SEQ_LEN}"),
        ([1] * 80, PromptTooLong, "80 tokens.*engine.num_blocks=20"),
    ],
)
def test_a_bad_prompt_is_refused_and_others_go_on(prompt, error, message):
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=20, block_size=4, max_batched_tokens=8))
    good = [3, 1, 4, 1, 5]
    name = engine.add_request(good, GREEDY)
    chunks = engine.step()
    with pytest.raises(error, match=message):
        engine.add_request(engine.encode(prompt), GREEDY)
    with pytest.raises(error, match=message):
        engine.generate([good, prompt], GREEDY)
    assert engine.stats().running == 1 and engine.stats().waiting == 0
    chunks += finish(engine)
    assert {chunk.request_id for chunk in chunks} == {name}
    assert [token for chunk in chunks for token in chunk.token_ids] == plain_greedy(model, good, 8)


def test_parameters_that_the_engine_cannot_obey_are_refused():
    engine = Engine(random_model())
    with pytest.raises(ValueError, match="stop=.*needs a tokenizer"):
        engine.add_request([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match="logprobs=98 exceeds the vocabulary of 97"):
        engine.add_request([1], SamplingParams(logprobs=98))
    with pytest.raises(ValueError, match="one string"):
        engine.generate("abc", GREEDY)
    engine.add_request([1], GREEDY, request_id="mine")
    with pytest.raises(ValueError, match="request_id='mine' is in use"):
        engine.add_request([1], GREEDY, request_id="mine")
    finish(engine)
    engine.add_request([1], GREEDY, request_id="mine")


@pytest.mark.parametrize("field", ["num_blocks", "block_size", "max_batched_tokens", "max_running", "max_waiting"])
def test_a_bad_limit_is_named(field):
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"engine.{field}={value}"):
            EngineConfig(**{field: value})


def test_the_context_and_the_cache_limit_the_length():
    model = random_model()
    prompt = [5] * (MAX_SEQ_LEN - 3)
    completion = Engine(model).generate([prompt], replace(GREEDY, max_tokens=50))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (3, "length")
    small = Engine(model, config=EngineConfig(num_blocks=3, block_size=4))
    completions = small.generate([[1] * 11, [2] * 4], replace(GREEDY, max_tokens=50))
    assert [(len(c.token_ids), c.finish_reason) for c in completions] == [(1, "length"), (8, "length")]


def test_the_queue_limit_refuses_a_request_but_only_paces_generate():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=16, block_size=4, max_running=2, max_waiting=3))
    for _ in range(3):
        engine.add_request([1], GREEDY)
    with pytest.raises(QueueFull):
        engine.add_request([1], GREEDY)
    finish(engine)
    prompts = [[token, 2] for token in range(12)]
    completions = engine.generate(prompts, GREEDY)
    assert [c.prompt_token_ids for c in completions] == prompts
    assert [c.token_ids for c in completions] == [plain_greedy(model, prompt, 8) for prompt in prompts]


def test_seeded_samples_are_the_same_alone_and_in_a_crowd():
    model = random_model()
    prompt = [7, 8, 9]
    params = SamplingParams(temperature=1.5, top_p=0.95, max_tokens=20, seed=5)
    alone = Engine(model).generate([prompt], params)[0].token_ids
    crowd = Engine(model, config=EngineConfig(num_blocks=14, block_size=4, max_batched_tokens=7))
    rng = random.Random(1)
    others = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 20))] for _ in range(6)]
    for other in others[:3]:
        crowd.add_request(other, SamplingParams(temperature=2.0, max_tokens=20))
    name = crowd.add_request(prompt, params)
    for other in others[3:]:
        crowd.add_request(other, replace(GREEDY, max_tokens=15))
    together = [token for chunk in finish(crowd) if chunk.request_id == name for token in chunk.token_ids]
    assert together == alone
    assert crowd.stats().preemptions > 0
    seeds = (5, 6, -5, -6, 0, -1, None, None)
    outputs = [Engine(model).generate([prompt], replace(params, seed=seed))[0].token_ids for seed in seeds]
    assert outputs[0] == alone and len(set(map(tuple, outputs))) == len(seeds)


def test_logprobs_are_those_of_the_plain_model():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4, max_batched_tokens=3))
    prompt = [1, 2, 3, 4, 5]
    completion = engine.generate([prompt], SamplingParams(temperature=0.7, max_tokens=6, seed=1, logprobs=2))[0]
    with torch.inference_mode():
        exact_LV = model(torch.tensor([prompt + completion.token_ids]))[0].double().log_softmax(dim=-1)
    assert completion.logprobs is not None and len(completion.logprobs) == 6
    for position, (token_id, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        exact_V = exact_LV[len(prompt) - 1 + position]
        assert logprob.token_id == token_id
        assert logprob.logprob == pytest.approx(exact_V[token_id].item(), abs=1e-3)
        assert list(logprob.top) == exact_V.topk(2).indices.tolist()
    assert engine.generate([prompt], GREEDY)[0].logprobs is None


def scripted(text: str, *, eos: bool = True) -> Engine:
    return Engine(ScriptedModel([*text.encode(), 256 if eos else 0]), ByteTokenizer())


def test_text_stops_at_the_end_token_and_the_stop_token():
    engine = scripted("abcdef")
    params = SamplingParams(temperature=0, max_tokens=50)
    end = engine.generate(["a"], params)[0]
    assert (end.text, end.finish_reason, end.token_ids) == ("bcdef", "stop", [*b"bcdef", 256])
    ignored = engine.generate(["a"], replace(params, ignore_eos=True))[0]
    assert (ignored.finish_reason, ignored.token_ids) == ("length", [*b"bcdef", 256])
    stop_token = engine.generate(["a"], replace(params, stop_token_ids=(ord("d"),)))[0]
    assert (stop_token.text, stop_token.finish_reason, stop_token.token_ids) == ("bc", "stop", [*b"bcd"])
    limited = engine.generate(["a"], replace(params, max_tokens=2))[0]
    assert (limited.text, limited.finish_reason) == ("bc", "length")
    assert engine.tokenizer is not None
    engine.tokenizer.eos_ids = frozenset((256, ord("e")))  # type: ignore[misc]
    either = engine.generate(["a"], params)[0]
    assert (either.text, either.finish_reason, either.token_ids) == ("bcd", "stop", [*b"bcde"])
    assert engine.generate(["a"], replace(params, ignore_eos=True))[0].token_ids == [*b"bcdef", 256]


def test_a_stop_string_ends_the_text_and_is_never_handed_out():
    engine = scripted("a one STO two STOP three")
    name = engine.add_request(list(b"a"), SamplingParams(temperature=0, max_tokens=50, stop=("STOP", "zzz")))
    chunks = finish(engine)
    assert {chunk.request_id for chunk in chunks} == {name}
    texts = [chunk.text for chunk in chunks]
    assert "".join(texts) == " one STO two "
    assert "S" not in texts, "a possible beginning was handed out"
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[-1].completion_tokens == len(b" one STO two STOP") == len(chunks)


def test_text_that_only_looked_like_a_stop_string_comes_at_the_end():
    params = SamplingParams(temperature=0, max_tokens=5, stop=("STOP",))
    assert scripted("a xSTORE").generate(["a"], params)[0].text == " xSTO"
    assert scripted("a xST").generate(["a"], replace(params, max_tokens=50))[0].text == " xST"


def test_characters_come_whole():
    text = "a é日🚀!"
    engine = scripted(text)
    engine.add_request(list(b"a"), SamplingParams(temperature=0, max_tokens=50))
    assert [chunk.text for chunk in finish(engine) if chunk.text] == [" ", "é", "日", "🚀", "!"]


def test_a_failed_step_ends_the_engine_with_its_cause():
    engine = Engine(ScriptedModel(list(b"abcdef"), fail_at=2), ByteTokenizer())
    with pytest.raises(ArithmeticError):
        engine.generate(["a"], GREEDY)
    assert not engine.has_work
    for call in (lambda: engine.add_request([1], GREEDY), engine.step, lambda: engine.generate(["a"], GREEDY)):
        with pytest.raises(EngineFailed, match="scripted failure") as caught:
            call()
        assert isinstance(caught.value.__cause__, ArithmeticError)
    engine.close()


def interrupting(call):
    """`call`, but its second time is interrupted half way, after it has done its work."""
    times = 0

    def interrupted(*args):
        nonlocal times
        times += 1
        result = call(*args)
        if times == 2:
            raise KeyboardInterrupt
        return result

    return interrupted


def test_an_interrupted_model_run_is_done_again(monkeypatch):
    model = random_model()
    prompts = [[1, 2, 3], [4, 5]]
    seeded = SamplingParams(temperature=1.5, max_tokens=12, seed=3)
    expected = Engine(model).generate([[7, 8]], seeded)[0].token_ids
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4))
    name = engine.add_request([7, 8], seeded)
    monkeypatch.setattr(engine._runner, "run", interrupting(engine._runner.run))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, GREEDY)
    engine.check_integrity()
    assert (engine.stats().running, engine.stats().waiting) == (1, 0)
    completions = engine.generate(prompts, GREEDY)
    assert [c.token_ids for c in completions] == [plain_greedy(model, prompt, 8) for prompt in prompts]
    chunks = finish(engine)
    assert {chunk.request_id for chunk in chunks} == {name}
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    engine.check_integrity()


def test_an_interrupt_between_the_books_ends_the_engine(monkeypatch):
    engine = Engine(random_model())
    monkeypatch.setattr(engine._core.scheduler, "commit", interrupting(engine._core.scheduler.commit))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], GREEDY)
    with pytest.raises(EngineFailed):
        engine.generate([[1, 2, 3]], GREEDY)


def test_an_interrupted_model_run_excuses_no_later_interrupt(monkeypatch):
    engine = Engine(random_model())
    monkeypatch.setattr(engine._runner, "run", interrupting(engine._runner.run))
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], GREEDY)
    schedule = interrupting(engine._core.scheduler.schedule)
    schedule()
    monkeypatch.setattr(engine._core.scheduler, "schedule", schedule)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], GREEDY)
    with pytest.raises(EngineFailed):
        engine.generate([[1, 2, 3]], GREEDY)


def test_a_closed_engine_aborts_and_refuses():
    engine = Engine(random_model())
    engine.add_request([1], GREEDY)
    engine.step()
    engine.close()
    engine.close()
    with pytest.raises(EngineClosed):
        engine.add_request([1], GREEDY)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.num_blocks)


def test_stats_follow_the_work():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=20, block_size=4, max_batched_tokens=8))
    engine.add_request([1] * 6, GREEDY)
    engine.add_request([2] * 10, GREEDY)
    assert engine.stats().pending_prefill_tokens == 16
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pending_prefill_tokens) == (2, 0, 8)
    assert (stats.decode_context_tokens, stats.free_blocks, stats.generated_tokens) == (7, 15, 1)


def test_a_broken_logit_spoils_only_its_own_request():
    """One request's NaN keys lie in the shared cache; its neighbours must not read them."""
    model = random_model()
    with torch.no_grad():
        model.tok_embeddings.weight[96] = math.nan
    engine = Engine(model, config=EngineConfig(num_blocks=12, block_size=4))
    engine.generate([[96] * 30], replace(GREEDY, max_tokens=2))
    bad = engine.add_request([96, 96], GREEDY)
    good = {engine.add_request([1, 2, 3 + i], replace(GREEDY, max_tokens=6 + i)): i for i in range(2)}
    outputs: dict[str, list[int]] = {name: [] for name in (bad, *good)}
    for chunk in finish(engine):
        outputs[chunk.request_id] += chunk.token_ids
    for name, i in good.items():
        assert outputs[name] == plain_greedy(model, [1, 2, 3 + i], 6 + i)


def test_completions_of_one_prompt_come_side_by_side_and_the_first_is_the_one_alone():
    model = random_model()
    prompts = [list(range(10)), list(range(20, 28))]
    params = SamplingParams(temperature=1.5, max_tokens=12, seed=3)
    engine = Engine(model, config=EngineConfig(num_blocks=64, block_size=4))
    alone = [c.token_ids for c in engine.generate(prompts, params)]
    together = Engine(model, config=EngineConfig(num_blocks=64, block_size=4)).generate(prompts, replace(params, n=3))
    assert [(c.prompt_token_ids, c.index) for c in together] == [(prompt, i) for prompt in prompts for i in range(3)]
    assert [together[0].token_ids, together[3].token_ids] == alone
    assert len({tuple(c.token_ids) for c in together}) == 6
    assert [c.num_cached_tokens for c in together[:3]] == [0, 9, 9]
    each = engine.generate(prompts, [replace(params, n=2), replace(params, max_tokens=5)])
    assert [len(c.token_ids) for c in each] == [12, 12, 5]
    with pytest.raises(ValueError, match="params holds 1 settings for 2 prompts"):
        engine.generate(prompts, [params])
    with pytest.raises(ValueError, match="n=1025 exceeds engine.max_waiting=1024"):
        engine.add_request([1], replace(params, n=1025))


def test_abort_ends_every_completion_of_a_request():
    engine = Engine(random_model(), config=EngineConfig(num_blocks=64, block_size=4))
    name = engine.add_request(list(range(10)), replace(GREEDY, n=3))
    for _ in range(3):
        engine.step()
    engine.abort(name)
    ends = [chunk.index for chunk in finish(engine) if chunk.finish_reason == "abort"]
    assert sorted(ends) == [0, 1, 2]
    assert engine.stats().free_blocks == 64
    engine.add_request([1], GREEDY, request_id=name)


def test_a_deadline_is_measured_on_the_engines_clock():
    now = [100.0]
    engine = Engine(random_model(), config=EngineConfig(num_blocks=64, block_size=4), clock=lambda: now[0])
    late = engine.add_request([1, 2], GREEDY, timeout_s=5)
    kept = engine.add_request([3, 4], GREEDY)
    chunks = engine.step()
    now[0] += 5
    chunks += finish(engine)
    reasons = {chunk.request_id: chunk.finish_reason for chunk in chunks if chunk.finish_reason}
    assert reasons == {late: "timeout", kept: "length"}
    assert sum(len(chunk.token_ids) for chunk in chunks if chunk.request_id == late) == 1
    for timeout in (0, -1, math.nan):
        with pytest.raises(ValueError, match="timeout_s="):
            engine.add_request([1], GREEDY, timeout_s=timeout)
    with pytest.raises(ValueError, match="priority='high'"):
        engine.add_request([1], GREEDY, priority="high")  # type: ignore[arg-type]


def test_the_cache_takes_the_memory_it_is_given():
    model = random_model()
    # 2 layers × 2 heads of 8 numbers, keys and values, 4 bytes each: 256 bytes a token.
    assert model.config.kv_bytes_per_token(4) == 256
    engine = Engine(model, config=EngineConfig(kv_cache_bytes=10_000, block_size=4))
    assert engine.stats().num_blocks == 9 and engine.max_total_tokens == 36
    with pytest.raises(ValueError, match="engine.kv_cache_bytes=1000 holds no block.*1024 bytes"):
        Engine(model, config=EngineConfig(kv_cache_bytes=1000, block_size=4))
    with pytest.raises(ValueError, match="engine.num_blocks=4 and engine.kv_cache_bytes=10000 both"):
        EngineConfig(num_blocks=4, kv_cache_bytes=10_000)


def test_weights_are_swapped_between_requests_and_never_within_one():
    old, new = random_model(seed=0), random_model(seed=1)
    prompt = list(range(9))
    engine = Engine(random_model(seed=0), config=EngineConfig(num_blocks=64, block_size=4), weights_id="old")
    first = engine.add_request(prompt, GREEDY)
    chunks = engine.step()
    swap = engine.load_weights(new.state_dict(), weights_id="new")
    second = engine.add_request(prompt, GREEDY)
    with pytest.raises(ValueError, match="weights_id='newer': the swap to 'new' is not done"):
        engine.load_weights(new.state_dict(), weights_id="newer")
    chunks += engine.step()
    assert not swap.done() and engine.weights_id == "old"
    chunks += finish(engine)
    assert swap.done() and engine.weights_id == "new"
    outputs = {name: [t for c in chunks if c.request_id == name for t in c.token_ids] for name in (first, second)}
    assert outputs == {first: plain_greedy(old, prompt, 8), second: plain_greedy(new, prompt, 8)}
    assert {c.num_cached_tokens for c in chunks} == {0}, "nothing of the old weights' cache was found"
    assert set(engine.snapshot().hashes) == set(hash_blocks(generation_root("new"), (prompt + outputs[second])[:16], 4))
    # With nothing under way it is done at once, in the model's own dtype.
    done = engine.load_weights({name: tensor.double() for name, tensor in old.state_dict().items()}, weights_id="back")
    assert done.done() and engine.generate([prompt], GREEDY)[0].token_ids == outputs[first]


def test_weights_that_do_not_fit_change_nothing():
    model = random_model()
    engine = Engine(model, weights_id="w")
    good = random_model(seed=1).state_dict()
    before = plain_greedy(model, [1, 2, 3], 8)
    for weights, message in (
        ({}, "is missing; give every weight"),
        (good | {"extra": torch.zeros(1)}, r"weights\['extra'\] is no weight"),
        (good | {"norm.weight": torch.zeros(3)}, r"weights\['norm.weight'\] is torch.float32 of shape \[3\]"),
        (good | {"norm.weight": torch.zeros(32, dtype=torch.int64)}, "is torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.load_weights(weights, weights_id="v")
    with pytest.raises(ValueError, match="weights_id='w' names the present weights"):
        engine.load_weights(good, weights_id="w")
    assert engine.generate([[1, 2, 3]], GREEDY)[0].token_ids == before


def test_a_swap_that_cannot_be_done_any_more_says_so():
    for end in (Engine.close, lambda engine: engine._fail(ArithmeticError("broken"))):
        engine = Engine(random_model(), weights_id="w")
        engine.add_request([1], GREEDY)
        engine.step()
        swap = engine.load_weights(random_model(seed=1).state_dict(), weights_id="v")
        end(engine)
        with pytest.raises((EngineClosed, EngineFailed)):
            swap.result(timeout=0)


def test_progress_counts_prompts_and_tokens(capsys):
    Engine(random_model()).generate([[1], [2]], GREEDY, progress=True)
    assert "2/2 prompts, " in capsys.readouterr().err
    Engine(random_model()).generate([[1]], GREEDY)
    assert capsys.readouterr().err == ""
