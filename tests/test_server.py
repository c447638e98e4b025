"""The server as its clients see it: the official openai package, and bytes on a socket."""

import json
import socket
import threading
import time

import hydra_mlx
from hydra_mlx import server_job
from hydra_mlx.generation import stream_generate

import mlx.core as mx
import openai
import pytest

from .serving import Served, serving, write_tool_model

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def served(tiny_model_dir):
    with serving(tiny_model_dir, "--max-context", 2000, "--max-request", "1MB") as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = write_tool_model(tmp_path_factory.mktemp("tools") / "m")
    with serving(folder) as found:
        yield found


def alone(served: Served, prompt: str, n: int, **more) -> str:
    """The reply of a single run."""
    ids = served.tokenizer.encode(prompt)
    return "".join(p.text for p in stream_generate(served.model, served.tokenizer, ids, n, **more))


def chat(text: str, system: str = "Be brief.") -> list:
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def rendered(served: Served, messages: list) -> str:
    return served.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


# ---------------------------------------------------------------------------- the openai package


def test_chat_equals_a_single_run(served, client):
    messages = chat("Hello")
    r = client.chat.completions.create(model="gpt-4o", messages=messages, max_tokens=12)
    assert r.choices[0].message.content == alone(served, rendered(served, messages), 12)
    assert r.choices[0].finish_reason == "length" and r.model == "gpt-4o"
    n = len(served.tokenizer.encode(rendered(served, messages)))
    assert (r.usage.prompt_tokens, r.usage.completion_tokens) == (n, 12)


