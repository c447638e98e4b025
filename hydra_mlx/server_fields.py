"""The fields of a JSON object, taken one by one with their types; refusals as OpenAI has them."""

import json
import math
from collections.abc import Callable
from typing import Any


class ApiError(Exception):
    """A refusal, as a client gets it.

    Args:
        status: Of HTTP. message: For people. code, param, kind: As in OpenAI's error objects.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.kind = code, param, kind

    def body(self) -> dict:
        """The object to send."""
        inner = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": inner}


def bad(param: str, message: str) -> ApiError:
    """A field that is wrong."""
    return ApiError(400, message, "invalid_value", param)


def parse_json(raw: bytes) -> dict:
    """The object in a body.

    Raises:
        ApiError: It is not one.
    """

    def constant(name: str):
        raise ValueError(f"{name} is not JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=constant)
        if b"\\u" in raw:  # half a surrogate pair is no text
            json.dumps(body, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as e:
        why = "it nests too deeply" if isinstance(e, RecursionError) else e
        raise ApiError(400, f"The body is not valid JSON: {why}.", "invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return body


class Fields:
    """Takes fields out of an object, one type each; what is left at the end nobody knows."""

    def __init__(self, values: dict, prefix: str = ""):
        self.values, self.prefix = dict(values), prefix

    def take(self, name: str, default: Any, fits: Callable, expected: str) -> Any:
        if name not in self.values:
            return default
        value = self.values.pop(name)
        if not fits(value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise bad(self.prefix + name, f"{self.prefix}{name} is {shown}, expected {expected}.")
        return value

    def text(self, name: str, default: str) -> str:
        return self.take(name, default, lambda x: isinstance(x, str) and len(x) <= 1000, "text")

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda x: isinstance(x, bool), "true or false")

    def object(self, name: str) -> dict:
        return self.take(name, {}, lambda x: isinstance(x, dict), "an object")

    def whole(self, name: str, default: Any, low: int, high: int = 2**53) -> Any:
        limit = f"a whole number of {low} or more"
        limit = limit if high >= 2**53 else f"a whole number from {low} to {high}"
        return self.take(name, default, lambda x: type(x) is int and low <= x <= high, limit)

    def number(self, name: str, default: Any, low: float, high: float) -> Any:
        def fits(x):
            return type(x) in (int, float) and math.isfinite(x) and low <= x <= high

        return self.take(name, default, fits, f"a number from {low} to {high}")

    def only(self, name: str, value: Any):
        def fits(x):
            return type(x) is type(value) and x == value

        self.take(name, value, fits, f"{json.dumps(value)}, or to be left out")

    def refuse_rest(self):
        for name in self.values:
            full = (self.prefix + name)[:100]
            raise ApiError(400, f"Unknown field: {full}.", "unknown_parameter", full)
