"""A server in this process, on a port of its own."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra_mlx
from hydra_mlx import serve, server_flags
from hydra_mlx.server_listen import Server

from .conftest import TEMPLATE, write_model

# Enough of a tools template for mlx-lm to choose its parser of JSON between <tool_call> marks.
TOOLS = "{% if tools %}{{ 'Tools: ' + (tools | tojson) + '\n' }}{% endif %}"
CALLS = "{% if false %}<tool_call>{{ tool_call.name }}</tool_call>{% endif %}"


@dataclass
class Served:
    """What a test needs of a server."""

    port: int
    service: Any
    engine: Any
    model: Any
    tokenizer: Any

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def request(self, method: str, path: str, body: Any = None, **headers) -> tuple:
        """(status, parsed JSON or text); a body that is not bytes is sent as JSON."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            c.request(method, path, raw, {k.replace("_", "-"): v for k, v in headers.items()})
            r = c.getresponse()
            text = r.read().decode()
        finally:
            c.close()
        return r.status, json.loads(text) if "json" in r.getheader("Content-type", "") else text

    def complete(self, prompt: Any, **more) -> dict:
        """The reply to a prompt (text or ids), which must succeed."""
        status, found = self.request("POST", "/v1/completions", {"prompt": prompt, **more})
        assert status == 200, found
        return found

    def quiet(self, seconds: float = 20):
        """Wait until nothing is at work."""
        end = time.monotonic() + seconds
        while self.engine.used or self.engine.figures()["running"]:
            assert time.monotonic() < end, self.engine.figures()
            time.sleep(0.01)

    def open(self, body: dict, path: str = "/v1/completions") -> http.client.HTTPConnection:
        """A connection with a request sent; nothing is read from it."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        c.request("POST", path, json.dumps(body).encode())
        return c


@contextlib.contextmanager
def serving(folder: Path, *flags: Any, model: tuple | None = None) -> Iterator[Served]:
    """A running server with these flags of hydra-mlx serve."""
    args = serve.build_parser().parse_args([str(x) for x in flags])
    server_flags.check_flags(args)
    model, tokenizer = model or hydra_mlx.load(folder)
    made = serve.make_service(args, model, tokenizer, Path(folder), args.api_key, lambda line: None)
    service, engine = made
    server = Server("127.0.0.1", 0, service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield Served(server.server_port, service, engine, model, tokenizer)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        engine.stop()


def write_tool_model(folder: Path) -> Path:
    """A random model whose template knows tools."""
    write_model(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TOOLS + CALLS + TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
