import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.pipelines.talking import Endpoint, endpoint


@pytest.fixture
def talker() -> Iterator[Endpoint]:
    with endpoint() as made:
        yield made


def chat(talker: Endpoint, *arguments: str, typed: str = "") -> tuple[str, str]:
    result = CliRunner().invoke(app, ["chat", "--url", talker.url, *arguments], input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout, result.stderr


def test_one_message_and_its_answer(talker: Endpoint) -> None:
    talker.replies.append(["good ", "day"])
    said, counts = chat(talker, "hello", "--system", "Be short.", "--max-tokens", "9")
    assert said == "good day\n" and counts.startswith("40 prompt tokens, 32 of them cached; 2 new")
    assert talker.asked[0]["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "hello"},
    ]
    assert (talker.asked[0]["model"], talker.asked[0]["max_tokens"]) == ("tiny", 9)


def test_as_json(talker: Endpoint) -> None:
    talker.replies.append(["a\x1b[2J"])
    said = json.loads(chat(talker, "hello", "--json")[0])
    assert (said["text"], said["prompt_tokens"], said["cached_tokens"], said["completion_tokens"]) == (
        "a\x1b[2J",
        40,
        32,
        1,
    )


def test_a_talk_goes_on_forgets_and_survives_a_refusal(talker: Endpoint) -> None:
    talker.replies += [["one"], 400, ["two"], ["three"]]
    said, told = chat(talker, typed="a\n\nb\nc\n/new\nd\n")
    assert said.split() == ["one", "two", "three"] and "too long" in told
    talks = [[message["content"] for message in body["messages"]] for body in talker.asked]
    assert talks == [["a"], ["a", "one", "b"], ["a", "one", "c"], ["d"]]


def test_an_answer_does_not_command_the_terminal(talker: Endpoint) -> None:
    talker.replies.append(["a\x1b]0;x\x07\tb\r\nc"])
    said = chat(talker, "hello")[0]
    assert "\x1b" not in said and "\x07" not in said and "\tb" in said and said.endswith("\nc\n")


def test_the_key_is_sent_and_the_url_may_be_the_api_s(talker: Endpoint) -> None:
    talker.replies.append(["x"])
    talker.url += "/v1/"
    chat(talker, "hello", "--api-key", "sk-1")
    assert talker.keys == ["Bearer sk-1"]


def test_one_message_that_is_refused_fails(talker: Endpoint) -> None:
    talker.replies.append(400)
    from cluster.serve.errors import ServeError

    with pytest.raises(ServeError, match="too long"):
        chat(talker, "hello")
