"""The HTTP side: who may ask, what a request looks like, how a reply travels.

mlx-lm's handler makes the objects; this one reads requests and never lets an error out. A thread
for each connection waits for the engine, which alone computes.
"""

import hmac
import json
import queue
import select
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lm.server import APIHandler

from . import cli
from .server_engine import Engine
from .server_fields import ApiError, parse_json
from .server_job import Job, Progress
from .server_prompt import PromptMaker
from .server_reply import Reply
from .server_request import CHAT, TEXT, Defaults, parse
from .text import first_line, size

POLL_S = 0.2  # between looks whether the client is still there
ALIVE_S = 5.0  # between comments in a stream that has nothing to say
DRAIN_S = 2.0  # for the rest of a request that is refused
PATHS = {CHAT: CHAT, "/chat/completions": CHAT, TEXT: TEXT, "/completions": TEXT}


@dataclass(frozen=True)
class Service:
    """What every connection needs.

    Attributes:
        name: Of the model. aliases: Other names for it; None takes any.
        api_key: Asked for in every request; None asks for none. origins: Web pages that may ask.
        most_bytes: Of a request's body. timeout_s: For a client to send or take something.
        verbose: Log each request. connections: At once; more are closed.
    """

    engine: Engine
    prompts: PromptMaker
    tokenizer: Any
    name: str
    defaults: Defaults
    fingerprint: str
    aliases: tuple | None = None
    api_key: str | None = None
    origins: tuple = ()
    most_bytes: int = 32 << 20
    timeout_s: float = 60.0
    verbose: bool = False
    connections: int = 512

    @property
    def names(self) -> list:
        """What /v1/models lists."""
        return [self.name, *(self.aliases or ())]


