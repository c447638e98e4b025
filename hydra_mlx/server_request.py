"""What a client asks for: the body of a request, checked field by field.

Whatever is wrong with it becomes an ApiError, which the server sends as OpenAI's API does. A field
that cannot be honoured is refused; a null counts as absent, as it does there.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from .errors import UsageError
from .sampling import SamplingOptions
from .server_fields import ApiError, Fields, bad

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MOST_TOP_LOGPROBS = 20
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a client may say about itself; no reply depends on it.
IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention",
)  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a request gets that does not say."""

    max_tokens: int = 512
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class Ask:
    """A checked request.

    Attributes:
        chat: Messages, not plain text. model: As the client calls it.
        messages, tools: Of a chat. prompt: Text, or token ids. max_tokens: None if not said.
        top_logprobs: How many to report at each token; None reports none.
        template: Further variables of the chat template.
    """

    chat: bool
    model: str
    options: SamplingOptions
    messages: list = field(default_factory=list)
    tools: list | None = None
    prompt: Any = None
    max_tokens: int | None = None
    stop: tuple = ()
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    template: dict = field(default_factory=dict)


def parse(path: str, body: dict, defaults: Defaults) -> Ask:
    """The request in a JSON object.

    Raises:
        ApiError: Anything that is wrong with it.
    """
    chat = path != TEXT
    fields = Fields({k: v for k, v in body.items() if v is not None and k not in IGNORED})
    ask = {
        "chat": chat,
        "model": fields.text("model", "default_model"),
        "stream": fields.flag("stream"),
        "stop": _stop(fields),
        "template": fields.object("chat_template_kwargs") if chat else {},
    }
    usage = fields.object("stream_options")
    if usage and not ask["stream"]:
        raise bad("stream_options", "stream_options needs stream to be true.")
    inner = Fields(usage, "stream_options.")
    ask["include_usage"] = inner.flag("include_usage")
    inner.flag("include_obfuscation")
    inner.refuse_rest()
    ask["max_tokens"] = fields.whole("max_tokens", None, 1)
    if chat:
        ask["max_tokens"] = fields.whole("max_completion_tokens", ask["max_tokens"], 1)
        ask["messages"] = _messages(fields)
        ask["tools"] = _tools(fields)
        shown = fields.flag("logprobs")
        most = fields.whole("top_logprobs", 0, 0, MOST_TOP_LOGPROBS)
        if most and not shown:
            raise bad("top_logprobs", "top_logprobs needs logprobs to be true.")
        ask["top_logprobs"] = most if shown else None
        format_ = fields.object("response_format")
        if format_.get("type", "text") != "text":
            raise bad("response_format", "Only response_format {'type': 'text'} is supported.")
    else:
        ask["prompt"] = _prompt(fields)
        ask["top_logprobs"] = fields.whole("logprobs", None, 0, MOST_TOP_LOGPROBS)
        fields.only("echo", False)
        fields.only("suffix", "")
        fields.only("best_of", 1)
    fields.only("n", 1)
    ask["options"] = _options(fields, defaults)
    fields.refuse_rest()
    return Ask(**ask)


def _stop(fields: Fields) -> tuple:
    def fits(x):
        many = [x] if isinstance(x, str) else x
        return isinstance(many, list) and len(many) <= 16 and all(
            isinstance(s, str) and s for s in many
        )  # fmt: skip

    found = fields.take("stop", (), fits, "text, or a list of at most 16 texts, none of them empty")
    return (found,) if isinstance(found, str) else tuple(found)


