"""Evidence that programs made for OpenAI's API or vLLM's run unchanged against ours, and are told the truth.

    python tests/evidence/api_clients.py [--part openai --part lm_eval --part aiperf]

A tiny random model on Ray Serve, two replicas; the same model in this process is what every answer is held to.

    openai   every way of its client to ask for completions, chats and models: whole, streamed, asynchronous, parsed
             into a pydantic type, with raw responses, with errors
    lm_eval  lm-evaluation-harness with `local-completions` on task files that this script writes: log-likelihoods of
             several choices, and generation; one prompt a request and four
    aiperf   a load generator: streamed chats, eight at a time, usage from the server; none fails

The latter two in environments of their own (.cache/tools), without torch. Prints one line for each claim; exits with 1
when one does not hold. About five minutes on two cores, the first time three more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import openai  # noqa: E402
import torch  # noqa: E402
from pydantic import BaseModel  # noqa: E402

from llama.engine import Engine, EngineConfig, SamplingParams  # noqa: E402
from llama.hf import load_pretrained  # noqa: E402
from llama.tokenizer import Tokenizer  # noqa: E402
from tests.evidence.demo import Claims  # noqa: E402
from tests.evidence.serving_tools import MODEL, environment, served, tool_variables  # noqa: E402

LM_EVAL = ("lm_eval[api]==0.4.13", "transformers==5.24.0")
AIPERF = ("aiperf==0.13.0",)
LARGEST_SCORE_DIFFERENCE = 1e-3
"""Natural logarithms, of a whole continuation: the engine's batches add up in another order."""
QUESTIONS = 24
REQUESTS, CONCURRENCY = 60, 8


