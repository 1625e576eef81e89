import asyncio
from collections.abc import Iterator

import pytest

from cluster.serve.errors import ServeError
from pipelines.chat import Said, converse, served_model
from tests.pipelines.talking import Endpoint, endpoint

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def talker() -> Iterator[Endpoint]:
    with endpoint() as made:
        yield made


def listen(url: str, key: str | None = None) -> list[Said]:
    async def all_of_it() -> list[Said]:
        return [piece async for piece in converse(url, "tiny", HELLO, key, 7)]

    return asyncio.run(all_of_it())


def test_a_reply_comes_in_pieces_and_its_counts_last(talker: Endpoint) -> None:
    talker.replies.append(["good ", "day"])
    *pieces, counts = listen(talker.url, "a-key")
    assert [piece.text for piece in pieces] == ["good ", "day"]
    assert (counts.prompt_tokens, counts.cached_tokens, counts.completion_tokens) == (40, 32, 2)
    assert counts.first_token_s is not None and counts.first_token_s > 0
    assert (talker.asked[0]["messages"], talker.asked[0]["max_tokens"], talker.asked[0]["model"]) == (HELLO, 7, "tiny")
    assert talker.keys == ["Bearer a-key"]


def test_a_refusal_is_one_line(talker: Endpoint) -> None:
    talker.replies.append(400)
    with pytest.raises(ServeError, match="too long") as refused:
        listen(talker.url)
    assert "\n" not in str(refused.value)


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(ServeError, match="did not answer"):
        listen("http://127.0.0.1:9")


def test_the_counts_in_words() -> None:
    said = Said("", prompt_tokens=1040, cached_tokens=32, completion_tokens=7, first_token_s=0.25)
    assert said.counts() == "1,040 prompt tokens, 32 of them cached; 7 new; the first after 250ms"
    assert Said("", prompt_tokens=1).counts() == "1 prompt tokens, 0 of them cached; 0 new"


def test_an_endpoint_s_model_is_asked_for(talker: Endpoint) -> None:
    assert served_model(talker.url, None) == "tiny"


@pytest.mark.parametrize("models", [{"data": []}, {"error": {"message": "a key is needed"}}, [], {"data": None}])
def test_an_endpoint_that_names_no_model_is_said_to(talker: Endpoint, models: object) -> None:
    talker.models = models
    with pytest.raises(ServeError, match="names no model"):
        served_model(talker.url, None)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "ftp://x"])
def test_what_is_no_endpoint_is_said_to_be_none(url: str) -> None:
    with pytest.raises(ServeError, match="no endpoint answers at .*; give --url"):
        served_model(url, None)