def _messages(fields: Fields) -> list:
    found = fields.take("messages", None, lambda x: isinstance(x, list) and x, "a list of messages")
    if found is None:
        raise ApiError(400, "messages is missing.", "missing_required_parameter", "messages")
    out = []
    for i, m in enumerate(found):
        where = f"messages[{i}]"
        if not isinstance(m, dict) or m.get("role") not in ROLES:
            raise bad(where, f"{where} must be an object with a role: {', '.join(ROLES)}.")
        m = {k: v for k, v in m.items() if v is not None}
        m["role"] = "system" if m["role"] == "developer" else m["role"]
        m["content"] = _content(m.get("content", ""), where)
        calls = m.get("tool_calls", [])
        if not isinstance(calls, list) or not all(_is_call(c) for c in calls):
            raise bad(f"{where}.tool_calls", f"{where}.tool_calls is not a list of function calls.")
        out.append(m)
    return out


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{where}.content", f"{where}.content must be text, or a list of text parts.")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise bad(f"{where}.content", f"{where}.content: only parts of type text are read.")
    return "".join(part["text"] for part in content)


def _is_call(call: Any) -> bool:
    inner = call.get("function") if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        return False
    try:
        arguments = inner.get("arguments", {})
        return isinstance(json.loads(arguments) if arguments else {}, dict)
    except TypeError:
        return isinstance(arguments, dict)
    except (ValueError, RecursionError):
        return False


def _tools(fields: Fields) -> list | None:
    def fits(x):
        return isinstance(x, list) and all(
            isinstance(t, dict)
            and t.get("type") == "function"
            and isinstance(t.get("function"), dict)
            and isinstance(t["function"].get("name"), str)
            for t in x
        )

    tools = fields.take("tools", None, fits, "a list of functions")
    choice = fields.take(
        "tool_choice", "auto", lambda x: x in ("auto", "none"),
        "auto or none: this server cannot force a call",
    )  # fmt: skip
    fields.only("parallel_tool_calls", True)
    return None if choice == "none" else tools or None


def _prompt(fields: Fields) -> Any:
    def fits(x):
        if isinstance(x, str):
            return True
        if not isinstance(x, list) or not x:
            return False
        return (len(x) == 1 and isinstance(x[0], str)) or all(type(t) is int for t in x)

    found = fields.take("prompt", None, fits, "one text, or one list of token ids")
    if found is None:
        raise ApiError(400, "prompt is missing.", "missing_required_parameter", "prompt")
    return found[0] if isinstance(found, list) and isinstance(found[0], str) else found


def _options(fields: Fields, defaults: Defaults) -> SamplingOptions:
    def bias(x):
        try:
            return isinstance(x, dict) and all(
                int(k) >= 0 and type(v) in (int, float) and math.isfinite(v) for k, v in x.items()
            )
        except ValueError:
            return False

    temp = fields.number("temperature", defaults.temp, 0, 100)
    top_p = fields.number("top_p", defaults.top_p, 0, 1)
    more = {
        "top_k": fields.whole("top_k", defaults.top_k, 0),
        "min_p": fields.number("min_p", defaults.min_p, 0, 1),
        "xtc_probability": fields.number("xtc_probability", 0.0, 0, 1),
        "xtc_threshold": fields.number("xtc_threshold", 0.1, 0, 0.5),
    }
    values = {"seed": fields.whole("seed", None, -(2**63), 2**63 - 1)}
    if values["seed"] is not None:
        values["seed"] %= 2**63
    for kind, low, high in (("repetition", 0, 100), ("presence", -2, 2), ("frequency", -2, 2)):
        penalty = fields.number(f"{kind}_penalty", 0, low, high)
        recent = fields.whole(f"{kind}_context_size", 20, 1)
        if penalty:
            values[f"{kind}_penalty"], values[f"{kind}_context_size"] = float(penalty), recent
    found = fields.take("logit_bias", {}, bias, "an object: a number for each token id")
    values["logit_bias"] = {int(k): float(v) for k, v in found.items()} or None
    # OpenAI's API takes the filters at temperature 0 too, where they change nothing.
    if temp > 0 and top_p > 0:
        if not more["xtc_probability"]:
            more.pop("xtc_threshold")
        values |= {"temp": float(temp), "top_p": float(top_p), **more}
    try:
        return SamplingOptions(**values)
    except UsageError as e:
        raise ApiError(400, e.message, "invalid_value") from None