class Direct:
    """The same model without a server."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = Tokenizer.load(directory)
        self.model = load_pretrained(directory)
        self.engine = Engine(load_pretrained(directory), self.tokenizer, EngineConfig(num_blocks=512))

    def text(self, prompt: str | list[int], **params: Any) -> str:
        return self.engine.generate([prompt], SamplingParams(temperature=0, **params))[0].text

    @torch.no_grad()
    def score(self, context: str, continuation: str) -> tuple[float, bool]:
        """Log-likelihood of the continuation by the plain model, and whether it is the greedy one.

        Tokens as the harness makes them: those of both, less those of the context.
        """
        whole = self.tokenizer.encode(context + continuation)
        start = len(self.tokenizer.encode(context))
        logprobs = self.model(torch.tensor([whole])).float().log_softmax(-1)[0, start - 1 : -1]
        targets = torch.tensor(whole[start:])
        return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


# -- the openai package


class Answer(BaseModel):
    verdict: Literal["yes", "no"]


def check_openai(url: str, directory: Path, claims: Claims) -> None:
    direct = Direct(directory)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    _check_completions(client, direct, claims)
    _check_chats(client, direct, claims)
    _check_errors(client, claims)
    asyncio.run(_check_async(url, direct, claims))


def _check_completions(client: openai.OpenAI, direct: Direct, claims: Claims) -> None:
    ask: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    texts = ["import os", "def main(", "return None"]
    expected = [direct.text(text, max_tokens=12) for text in texts]
    for name, prompt in {"texts": texts, "token ids": [direct.tokenizer.encode(text) for text in texts]}.items():
        whole = client.completions.create(prompt=prompt, **ask)
        claims.check(f"completions of a list of {name}", len(texts), [c.text for c in whole.choices] == expected)
    streamed = ["", "", ""]
    for piece in client.completions.create(prompt=texts, stream=True, stream_options={"include_usage": True}, **ask):
        for choice in piece.choices:
            streamed[choice.index] += choice.text
    claims.check("streamed completions of a list", piece.usage.completion_tokens, streamed == expected)
    echo = client.completions.create(prompt=texts[0], model=MODEL, max_tokens=0, echo=True, logprobs=1).choices[0]
    scores = echo.logprobs.token_logprobs
    known = direct.score(echo.logprobs.tokens[0], texts[0][len(echo.logprobs.tokens[0]) :])[0]
    claims.check("echo with logprobs scores the prompt", sum(scores[1:]), abs(sum(scores[1:]) - known) < 1e-3)
    fields = {
        "n": 3,
        "best_of": 3,
        "seed": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"9": 5},
    }
    many = [client.completions.create(prompt="a", model=MODEL, max_tokens=8, **fields) for _ in range(2)]
    same = [c.text for c in many[0].choices] == [c.text for c in many[1].choices]
    claims.check("n, penalties, logit_bias; a seed repeats them", len(many[0].choices), same)
    stop = expected[0][3:5]
    stopped = client.completions.create(prompt=texts[0], stop=[stop], **ask).choices[0]
    claims.check("stop strings", repr(stop), stopped.text == expected[0][: expected[0].index(stop)])
    extra = {"top_k": 1, "min_tokens": 3, "ignore_eos": True, "guided_regex": None, "prompt_logprobs": 1}
    sampled = client.completions.create(prompt=texts[0], model=MODEL, max_tokens=12, extra_body=extra).choices[0]
    claims.check("vLLM's fields in extra_body", "top_k=1", sampled.text[:6] == expected[0][:6])


def _check_chats(client: openai.OpenAI, direct: Direct, claims: Claims) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    prompt = direct.tokenizer.apply_chat_template(messages)
    expected = direct.text(prompt, max_tokens=12)
    ask: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0}
    whole = client.chat.completions.create(max_completion_tokens=12, logprobs=True, top_logprobs=3, **ask)
    claims.check("a chat", whole.usage.prompt_tokens, whole.choices[0].message.content == expected)
    entries = whole.choices[0].logprobs.content
    claims.check("its logprobs", len(entries), all(len(entry.top_logprobs) == 3 for entry in entries))
    with client.chat.completions.stream(max_tokens=12, **ask) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    claims.check("a chat by the stream helper", len(text), text == expected)
    parsed = client.chat.completions.parse(
        max_tokens=60, response_format=Answer, model=MODEL, messages=messages, seed=3
    )
    claims.check(
        "a chat parsed into a type", parsed.choices[0].message.parsed, parsed.choices[0].message.parsed is not None
    )
    form: Any = {"type": "json_object"}
    raw = client.chat.completions.create(
        max_tokens=200, response_format=form, n=2, model=MODEL, messages=messages, seed=3
    )
    done = [choice for choice in raw.choices if choice.finish_reason == "stop"]
    claims.check("json_object", len(done), all(isinstance(json.loads(c.message.content or ""), dict) for c in done))
    response = client.chat.completions.with_raw_response.create(
        max_tokens=1, extra_headers={"X-Request-Id": "evidence-1"}, **ask
    )
    named = response.headers.get("x-request-id") == "evidence-1" and "evidence-1" in response.parse().id
    claims.check("a request id of the client's own", response.parse().id, named)
    (model,) = client.models.list()
    claims.check("models", model.id, client.models.retrieve(model.id) == model)


def _check_errors(client: openai.OpenAI, claims: Claims) -> None:
    bad: list[tuple[type[openai.APIStatusError], Callable[[], Any]]] = [
        (openai.NotFoundError, lambda: client.models.retrieve("other")),
        (openai.NotFoundError, lambda: client.completions.create(model="other", prompt="a")),
        (openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt="a", suffix="b")),
        (openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt=[9] * 9999)),
        (openai.BadRequestError, lambda: client.completions.create(model=MODEL, prompt="a", best_of=2)),
        (openai.BadRequestError, lambda: client.chat.completions.create(model=MODEL, messages=[])),
        (
            openai.APIStatusError,
            lambda: client.completions.create(model=MODEL, prompt="a", extra_body={"timeout_s": 1e-6}),
        ),
    ]
    for kind, call in bad:
        try:
            call()
            claims.check(f"raises {kind.__name__}", "nothing raised", False)
        except kind as error:
            claims.check(f"raises {kind.__name__}", error.code, error.code is not None)


async def _check_async(url: str, direct: Direct, claims: Claims) -> None:
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    prompts = [f"{number} import" for number in range(16)]

    async def one(prompt: str) -> str:
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=10, temperature=0, stream=True)
        return "".join([piece.choices[0].text async for piece in stream])

    texts = await asyncio.gather(*map(one, prompts))
    claims.check(
        "streams side by side", len(texts), texts == [direct.text(prompt, max_tokens=10) for prompt in prompts]
    )
    await client.close()


# -- lm-evaluation-harness

_CHOICE_TASK = """
task: caravan_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""
_TEXT_TASK = """
task: caravan_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 16, temperature: 0.0, do_sample: false}}
metric_list: [{{metric: exact_match}}]
metadata: {{version: 1}}
"""


