"""The HTTP server: the official client, many streams at once, bad input, clients that leave."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from flax import nnx
from tiny import tiny_config
from tokenizers import Tokenizer, models, pre_tokenizers

from paxattn import cli
from paxattn.cli.serve import _url
from paxattn.models import CheckpointError, Decoder
from paxattn.sampling import SamplingParams
from paxattn.serving import AsyncEngine, Engine, NotServing, QueueFull

openai = pytest.importorskip("openai", reason="needs the extras test and serve")
httpx = pytest.importorskip("httpx2", reason="comes with openai 3")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve")
server = pytest.importorskip("paxattn.server", reason="needs the extra serve")

V, PLACES, LONGEST = 260, 12, 48
ROLES = ["user", "assistant", "system"]
WORDS = [f"w{i:03}" for i in range(V - 3)] + ROLES
TOKENIZER = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="w000"))
TOKENIZER.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
CONFIG = tiny_config(vocab_size=V, max_positions=LONGEST)
ENGINE = Engine(
    Decoder(CONFIG, rngs=nnx.Rngs(0)),
    num_pages=48,
    page_size=4,
    max_seqs=4,
    max_requests=PLACES,
    step_tokens=8,
    steps_per_read=5,
    tokenizer=TOKENIZER,
)
TEMPLATE = server.ChatTemplate(
    "{% for one in messages %}{{ one.role }} {{ one.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
DRAWN = {"temperature": 1.5, "top_p": 0.9}


def words(*numbers):
    return " ".join(f"w{n:03}" for n in numbers)


def expected(prompts, new, n=1, stop=(), **sampling):
    """What the engine says when it serves nobody else; its own tests hold it to `generate`."""
    return ENGINE.generate(
        prompts,
        max_new_tokens=new,
        num_samples=n,
        sampling=SamplingParams(**sampling),
        stop=list(stop),
    )


def app(**options):
    return server.create_app(ENGINE, name="tiny", chat_template=TEMPLATE, **options)


@contextlib.asynccontextmanager
async def in_process(**options):
    """A client of the application, without a network; it sees an answer when it is whole."""
    made = app(**options)
    transport = httpx.ASGITransport(app=made, raise_app_exceptions=False)
    async with (
        made.router.lifespan_context(made),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield client


@contextlib.asynccontextmanager
async def listening(**options):
    """A server on a port of this machine: (its base URL, itself)."""
    config = uvicorn.Config(app(**options), log_level="warning", ws="none")
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        task = asyncio.create_task(running.serve(sockets=[sock]))
        while not running.started:
            await asyncio.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", running
        finally:
            running.should_exit = True
            await task


def official(base):
    http = openai.DefaultAsyncHttpxClient(trust_env=False)  # no proxy on the way to ourselves
    return openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="-", max_retries=0, http_client=http)


def test_one_engine_serves_many_tasks():
    prompts = [words(*range(i, i + 1 + i % 9)) for i in range(30)]
    alone = [expected([p], 6 + i % 5, seed=i, **DRAWN)[0] for i, p in enumerate(prompts)]

    async def one(served, i, pause):
        await asyncio.sleep(pause)
        sampling = SamplingParams(seed=i, **DRAWN)
        while True:
            try:
                deltas = await served.stream(
                    [prompts[i]], max_new_tokens=6 + i % 5, sampling=sampling
                )
                break
            except QueueFull:
                await asyncio.sleep(0.01)
        news = [delta async for delta in deltas]
        assert {delta.index for delta in news} == {0}
        return [token for delta in news for token in delta.tokens], news[-1].finish_reason

    async def main():
        async with AsyncEngine(ENGINE) as served:
            found = await asyncio.gather(*(one(served, i, i % 7 / 100) for i in range(30)))
            assert found == [(each.tokens, each.finish_reason) for each in alone]
            with pytest.raises(ValueError, match="prompt 1 has no tokens"):
                await served.stream([[1], []], max_new_tokens=1)
            with pytest.raises(QueueFull):
                await served.stream([[1]] * 13, max_new_tokens=1)
            last = await served.stream([[1, 2]], max_new_tokens=40, num_samples=2)
            await served.drain()
            assert sum([len(delta.tokens) async for delta in last]) == 80
            assert (await served.stats()).running == 0
            assert not served.serving
            with pytest.raises(NotServing, match="takes no more requests"):
                await served.stream([[1]], max_new_tokens=1)

    asyncio.run(main())


def test_who_leaves_ends_its_requests():
    async def main():
        async with AsyncEngine(ENGINE) as served:
            async with await served.stream([[1, 2]], max_new_tokens=46) as deltas:
                await anext(deltas)
            for pause in (0, 0.001, 0.01):  # before it was submitted, meanwhile or after
                waiting = asyncio.create_task(served.stream([[1, 2], [3]], max_new_tokens=40))
                await asyncio.sleep(pause)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    (await waiting).abort()
            await served.drain()
            assert (await served.stats()).finished["abort"] >= 1
        async with AsyncEngine(ENGINE) as served:
            left = await served.stream([[1, 2]] * PLACES, max_new_tokens=46)  # too much by now
        assert "abort" in {delta.finish_reason async for delta in left}

    asyncio.run(main())
    assert ENGINE.num_unfinished == 0
    assert ENGINE.stats.running == 0


def test_an_engine_that_fails_says_so_to_everybody(monkeypatch):
    async def main():
        async with AsyncEngine(ENGINE) as served:
            monkeypatch.setattr(ENGINE, "step", lambda: 1 / 0)
            news = await served.stream([[1]], max_new_tokens=5)
            with pytest.raises(ZeroDivisionError):
                [delta async for delta in news]
            for what in (served.stream([[1]], max_new_tokens=1), served.stats(), served.drain()):
                with pytest.raises(NotServing, match="the engine has failed: division by zero"):
                    await what

    asyncio.run(main())
    monkeypatch.undo()
    ENGINE.drain()


def test_the_official_client():
    prompts = [words(5, 6, 7), words(9, 10, 11, 12, 13)]
    samples = expected(prompts, 6, n=2, seed=3, **DRAWN)
    talk = [{"role": "system", "content": words(1)}, {"role": "user", "content": words(2, 3)}]
    answer = expected([f"system {words(1)} user {words(2, 3)} assistant"], 5, seed=4, **DRAWN)[0]
    said_words = answer.text.split()
    stop = said_words[-1]
    assert said_words.index(stop) > 1

    async def main():
        async with listening() as (base, _), official(base) as client:
            models = await client.models.list()
            assert [model.id for model in models.data] == ["tiny"]
            assert (await client.models.retrieve("tiny")).owned_by == "paxattn"

            ask = {"model": "tiny", "prompt": prompts, "n": 2, "max_tokens": 6, "seed": 3, **DRAWN}
            whole = await client.completions.create(**ask, logprobs=2)
            assert [choice.text for choice in whole.choices] == [one.text for one in samples]
            assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
            assert {choice.finish_reason for choice in whole.choices} == {"length"}
            assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (8, 24)
            logprobs = whole.choices[1].logprobs
            assert logprobs.token_logprobs == pytest.approx(samples[1].logprobs, abs=1e-4)
            assert [int(token[1:]) for token in logprobs.tokens] == samples[1].tokens
            for token, own, top in zip(
                logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
            ):
                assert top[token] == own <= max(top.values())
                assert len(top) == (2 if own >= sorted(top.values())[-2] else 3)

            text, reasons, usage = [""] * 4, [None] * 4, None
            events = await client.completions.create(
                **ask, echo=True, stream=True, stream_options={"include_usage": True}
            )
            async for event in events:
                usage = event.usage
                for choice in event.choices:
                    text[choice.index] += choice.text
                    reasons[choice.index] = choice.finish_reason
            asked = [prompt for prompt in prompts for _ in range(2)]
            assert text == [p + one.text for p, one in zip(asked, samples, strict=True)]
            assert reasons == ["length"] * 4
            assert usage.total_tokens == 32

            ask = {"model": "tiny", "messages": talk, "max_tokens": 5, "seed": 4, **DRAWN}
            said = await client.chat.completions.create(**ask, logprobs=True, top_logprobs=3)
            assert said.choices[0].message.content == answer.text
            assert said.choices[0].message.role == "assistant"
            shown = said.choices[0].logprobs.content
            assert [one.token for one in shown] == said_words
            assert bytes(shown[0].bytes).decode() == shown[0].token
            assert [one.logprob for one in shown] == pytest.approx(answer.logprobs, abs=1e-4)
            for one in shown:
                tops = [top.logprob for top in one.top_logprobs]
                assert len(tops) == 3
                assert tops == sorted(tops, reverse=True)
                assert one.logprob <= tops[0]
            again = await client.chat.completions.create(**ask)
            assert again.usage.prompt_tokens_details.cached_tokens > 0
            events = await client.chat.completions.create(**ask, stop=stop, stream=True)
            got = [event.choices[0] async for event in events]
            assert got[0].delta.role == "assistant"
            content = "".join(one.delta.content or "" for one in got)
            assert content.split() == said_words[: said_words.index(stop)]
            assert [one.finish_reason for one in got if one.finish_reason] == ["stop"]

            with pytest.raises(openai.NotFoundError, match="there is no model 'big'"):
                await client.completions.create(model="big", prompt="w001")
            with pytest.raises(openai.BadRequestError, match="frequency_penalty") as error:
                await client.completions.create(model="tiny", prompt="w001", frequency_penalty=3)
            assert error.value.param == "frequency_penalty"

    asyncio.run(main())


def test_a_full_queue_is_said_and_a_client_that_leaves_makes_room():
    async def main():
        async with listening() as (base, _), official(base) as client:
            ask = {"model": "tiny", "prompt": "w001", "max_tokens": 47}
            events = await client.completions.create(**ask, n=PLACES, stream=True)
            with pytest.raises(openai.RateLimitError, match="try again later") as error:
                await client.completions.create(**ask)
            assert error.value.response.headers["retry-after"] == "1"
            await anext(events)
            await events.close()
            aborted = 0
            while not aborted:
                await asyncio.sleep(0.02)
                aborted = (await metrics(client, base))["paxattn_requests_total", "abort"]
            # One that waits for a whole answer, too.
            before = aborted
            whole = asyncio.create_task(client.completions.create(**ask, n=PLACES))
            await asyncio.sleep(0.05)
            whole.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await whole
            while ENGINE.num_unfinished:
                await asyncio.sleep(0.02)
            found = await metrics(client, base)
            assert found["paxattn_requests_total", "abort"] >= before
            assert found["paxattn_requests_running", None] == 0
            assert found["paxattn_pages", None] == 48
            assert found["paxattn_time_to_first_token_seconds_count", None] > 0
            assert len((await client.completions.create(**ask)).choices) == 1

    asyncio.run(main())


async def metrics(client, base):
    from prometheus_client.parser import text_string_to_metric_families

    found = await client._client.get(f"{base}/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, sample.labels.get("reason")): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }


def test_shutdown_lets_streams_come_to_their_end():
    whole = expected([[5, 6]], 46)[0]

    async def main():
        async with listening() as (base, running):
            client = official(base)
            events = await client.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=46, temperature=0, stream=True
            )
            text = (await anext(events)).choices[0].text
            running.should_exit = True
            async for event in events:
                text += event.choices[0].text
            assert text == whole.text
        async with client:
            with pytest.raises(openai.APIConnectionError):
                await client.models.list()

    asyncio.run(main())


JSON = {"content-type": "application/json; charset=utf-8"}


def test_requests_whose_time_is_up_are_told_so(monkeypatch):
    step = ENGINE.step
    monkeypatch.setattr(ENGINE, "step", lambda: time.sleep(0.1) or step())

    async def main():
        running = server.Server(app(), grace=0.2)
        with socket.create_server(("127.0.0.1", 0)) as sock:
            serving = asyncio.create_task(running.serve(sockets=[sock]))
            base = f"http://127.0.0.1:{sock.getsockname()[1]}"
            async with official(base) as client:
                ask = {"model": "tiny", "prompt": "w001", "max_tokens": 47}
                events = await client.completions.create(**ask, n=2, stream=True)
                whole = asyncio.create_task(client.completions.create(**ask))
                await anext(events)
                running.should_exit = True
                with pytest.raises(openai.APIError, match="the server is shutting down"):
                    [event async for event in events]
                with pytest.raises(openai.InternalServerError, match="shutting down") as error:
                    await whole
                assert error.value.status_code == 503
            await serving

    asyncio.run(main())
    assert ENGINE.num_unfinished == 0


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("localhost", "localhost")])
def test_the_printed_address(host, shown):
    assert _url(host, 80) == f"http://{shown}:80/v1"


def test_what_a_body_says():
    """The lowest priority goes first here, the highest in an engine."""
    options = {"engine": ENGINE, "name": "tiny", "stop_token_ids": (7,), "template": TEMPLATE}
    read = server.protocol.Reader(**options, priorities=True).completion
    assert read({**PROMPT, "priority": -3}).options["priority"] == 3
    assert server.protocol.Reader(**options, priorities=False).completion({**PROMPT, "priority": 0})
    assert read({**PROMPT, "temperature": 1e-300}).options["sampling"].temperature == 0
    assert read({**PROMPT, "n": 2, "best_of": 2}).options["num_samples"] == 2
    asked = read({**PROMPT, "prompt": "never  heard", "echo": True, "ignore_eos": True})
    assert (asked.echoes, asked.options["stop_token_ids"]) == (["never  heard"], [])
    asked = read({**PROMPT, "prompt": [[1, 2], [3]], "echo": True, "stop_token_ids": [9]})
    assert (asked.echoes, asked.options["stop_token_ids"]) == (["w001 w002", "w003"], [7, 9])


PROMPT = {"model": "tiny", "prompt": "w001"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w001"}]}
# (body, status, param, code, message)
BAD = [
    (b"", 400, None, None, "not JSON"),
    (b'{"model": "tiny", "prompt": "w001"', 400, None, None, "not JSON"),
    (b"\xff\xfe", 400, None, None, "not JSON"),
    (b"[" * 4000, 400, None, None, "not JSON"),
    (b"9" * 5000, 400, None, None, "not JSON"),
    ([1], 400, None, None, "must be a JSON object"),
    ({}, 400, "model", None, "model is missing: must be a string"),
    ({**PROMPT, "model": "\ud800"}, 404, "model", "model_not_found", "only 'tiny'"),
    ({**PROMPT, "tempo": 1}, 400, "tempo", "unknown_field", "unknown field 'tempo'"),
    ({**PROMPT, "temperature": "hot"}, 400, "temperature", None, "must be a number"),
    ({**PROMPT, "temperature": 2.5}, 400, "temperature", None, "from 0 to 2"),
    ({**PROMPT, "temperature": float("nan")}, 400, "temperature", None, "from 0 to 2"),
    ({**PROMPT, "max_tokens": 1.5}, 400, "max_tokens", None, "an integer"),
    ({**PROMPT, "max_tokens": True}, 400, "max_tokens", None, "an integer"),
    ({**PROMPT, "max_tokens": -1}, 400, "max_tokens", None, "an integer from 0"),
    ({**PROMPT, "max_tokens": 48}, 400, "max_tokens", "context_length_exceeded", "at most 48"),
    (
        {**PROMPT, "prompt": "w1 " * 50},
        400,
        "prompt",
        "context_length_exceeded",
        "50 of the prompt",
    ),
    ({**PROMPT, "prompt": None}, 400, "prompt", None, "prompt is None"),
    ({**PROMPT, "prompt": ""}, 400, "prompt", None, "the prompt has no tokens"),
    ({**PROMPT, "prompt": ["w001", ""]}, 400, "prompt", None, "prompt 1 has no tokens"),
    ({**PROMPT, "prompt": [1, "x"]}, 400, "prompt", None, "prompt 0 is 1"),
    ({**PROMPT, "prompt": [[999]]}, 400, "prompt", None, "token id 999"),
    ({**PROMPT, "prompt": "\ud800"}, 400, "prompt", None, "no valid text"),
    ({**PROMPT, "prompt": {"a": 1}}, 400, "prompt", None, "a list of token ids"),
    ({**PROMPT, "n": 0}, 400, "n", None, "an integer from 1"),
    ({**PROMPT, "n": 13}, 400, "n", None, "places for 12"),
    ({**PROMPT, "stop": [1]}, 400, "stop", None, "a string that is not empty"),
    ({**PROMPT, "stop": ["x"] * 17}, 400, "stop", None, "at most 16"),
    ({**PROMPT, "stop": "\ud800"}, 400, "stop", None, "no valid text"),
    ({**PROMPT, "stop_token_ids": [999]}, 400, "stop_token_ids", None, "stop_token_ids has 999"),
    ({**PROMPT, "stop_token_ids": list(range(9))}, 400, "stop_token_ids", None, "at most 8"),
    ({**PROMPT, "seed": "x"}, 400, "seed", None, "an integer"),
    ({**PROMPT, "stream": 1}, 400, "stream", None, "true or false"),
    ({**PROMPT, "stream_options": {}}, 400, "stream_options", None, "goes with stream only"),
    ({**PROMPT, "stream_options": 1}, 400, "stream_options", None, "an object"),
    (
        {**PROMPT, "stream": True, "stream_options": {"include_usage": 1}},
        400,
        "stream_options.include_usage",
        None,
        "true or false",
    ),
    ({**PROMPT, "logprobs": 21}, 400, "logprobs", None, "from 0 to 20"),
    ({**PROMPT, "logprobs": 0, "echo": True}, 400, "echo", None, "do not go together"),
    ({**PROMPT, "best_of": 2}, 400, "best_of", "unsupported", "all of n samples; leave it out"),
    ({**PROMPT, "n": 2, "best_of": 3}, 400, "best_of", "unsupported", "all of n samples"),
    ({**PROMPT, "priority": 1}, 400, "priority", "unsupported", "--scheduling-policy priority"),
    ({**PROMPT, "priority": 2**31}, 400, "priority", None, "an integer from -2147483647"),
    ({**PROMPT, "presence_penalty": 2.5}, 400, "presence_penalty", None, "from -2 to 2"),
    ({**PROMPT, "logit_bias": {"5": 1}}, 400, "logit_bias", "unsupported", "no logits"),
    ({**CHAT, "messages": []}, 400, "messages", None, "a list of messages"),
    ({**CHAT, "messages": ["w001"]}, 400, "messages[0]", None, "must be an object"),
    ({**CHAT, "messages": [{"role": "tool"}]}, 400, "messages[0].role", None, "is 'tool'"),
    ({**CHAT, "messages": [{"role": "user"}]}, 400, "messages[0].content", None, "a string"),
    (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "messages[0].content",
        None,
        "parts of type text only",
    ),
    (
        {**CHAT, "messages": [{"role": "user", "content": "w001", "name": 5}]},
        400,
        "messages[0].name",
        None,
        "messages[0].name is 5: must be a string",
    ),
    (
        {**CHAT, "messages": [{"role": "user", "content": "w001", "audio": {}}]},
        400,
        "messages[0].audio",
        "unknown_field",
        "leave it out",
    ),
    ({**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", None, "utf-8"),
    ({**CHAT, "tools": [{}]}, 400, "tools", "unsupported", "calls no tools"),
    ({**CHAT, "top_logprobs": 2}, 400, "top_logprobs", None, "goes with logprobs only"),
    (b"x" * 10_000, 413, None, "request_too_large", "more than the 8192 bytes"),
    (b"x" * 100_000, 413, None, "request_too_large", "more than the 8192 bytes"),
]


def test_bad_input_gets_the_error_of_the_api():
    async def main():
        async with in_process(max_body_bytes=8192) as client:
            for body, status, param, code, message in BAD:
                chat = isinstance(body, dict) and "messages" in body
                where = "/v1/chat/completions" if chat else "/v1/completions"
                content = body if isinstance(body, bytes) else json.dumps(body)
                found = await client.post(where, content=content, headers=JSON)
                error = found.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                got = found.status_code, error["param"], error["code"]
                assert got == (status, param, code), (body, error)
                assert error["type"] == "invalid_request_error"
                assert message in error["message"], error
            for method, where, status in [
                ("GET", "/nowhere", 404),
                ("GET", "/v1/completions", 405),
                ("POST", "/v1/completions", 415),  # without a content type
            ]:
                found = await client.request(method, where)
                assert found.status_code == status
                assert found.json()["error"]["type"] == "invalid_request_error"
                assert "/v1/completions" in found.json()["error"]["message"] or status == 415
            form = {"content-type": "application/x-www-form-urlencoded"}
            found = await client.post("/v1/completions", content=json.dumps(PROMPT), headers=form)
            assert (found.status_code, found.json()["error"]["code"]) == (
                415,
                "unsupported_media_type",
            )
            assert "must be application/json" in found.json()["error"]["message"]
            assert (await client.get("/health")).json() == {"status": "ok"}
            assert (await client.get("/v1/models/other")).status_code == 404

    asyncio.run(main())
    assert ENGINE.num_unfinished == 0


def test_a_failed_engine_is_an_error_of_the_server(monkeypatch):
    async def main():
        async with in_process() as client:
            monkeypatch.setattr(ENGINE, "step", lambda: 1 / 0)
            found = await client.post("/v1/completions", json={**PROMPT, "stream": True})
            events = found.text.strip().split("\n\n")
            assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
            found = await client.post("/v1/completions", json=PROMPT)
            assert (found.status_code, found.json()["error"]["type"]) == (503, "server_error")
            assert (await client.get("/health")).status_code == 503

    asyncio.run(main())
    monkeypatch.undo()
    ENGINE.drain()


def test_chat_templates(tmp_path):
    assert server.read_chat_template(tmp_path) is None
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": [{"name": "tool_use", "template": "x"}],
    }
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(config))
    assert server.read_chat_template(tmp_path) is None
    talk = [{"role": "user", "content": "é{{ 1 }}"}]
    source = (
        "{{ bos_token }}{% for m in messages %}\n  {% break %}{% endfor %}{{ messages|tojson }}"
    )
    config["chat_template"] += [{"name": "default", "template": source}]
    path.write_text(json.dumps(config))
    assert server.read_chat_template(tmp_path).render(talk) == f"<s>{json.dumps(talk)}".replace(
        "\\u00e9", "é"
    )
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ strftime_now('%Y')|length }}{{ thinking }}{{ eos_token }}")
    assert server.read_chat_template(tmp_path).render(talk, {"thinking": "?"}) == "4?</s>"
    for source, message in [
        ("{{ raise_exception('one only') }}", "refuses these messages: one only"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{{ messages[0].content + 1 }}", "refuses these messages"),
        ("{{ messages[9].content }}", "refuses these messages"),
    ]:
        with pytest.raises(ValueError, match=message):
            server.ChatTemplate(source).render(talk)
    file.write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja: .*not a chat template"):
        server.read_chat_template(tmp_path)
    file.unlink()
    path.write_text(json.dumps({"chat_template": [{"name": "default"}]}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json: chat_template"):
        server.read_chat_template(tmp_path)


def test_a_model_without_a_chat_template():
    async def main():
        made = server.create_app(ENGINE, name="tiny")
        transport = httpx.ASGITransport(app=made)
        client = httpx.AsyncClient(transport=transport, base_url="http://test")
        async with made.router.lifespan_context(made), client:
            found = await client.post("/v1/chat/completions", json=CHAT)
            assert found.status_code == 400
            assert found.json()["error"]["code"] == "no_chat_template"

    asyncio.run(main())


@contextlib.contextmanager
def process(tmp_path, *options):
    """`paxattn serve` with the bundled model: (its base URL, its Popen)."""
    command = [sys.executable, "-m", "paxattn", "serve", "--port", "0", *options]
    environment = {**os.environ, "XLA_FLAGS": ""}  # at the speed that users have
    with open(tmp_path / "stderr", "w") as stderr:
        running = subprocess.Popen(command, stderr=stderr, env=environment)
    try:
        found = None
        while found is None:
            assert running.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.2)
            found = re.search(r"serving at (http://\S+)/v1", (tmp_path / "stderr").read_text())
        yield found[1], running
    finally:
        running.kill()
        running.wait()


def memory_of(running):
    """Resident bytes of a process."""
    with open(f"/proc/{running.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_under_load(tmp_path):
    groups, copies = 50, 6

    async def stream(client, group):
        events = await client.completions.create(
            model="tiny_python",
            prompt=f"def function_{group}(a, b):\n    return",
            max_tokens=24,
            temperature=0.8,
            seed=group,
            stream=True,
            stream_options={"include_usage": True},
        )
        text, usage = "", None
        async for event in events:
            text, usage = text + "".join(c.text for c in event.choices), event.usage
        return group, text, usage.completion_tokens

    async def leave(client, i):
        events = await client.completions.create(
            model="tiny_python", prompt=f"class C{i}:", max_tokens=500, temperature=0, stream=True
        )
        await anext(events)
        await events.close()

    async def nonsense(client, i):
        body = [b"{", b'{"model": 1}', b'{"prompt": "' + b"x" * 5_000_000 + b'"}'][i % 3]
        url = f"{client.base_url}completions"
        found = await client._client.post(url, content=body, headers=JSON)
        assert found.status_code == (413 if i % 3 == 2 else 400)
        assert set(found.json()["error"]) == {"message", "type", "param", "code"}
        with pytest.raises(openai.BadRequestError, match="at most 2048 tokens"):
            await client.completions.create(model="tiny_python", prompt="x = 1\n" * 3000)

    async def main(base, running):
        used, known = [], {}
        http = openai.DefaultAsyncHttpxClient(
            trust_env=False, limits=httpx.Limits(max_connections=500), timeout=300
        )
        client = openai.AsyncOpenAI(
            base_url=f"{base}/v1", api_key="-", http_client=http, max_retries=0
        )
        async with client:
            for _ in range(5):
                streams = [stream(client, g) for g in range(groups) for _ in range(copies)]
                others = [leave(client, i) for i in range(40)]
                others += [nonsense(client, i) for i in range(12)]
                rest = asyncio.gather(*others)
                for group, text, tokens in await asyncio.gather(*streams):
                    assert 0 < tokens <= 24
                    assert known.setdefault(group, text) == text
                await rest
                used.append(memory_of(running))
            assert len(set(known.values())) > groups * 0.8  # they can be told apart
            found = await metrics(client, base)
            assert found["paxattn_requests_waiting", None] == 0
            assert found["paxattn_generated_tokens_total", None] > 5 * groups * copies
            # It ends when it is asked to, with the stream that is there.
            last = asyncio.create_task(stream(client, 1))
            await asyncio.sleep(0.05)
            running.send_signal(signal.SIGTERM)
            assert (await last)[1] == known[1]
        print([f"{one / 2**20:.0f} MiB" for one in used])
        # The first round allocates. Each one sends 20 MB that are refused: kept, they would add up.
        assert used[-1] - used[1] < 2**26

    with process(tmp_path, "--max-requests", "512") as (base, running):
        asyncio.run(main(base, running))
        assert running.wait(30) == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()


def test_a_port_that_is_taken(monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["paxattn", "serve", "--port", port])
        with pytest.raises(SystemExit):
            cli.main()
    assert f"cannot serve at 127.0.0.1:{port}: Address already in use" in capfd.readouterr().err


def test_nobody_waits_for_an_engine_that_nobody_drives():
    async def main():
        served = AsyncEngine(ENGINE)
        for _ in range(2):  # before and after
            assert not served.serving
            with pytest.raises(NotServing, match="nobody drives the engine"):
                await served.stats()
            if served._draining:
                return
            async with served:
                deltas = await served.stream([[1, 2]], max_new_tokens=40)
                with pytest.raises(TimeoutError):  # who gives up waiting does no harm
                    await asyncio.wait_for(served.drain(), 0.001)
                assert sum([len(delta.tokens) async for delta in deltas]) == 40
                late = asyncio.gather(served.__aexit__(None, None, None), served.stats())
                assert (await late)[1].running == 0
                assert served.failure is None

    asyncio.run(main())


def test_values_too_deep_to_be_quoted():
    async def main():
        async with in_process() as client:
            for depth in range(960, 1000):
                deep = "[" * depth + "]" * depth
                for name in ("temperature", "prompt"):
                    body = f'{{"model": "tiny", "{name}": {deep}, "n": 1}}'
                    found = await client.post("/v1/completions", content=body, headers=JSON)
                    assert found.status_code == 400, depth

    asyncio.run(main())


def test_a_template_of_ones_own_has_the_special_tokens(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "chat_template": "x"}')
    (tmp_path / "chat_template.jinja").write_text("y")
    own = tmp_path / "own"
    own.write_text("{{ bos_token }}z")
    assert server.read_chat_template(tmp_path).render([]) == "y"
    assert server.read_chat_template(tmp_path, own).render([]) == "<s>z"