def test_stream_has_the_same_text_and_usage(served, client):
    messages = chat("Hello again")
    stream = client.chat.completions.create(
        model="x",
        messages=messages,
        max_completion_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == alone(served, rendered(served, messages), 12)
    assert chunks[-1].usage.completion_tokens == 12 and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_completions_with_stop_and_ids(served, client):
    whole = alone(served, "The quick", 20)
    stop = whole[5:7]
    r = client.completions.create(model="x", prompt="The quick", max_tokens=20, stop=[stop, "zzz"])
    assert r.choices[0].text == whole[: whole.index(stop)]
    assert r.choices[0].finish_reason == "stop" and r.usage.completion_tokens < 20
    ids = served.tokenizer.encode("The quick")
    r = client.completions.create(model="x", prompt=ids, max_tokens=20)
    assert r.choices[0].text == whole
    parts = client.completions.create(model="x", prompt=ids, max_tokens=20, stop=stop, stream=True)
    assert "".join(p.choices[0].text for p in parts) == whole[: whole.index(stop)]


def test_logprobs(served, client):
    r = client.chat.completions.create(
        model="x", messages=chat("Hi"), max_tokens=3, logprobs=True, top_logprobs=4
    )
    content = r.choices[0].logprobs.content
    assert "".join(c.token for c in content) == r.choices[0].message.content
    logits = served.model(mx.array([served.tokenizer.encode(rendered(served, chat("Hi")))]))[0, -1]
    best = (logits - mx.logsumexp(logits)).max().item()
    assert content[0].logprob == pytest.approx(best, abs=1e-4)
    for c in content:
        assert [t.logprob for t in c.top_logprobs] == sorted(
            (t.logprob for t in c.top_logprobs), reverse=True
        )
        assert len(c.top_logprobs) == 4 and c.top_logprobs[0].token == c.token
    stream = client.chat.completions.create(
        model="x", messages=chat("Hi"), max_tokens=3, logprobs=True, stream=True
    )
    told = [c for chunk in stream for c in chunk.choices[0].logprobs.content]
    assert [c.logprob for c in told] == pytest.approx([c.logprob for c in content], abs=1e-4)


def test_seed_decides_the_reply(client):
    def reply(seed, **more):
        ask = {"model": "x", "messages": chat("Say"), "max_tokens": 16, "temperature": 1.5}
        r = client.chat.completions.create(**{**ask, "seed": seed, **more})
        return r.choices[0].message.content

    first = reply(7)
    replies, threads = [None] * 4, []
    for i in range(4):  # others are decoded beside it
        work = threading.Thread(target=lambda i=i: replies.__setitem__(i, reply(7 if i else 8)))
        threads.append(work)
        work.start()
    for t in threads:
        t.join()
    assert replies[1:] == [first] * 3 and replies[0] != first
    assert reply(7, top_p=0.0) == reply(9, temperature=0)


def test_penalties_and_bias_reach_the_reply(served, client):
    r = client.chat.completions.create(
        model="x", messages=chat("Hi"), max_tokens=5, logit_bias={"33": 100}
    )
    assert set(r.choices[0].message.content) == {served.tokenizer.decode([33])}
    r = client.chat.completions.create(
        model="x",
        messages=chat("Hi"),
        max_tokens=5,
        logit_bias={"33": 100},
        presence_penalty=2,
        frequency_penalty=2,
        extra_body={"repetition_penalty": 100},
    )
    assert len(set(r.choices[0].message.content)) > 1


def script(monkeypatch, tokenizer, text: str):
    """Every reply that is sampled becomes this text."""
    ids = [*tokenizer.encode(text), next(iter(tokenizer.eos_token_ids))]

    def pick(self, logprobs):
        self._drawn += 1
        return mx.array([ids[min(self._drawn, len(ids)) - 1]])

    monkeypatch.setattr(server_job.Pick, "__call__", pick)


def test_tool_calls(tools, monkeypatch):
    call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": "é"}}</tool_call>'
    script(monkeypatch, tools.tokenizer, f"Let me see.{call}{call}")
    ask = {"model": "x", "messages": chat("2+3?"), "tools": [TOOL], "temperature": 1}
    with openai.OpenAI(base_url=tools.url, api_key="any", max_retries=0) as client:
        r = client.chat.completions.create(**ask)
        assert r.choices[0].finish_reason == "tool_calls"
        assert r.choices[0].message.content == "Let me see."
        calls = r.choices[0].message.tool_calls
        assert [c.function.name for c in calls] == ["add", "add"]
        assert json.loads(calls[0].function.arguments) == {"a": 2, "b": "é"}
        assert calls[0].id != calls[1].id
        with client.chat.completions.stream(**ask) as stream:
            final = stream.get_final_completion()
        found = final.choices[0].message.tool_calls
        assert [c.function.arguments for c in found] == [c.function.arguments for c in calls]
        # The calls go back to the model, with their results.
        back = [
            *chat("2+3?"),
            r.choices[0].message.model_dump(exclude_none=True),
            {"role": "tool", "content": "5", "tool_call_id": calls[0].id},
        ]
        r = client.chat.completions.create(model="x", messages=back, tools=[TOOL], max_tokens=4)
        assert r.usage.prompt_tokens > 0
        plain = client.chat.completions.create(**ask, tool_choice="none", max_tokens=4)
        assert (
            plain.usage.prompt_tokens
            < client.chat.completions.create(**ask, max_tokens=4).usage.prompt_tokens
        )


def test_a_call_that_does_not_parse_is_text(tools, monkeypatch):
    script(monkeypatch, tools.tokenizer, "So: <tool_call>{oops</tool_call>")
    status, r = tools.request(
        "POST",
        "/v1/chat/completions",
        {"messages": chat("x"), "tools": [TOOL], "temperature": 1},
    )
    assert status == 200 and r["choices"][0]["finish_reason"] == "stop"
    assert r["choices"][0]["message"]["content"] == "So: {oops"


def test_models(served, client):
    assert [m.id for m in client.models.list()] == [served.service.name]
    assert client.models.retrieve(served.service.name).object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")
    status, health = served.request("GET", "/health")
    assert status == 200 and health == {"status": "ok"}
    status, found = served.request("GET", "/stats")
    assert status == 200 and found["cached_bytes"] == served.engine.pool.nbytes


def test_alias(tiny_model_dir, tiny):
    with serving(tiny_model_dir, "--alias", "gpt-4o", model=tiny) as s:
        client = openai.OpenAI(base_url=s.url, api_key="any", max_retries=0)
        assert {m.id for m in client.models.list()} == {s.service.name, "gpt-4o"}
        for name in ("gpt-4o", s.service.name, "default_model"):
            client.completions.create(model=name, prompt="a", max_tokens=1)
        with pytest.raises(openai.NotFoundError) as e:
            client.completions.create(model="other", prompt="a", max_tokens=1)
        assert e.value.code == "model_not_found"


def test_context_limit(client):
    for ask in ({"prompt": "a" * 2000}, {"prompt": "abc", "max_tokens": 2000}):
        with pytest.raises(openai.BadRequestError) as e:
            client.completions.create(model="x", **ask)
        assert e.value.code == "context_length_exceeded"
        assert "2000" in e.value.message
    r = client.completions.create(model="x", prompt="a" * 1999, stop="zzzz")
    assert r.usage.completion_tokens == 1  # what is left


def test_memory_limit(tiny_model_dir, tiny):
    """The plan refuses what cannot fit, and lets wait what must."""
    with serving(tiny_model_dir, model=tiny) as s:
        memory = s.engine.memory.step_bytes + 2_000_000
    with serving(tiny_model_dir, "--memory", memory, "--max-waiting", 2, model=tiny) as s:
        most = s.engine.memory.most
        assert 450 < most < 3000, most
        status, r = s.request("POST", "/v1/completions", {"prompt": "a" * most})
        assert status == 400 and r["error"]["code"] == "context_length_exceeded"
        assert str(most) in r["error"]["message"] and "MiB" in r["error"]["message"]
        long = {"prompt": "a" * (most - 60), "max_tokens": 50, "stream": True}
        first = s.open(long).getresponse()
        waiting = [s.open({**long, "max_tokens": 1}) for _ in range(2)]
        while s.engine.figures()["waiting"] < 2:
            time.sleep(0.01)
        status, r = s.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 429 and r["error"]["code"] == "rate_limit_exceeded"
        assert first.read().endswith(b"[DONE]\n\n")
        assert all(c.getresponse().read().endswith(b"[DONE]\n\n") for c in waiting)


def test_api_key(tiny_model_dir, tiny):
    with serving(tiny_model_dir, "--api-key", "secret", model=tiny) as s:
        for key in ("wrong", "sécret", ""):
            headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
            for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions")):
                status, r = s.request(method, path, {"prompt": "a"}, **headers)
                assert (status, r["error"]["code"]) == (401, "invalid_api_key")
        assert s.request("GET", "/health")[0] == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=s.url, api_key="no").models.list()
        openai.OpenAI(base_url=s.url, api_key="secret").models.list()


