"""What reaches the sampler, and log-probabilities of prompts, against the plain model."""

import random
from dataclasses import replace

import pytest
import torch

from llama.engine import Engine, EngineConfig, SamplingParams
from llama.engine.sampler import SampleInputs
from tests.llama.engine.models import VOCAB_SIZE, random_model
from tests.llama.engine.test_engine import GREEDY, finish
from tests.llama.engine.test_sampler import reference_distribution

PROMPT = [random.Random(5).randrange(VOCAB_SIZE) for _ in range(30)]


@torch.inference_mode()
def check_logprobs(model, prompt, logprobs, count):
    exact_LV = model(torch.tensor([prompt]))[0].double().log_softmax(dim=-1)
    assert len(logprobs) == len(prompt) and logprobs[0] is None
    for position in range(1, len(prompt)):
        entry, exact_V = logprobs[position], exact_LV[position - 1]
        assert entry.token_id == prompt[position]
        assert entry.logprob == pytest.approx(exact_V[prompt[position]].item(), abs=1e-3)
        assert list(entry.top) == exact_V.topk(count).indices.tolist()


@pytest.mark.parametrize("budget", [1, 7, 512])
def test_prompt_logprobs_are_those_of_the_plain_model_whatever_the_chunks(budget):
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4, max_batched_tokens=budget))
    params = replace(GREEDY, prompt_logprobs=3)
    for prompt in (PROMPT, PROMPT[:1], PROMPT[:2]):
        completion = engine.generate([prompt], params)[0]
        check_logprobs(model, prompt, completion.prompt_logprobs, 3)
        assert completion.token_ids == engine.generate([prompt], GREEDY)[0].token_ids
    assert engine.generate([PROMPT], GREEDY)[0].prompt_logprobs is None
    assert engine.generate([PROMPT], replace(params, prompt_logprobs=0))[0].prompt_logprobs[1].top == {}


def test_prompt_logprobs_are_complete_beside_cached_prefixes_and_after_preemption():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=22, block_size=4, max_batched_tokens=9))
    engine.generate([PROMPT], GREEDY)
    params = SamplingParams(temperature=1.0, max_tokens=30, prompt_logprobs=2, seed=1)
    names = {engine.add_request(PROMPT[:length], params): PROMPT[:length] for length in (30, 30, 21, 25)}
    reports = {name: [] for name in names}
    for chunk in finish(engine):
        assert chunk.prompt_logprobs is None or chunk.completion_tokens == 1
        reports[chunk.request_id] += [chunk.prompt_logprobs] if chunk.prompt_logprobs else []
    assert engine.stats().preemptions > 0
    for name, (report,) in reports.items():
        check_logprobs(model, names[name], report, 2)
    engine.check_integrity()


def test_what_was_reported_before_a_preemption_is_not_reported_again():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=32, block_size=4, max_batched_tokens=7))
    engine.add_request(PROMPT, replace(GREEDY, prompt_logprobs=2))
    for _ in range(2):
        engine.step()
    scheduler = engine._core.scheduler
    scheduler._preempt(scheduler.running[0])
    (report,) = [chunk.prompt_logprobs for chunk in finish(engine) if chunk.prompt_logprobs]
    check_logprobs(model, PROMPT, report, 2)


def test_all_completions_of_a_prompt_share_its_logprobs():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=64, block_size=4, max_batched_tokens=8))
    for _ in range(2):
        completions = engine.generate([PROMPT], SamplingParams(max_tokens=9, n=3, seed=1, prompt_logprobs=1))
        for completion in completions:
            check_logprobs(model, PROMPT, completion.prompt_logprobs, 1)
    assert engine.stats().block_copies > 0


def test_a_request_aborted_within_its_prompt_reports_nothing_of_it():
    engine = Engine(random_model(), config=EngineConfig(max_batched_tokens=4))
    name = engine.add_request(PROMPT, replace(GREEDY, prompt_logprobs=1))
    engine.step()
    engine.abort(name)
    (chunk,) = engine.step()
    assert (chunk.finish_reason, chunk.prompt_logprobs, chunk.token_ids) == ("abort", None, [])


def test_penalties_know_prompt_from_output_and_survive_preemption():
    model = random_model()
    engine = Engine(model, config=EngineConfig(num_blocks=20, block_size=4, max_batched_tokens=9))
    settings = [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.1, "logit_bias": {3: 4.0}},
        {"repetition_penalty": 0.8, "presence_penalty": -1.0, "frequency_penalty": 2.0},
    ]
    params = {}
    for place, fields in enumerate(settings):
        name = engine.add_request(PROMPT[: 10 + place], replace(GREEDY, max_tokens=20, **fields))
        params[name] = (PROMPT[: 10 + place], replace(GREEDY, **fields))
    outputs = {name: [] for name in params}
    for chunk in finish(engine):
        outputs[chunk.request_id] += chunk.token_ids
    assert engine.stats().preemptions > 0
    changed = 0
    for name, (prompt, own) in params.items():
        output: list[int] = []
        for _ in range(20):
            with torch.inference_mode():
                logits_V = model(torch.tensor([prompt + output]))[0, -1].numpy()
            row = SampleInputs(own, prompt_ids=prompt, output_ids=output)
            changed += reference_distribution(logits_V, row).argmax() != logits_V.argmax()
            output.append(int(reference_distribution(logits_V, row).argmax()))
        assert outputs[name] == output
    assert changed > 10, "the penalties change too little to test anything"