class Handler(APIHandler):
    """One connection, one request."""

    def __init__(self, service: Service, *args: Any):
        self.service, self.timeout = service, service.timeout_s
        super().__init__(service.engine, *args, system_fingerprint=service.fingerprint)

    # ------------------------------------------------------------------------------- requests

    def do_GET(self):  # noqa: N802
        """/v1/models, /v1/models/NAME, /health and /stats."""
        self._answer(self._get)

    def do_POST(self):  # noqa: N802
        """/v1/chat/completions and /v1/completions."""
        self._answer(self._post)

    def do_OPTIONS(self):  # noqa: N802
        """What a web page asks before it asks."""
        self._answer(lambda: self._send(204, None))

    def _answer(self, work: Callable):
        self._begun = False
        try:
            try:
                if self.command != "OPTIONS":
                    self._check_key()
                self._check_origin()
                work()
            except ApiError as e:
                self._refuse(e)
                self._drain()
            except (OSError, RuntimeError, ValueError, TypeError, KeyError) as e:
                if isinstance(e, (ConnectionError, TimeoutError)):
                    raise
                cli.say(f"error: {type(e).__name__}: {first_line(e)}")
                self._refuse(ApiError(500, "Internal error.", "failed", kind="server_error"))
        except (OSError, ValueError):
            self.close_connection = True  # the client has gone

    def _check_key(self):
        key = self.service.api_key
        if key is None:
            return
        given = self.headers.get("Authorization", "")
        kind, _, given = given.partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), key.encode())
        if kind.lower() != "bearer" or not same:
            raise ApiError(401, "Incorrect or missing API key.", "invalid_api_key")

    def _check_origin(self):
        """A page of the web must not use what listens on this machine only."""
        origin = self.headers.get("Origin")
        if origin is not None and not {origin, "*"} & {*self.service.origins}:
            raise ApiError(403, f"Origin {origin[:100]} is not allowed.", "origin_not_allowed")

    def _get(self):
        path = self.path.split("?")[0].rstrip("/")
        if path == "/health":
            healthy = self.service.engine.healthy
            state = {"status": "ok" if healthy else "unavailable"}
            self._send(200 if healthy else 503, state)
        elif path == "/stats":
            self._send(200, self.service.engine.figures())
        elif path in ("/v1/models", "/models"):
            found = [self._model(name) for name in self.service.names]
            self._send(200, {"object": "list", "data": found})
        elif path.startswith("/v1/models/"):
            name = path[len("/v1/models/") :]
            if name not in self.service.names:
                raise self._unknown(name)
            self._send(200, self._model(name))
        else:
            raise ApiError(404, f"There is no {path[:100] or '/'}.", "not_found")

    def _model(self, name: str) -> dict:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "hydra_mlx"}

    def _unknown(self, name: str) -> ApiError:
        names = ", ".join(self.service.names)
        return ApiError(
            404, f"No model {name[:100]!r} here; there is {names}.", "model_not_found", "model"
        )

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            raise ApiError(411, "Send a Content-Length, not chunks.", "length_required")
        text = self.headers.get("Content-Length")
        if text is None:
            raise ApiError(411, "Content-Length is missing.", "length_required")
        if not (text.isascii() and text.isdigit()):
            raise ApiError(400, f"Content-Length is {text[:50]!r}.", "invalid_value")
        length, most = int(text[:20]), self.service.most_bytes
        if length > most:
            raise ApiError(
                413, f"The body has {size(length)}, at most {size(most)} are taken.", "too_large"
            )
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise ConnectionResetError
        return raw

    def _post(self):
        path = PATHS.get(self.path.split("?")[0].rstrip("/"))
        if path is None:
            raise ApiError(404, f"There is no {self.path[:100]}.", "not_found")
        service = self.service
        ask = parse(path, parse_json(self._body()), service.defaults)
        if service.aliases is not None and ask.model not in (*service.names, "default_model"):
            raise self._unknown(ask.model)
        prompt = service.prompts(ask)
        self.requested_model = ask.model if ask.model != "default_model" else service.name
        self.stream = ask.stream
        kind, prefix = ("chat.completion", "chatcmpl") if ask.chat else ("text_completion", "cmpl")
        self.object_type = kind + (".chunk" if ask.chat and ask.stream else "")
        self.request_id = f"{prefix}-{uuid.uuid4()}"
        job = service.engine.submit(prompt, ask)
        try:
            self._tell(job, Reply(ask, prompt, job, service.tokenizer))
        finally:
            job.cancelled.set()

    # -------------------------------------------------------------------------------- replies

    def _tell(self, job: Job, reply: Reply):
        """Wait for the reply and send it, at once or as it comes."""
        stream, told = reply.ask.stream, time.monotonic()
        looked = told
        while reply.reason is None:
            try:
                event = job.events.get(timeout=POLL_S)
            except queue.Empty:
                event = None
            if isinstance(event, Exception):
                raise event
            if time.monotonic() - looked >= POLL_S:
                looked = time.monotonic()
                if self._gone():
                    raise ConnectionResetError
            if event is None and not self.service.engine.healthy:
                raise ApiError(503, "The server is stopping.", "stopping", kind="server_error")
            if isinstance(event, Progress) or event is None:
                if stream and time.monotonic() - told > (ALIVE_S if event is None else 0):
                    told = time.monotonic()
                    state = f"{event.done}/{event.total}" if event else "waiting"
                    self._event(f": keepalive {state}")
                continue
            reply.hear(event)
            if stream and reply.reason is None and not reply.empty:
                told = time.monotonic()
                self._event("data: " + json.dumps(reply.taken(self)))
        job.cancelled.set()
        if not stream:
            self._send(200, reply.taken(self))
            return
        self._event("data: " + json.dumps(reply.taken(self)))
        if reply.ask.include_usage:
            self._event("data: " + json.dumps(reply.usage(self)))
        self._event("data: [DONE]")

    def _gone(self) -> bool:
        """Whether the client has closed the connection."""
        try:
            ready = select.poll()  # select() ends at file 1024
            ready.register(self.connection, select.POLLIN)
            return bool(ready.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def _event(self, line: str):
        if not self._begun:
            self._begun = True
            self._set_stream_headers(200)
            self.end_headers()
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def _send(self, status: int, body: dict | None):
        raw = b"" if body is None else json.dumps(body).encode()
        self._begun = True
        self._set_completion_headers(status)
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
        self.wfile.flush()

    def _refuse(self, error: ApiError):
        if self._begun:  # in the middle of a stream
            self._event("data: " + json.dumps(error.body()))
        else:
            self._send(error.status, error.body())

    def _drain(self):
        """Take what the client still sends: closing before would take the answer back."""
        end = time.monotonic() + DRAIN_S
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(DRAIN_S)
        while time.monotonic() < end and self.connection.recv(1 << 16):
            pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None):
        """Errors of the HTTP library itself, as all others."""
        self.close_connection = True
        try:
            self.log_request(code)
            self._send(code, ApiError(code, message or "Bad request.", "bad_request").body())
        except (OSError, AttributeError):
            pass  # there is no connection, or nothing was read from it yet

    def _set_cors_headers(self):
        origins = self.service.origins
        origin = getattr(self, "headers", {}).get("Origin")
        if origin is not None and {origin, "*"} & {*origins}:
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "GET, POST")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")

    def log_message(self, format: str, *args: Any):
        """One line on stderr for each request, if asked for."""
        if self.service.verbose:
            cli.say(f"{self.address_string()} {format % args}")