# ------------------------------------------------------------------------------------- bad input

BAD = [
    ({}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", "b"]}, "prompt"),
    ({"prompt": [1, 2.5]}, "prompt"),
    ({"prompt": "a", "max_tokens": "8"}, "max_tokens"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens"),
    ({"prompt": "a", "temperature": "hot"}, "temperature"),
    ({"prompt": "a", "temperature": -1}, "temperature"),
    ({"prompt": "a", "top_p": 1.5}, "top_p"),
    ({"prompt": "a", "seed": 1.5}, "seed"),
    ({"prompt": "a", "stop": ""}, "stop"),
    ({"prompt": "a", "stop": [1]}, "stop"),
    ({"prompt": "a", "n": 2}, "n"),
    ({"prompt": "a", "best_of": 3}, "best_of"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "stream": "yes"}, "stream"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "a", "logprobs": 99}, "logprobs"),
    ({"prompt": "a", "model": 7}, "model"),
    ({"prompt": "a", "messages": []}, "messages"),
    ({"prompt": "a", "frobnicate": 1}, "frobnicate"),
    ({"prompt": "a", "logit_bias": {"260": 1}}, "logit_bias"),
    ({"prompt": "a", "top_k": 260, "temperature": 1}, "top_k"),
    ({"prompt": [260]}, None),
]
BAD_CHAT = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
    ({"messages": chat("x"), "tools": {}}, "tools"),
    ({"messages": chat("x"), "tools": [TOOL]}, "tools"),
    ({"messages": chat("x"), "tool_choice": "required"}, "tool_choice"),
    ({"messages": chat("x"), "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": chat("x"), "top_logprobs": 3}, "top_logprobs"),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_wrong_fields(served, path):
    for body, param in BAD if path == "/v1/completions" else BAD_CHAT:
        status, r = served.request("POST", path, body)
        assert status == 400, body
        assert set(r["error"]) == {"message", "type", "param", "code"}
        assert r["error"]["param"] == param, r
        assert r["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100000,
        b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_malformed_bodies(served, raw):
    status, r = served.request("POST", "/v1/completions", raw)
    assert status == 400 and r["error"]["message"] and served.engine.healthy


def test_what_mlx_lm_tests_of_its_server(served):
    """Requests of its own tests that apply: every sampling field, text parts, null contents."""
    ask = {"temperature": 0.5, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 999}
    ask |= {"model": "default_model", "max_tokens": 10, "stop": "stop sequence"}
    texts = [
        served.complete("Once upon a time", **ask, repetition_context_size=20)["choices"][0]["text"]
        for _ in range(2)
    ]
    assert texts[0] == texts[1]
    call = {"name": "add", "arguments": '{"a": 2, "b": 3}'}
    parts = [{"type": "text", "text": "You are "}, {"type": "text", "text": "helpful."}]
    for messages in (
        chat("Hello!", parts),
        [
            {"role": "user", "content": "what is 2+3?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"type": "function", "id": "123", "function": call}],
            },
            {"role": "tool", "content": "5", "tool_call_id": "123"},
        ],
    ):
        body = {"model": "chat_model", "messages": messages, "max_tokens": 10, "temperature": 0.7}
        status, r = served.request("POST", "/chat/completions", body)
        assert status == 200 and r["id"] and r["choices"][0]["message"]["content"] is not None
    whole, parts = (
        served.request("POST", "/v1/chat/completions", {"messages": chat(c), "max_tokens": 3})[1]
        for c in (
            "You are helpful.",
            [{"type": "text", "text": t} for t in ("You are ", "helpful.")],
        )
    )
    assert whole["choices"] == parts["choices"]


def test_nulls_and_harmless_fields_are_taken(served):
    body = {"prompt": "a", "max_tokens": 1, "stop": None, "seed": None, "user": "me"}
    served.complete("a", **{k: v for k, v in body.items() if k != "prompt"}, top_p=0.9, n=1)


def raw(port: int, data: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        s.sendall(data)
        s.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: s.recv(65536), b""))