def check_lm_eval(url: str, directory: Path, claims: Claims) -> None:
    programs = environment("lm_eval", *LM_EVAL)
    direct = Direct(directory)
    words = ["import", "return", "self", "assert", "answer", "client", "replica", "while"]
    questions = [
        {"question": f"{words[n % 8]} number {n} is", "choices": [f"{word} {n}" for word in words[:4]], "gold": n % 4}
        for n in range(QUESTIONS)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "questions.jsonl"
        file.write_text("".join(json.dumps(question) + "\n" for question in questions))
        (folder / "choice.yaml").write_text(_CHOICE_TASK.format(file=file))
        (folder / "text.yaml").write_text(_TEXT_TASK.format(file=file))
        for batch in (1, 4):
            out = folder / f"out{batch}"
            _run_harness(programs, url, directory, folder, out, batch)
            _compare_choices(_samples(out, "caravan_choice"), direct, batch, claims)
            _compare_texts(_samples(out, "caravan_text"), direct, batch, claims)


def _run_harness(programs: Path, url: str, directory: Path, folder: Path, out: Path, batch: int) -> None:
    model_args = {
        "model": MODEL,
        "base_url": f"{url}/v1/completions",
        "tokenizer": directory,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": 512,
    }
    command = [programs / "lm-eval", "run", "--model", "local-completions", "--tasks", "caravan_choice,caravan_text"]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model_args.items())]
    command += ["--include_path", folder, "--output_path", out, "--log_samples", "--batch_size", str(batch)]
    home = {"HF_HOME": str(folder / "hf")}
    subprocess.run(command, env=tool_variables() | home, check=True, stdout=subprocess.DEVNULL, cwd=folder)


def _samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def _compare_choices(samples: list[dict[str, Any]], direct: Direct, batch: int, claims: Claims) -> None:
    worst, greedy = 0.0, 0
    for sample in samples:
        for choice, response in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            score, is_greedy = direct.score(sample["doc"]["question"], f" {choice}")
            worst = max(worst, abs(float(response[0][0]) - score))
            greedy += str(response[0][1]) != str(is_greedy)
    claims.check(
        f"log-likelihoods, batch {batch}: largest difference of {4 * len(samples)}",
        f"{worst:.1e}",
        worst <= LARGEST_SCORE_DIFFERENCE and len(samples) == QUESTIONS and not greedy,
    )


def _compare_texts(samples: list[dict[str, Any]], direct: Direct, batch: int, claims: Claims) -> None:
    expected = [direct.text(sample["doc"]["question"], max_tokens=16, stop=("\n",)) for sample in samples]
    equal = sum(sample["resps"][0][0] == text for sample, text in zip(samples, expected, strict=True))
    claims.check(f"generated texts, batch {batch}: equal", f"{equal} of {QUESTIONS}", equal == QUESTIONS)


# -- a load generator


def check_aiperf(url: str, directory: Path, claims: Claims) -> None:
    programs = environment("aiperf", *AIPERF)
    with tempfile.TemporaryDirectory() as folder:
        command = [programs / "aiperf", "profile", "--model", MODEL, "--url", url, "--endpoint-type", "chat"]
        command += ["--streaming", "--tokenizer", directory, "--use-server-token-count", "--ui", "none"]
        command += ["--request-count", str(REQUESTS), "--concurrency", str(CONCURRENCY), "--workers-max", "2"]
        command += ["--synthetic-input-tokens-mean", "60", "--output-tokens-mean", "16"]
        command += ["--extra-inputs", "ignore_eos:true", "--output-artifact-dir", Path(folder, "out")]
        # Told to stay offline, it looks for a local tokenizer in the hub's cache, in vain.
        online = {name: value for name, value in tool_variables().items() if not name.endswith("OFFLINE")}
        variables = online | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "HOME": folder}
        subprocess.run(command, env=variables, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        (file,) = Path(folder, "out").rglob("profile_export_aiperf.json")
        report = json.loads(file.read_text())
    done, failed = report["request_count"]["avg"], (report.get("error_request_count") or {"avg": 0})["avg"]
    claims.check("aiperf: streamed chats that ended well", f"{done:.0f} of {REQUESTS}", done == REQUESTS and not failed)
    first = report["time_to_first_token"]
    claims.check("aiperf: it saw first tokens", f"{first['avg']:.1f} {first['unit']} on average", first["avg"] > 0)


PARTS = {"openai": check_openai, "lm_eval": check_lm_eval, "aiperf": check_aiperf}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="all of them by default")
    arguments = parser.parse_args()
    claims = Claims()
    with served() as (url, directory):
        for part in arguments.part or PARTS:
            PARTS[part](url, directory, claims)
    sys.exit(1 if claims.failed else 0)


if __name__ == "__main__":
    main()