def test_what_is_not_a_request(served):
    post = b"POST /v1/completions HTTP/1.1\r\n"
    for data, status in (
        (post + b"\r\n", 411),
        (post + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (post + b"Content-Length: -5\r\n\r\n", 400),
        (post + b"Content-Length: 9999999999999999999999\r\n\r\n", 413),
        (b"PUT / HTTP/1.1\r\n\r\n", 501),
        (b"GET /nope HTTP/1.1\r\n\r\n", 404),
        (b"POST /nope HTTP/1.1\r\n\r\n", 404),
        (post + b"Origin: http://evil.example\r\nContent-Length: 2\r\n\r\n{}", 403),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
    ):
        head, _, body = raw(served.port, data).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status, (data[:60], head)
        assert json.loads(body)["error"]["message"]
    raw(served.port, b"\x16\x03\x01 nonsense\r\n\r\n")
    raw(served.port, post + b'Content-Length: 50\r\n\r\n{"prompt"')  # breaks off
    assert served.complete("a", max_tokens=1)


def test_too_large(served):
    status, r = served.request("POST", "/v1/completions", b" " * 1_500_000)
    assert status == 413 and r["error"]["code"] == "too_large"


def test_a_client_that_goes_ends_its_reply(served):
    for stream in (True, False):
        ask = {"prompt": "go on", "max_tokens": 1900, "stream": stream, "temperature": 1}
        c = served.open({**ask, "logit_bias": {"257": -100}})
        while not served.engine.figures()["running"]:
            time.sleep(0.01)
        c.sock.close()
        c.close()
        served.quiet(20)
    assert max(len(e.tokens) for e in served.engine.pool.entries[-2:]) < 1000  # not to the end
    assert served.engine.used == 0


def test_an_error_in_the_model_is_an_answer(tiny_model_dir, monkeypatch):
    model = hydra_mlx.load(tiny_model_dir)
    with serving(tiny_model_dir, model=model) as s:
        before = s.complete("abc", max_tokens=4)["choices"][0]["text"]
        last = type(s.model.layers[2].mlp)
        monkeypatch.setattr(last, "__call__", lambda self, x: 1 / 0)
        status, r = s.request("POST", "/v1/completions", {"prompt": "abcdef", "max_tokens": 4})
        assert status == 500 and r["error"]["type"] == "server_error"
        monkeypatch.undo()
        assert s.complete("abc", max_tokens=4)["choices"][0]["text"] == before
        s.quiet()
        assert s.engine.used == 0 and s.engine.healthy


def test_a_server_that_stops(tiny_model_dir, tiny):
    """What is under way ends with an error, what comes is refused, health says so."""
    with serving(tiny_model_dir, model=tiny) as s:
        ask = {"prompt": "go", "max_tokens": 3000, "logit_bias": {"257": -100}}
        under_way = s.open({**ask, "stream": True})
        r = under_way.getresponse()
        assert r.readline()
        whole = s.open(ask)
        while s.engine.figures()["running"] < 2:
            time.sleep(0.01)
        s.engine.stop()
        assert b'"stopping"' in r.read()
        assert whole.getresponse().status == 503
        status, found = s.request("POST", "/v1/completions", {"prompt": "a"})
        assert status == 503 and found["error"]["code"] == "stopping"
        assert s.request("GET", "/health") == (503, {"status": "unavailable"})
