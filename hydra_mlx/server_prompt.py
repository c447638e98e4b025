"""From a checked request to token ids: chat template, tools, and where turns begin."""

import json
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import prompts
from .errors import HydraError
from .sampling import prompt_ids, vocab_size
from .server_fields import ApiError, bad
from .server_request import Ask

MARKS = 3  # turn boundaries that are marked: the system prompt's end, the last messages'


@dataclass(frozen=True)
class Prompt:
    """What the model reads.

    Attributes:
        ids: Of all of it. marks: Positions from which another prompt is likely to differ.
        state: Of mlx-lm's TextStateMachine when the reply begins: "normal" or "reasoning".
    """

    ids: list
    marks: tuple = ()
    state: str = "normal"


class PromptMaker:
    """Renders and encodes; one tokenizer, many threads.

    Args:
        config: Variables of the chat template for every request.
        default_template: Use ChatML where the tokenizer has no template.
    """

    def __init__(self, model: Any, tokenizer: Any, config: dict, default_template: bool = False):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.default_template = default_template
        self._lock = threading.Lock()  # a tokenizer's settings are changed while it encodes

    def __call__(self, ask: Ask) -> Prompt:
        """The prompt of a request.

        Raises:
            ApiError: The template fails, there is nothing to read, or tokens that do not exist.
        """
        self._check(ask)
        with self._lock:
            try:
                if ask.chat:
                    return self._chat(ask)
                return Prompt(prompt_ids(self.model, self.tokenizer, ask.prompt))
            except HydraError as e:
                raise ApiError(400, e.message, "invalid_prompt") from None

    def _check(self, ask: Ask):
        V, options = vocab_size(self.model), ask.options
        if V is None:
            return
        worst = max(options.logit_bias or (0,))
        if worst >= V:
            raise bad("logit_bias", f"logit_bias names token {worst}; the last one is {V - 1}.")
        if options.top_k >= V:
            raise bad(
                "top_k", f"top_k is {options.top_k}, expected below {V}, the tokens there are."
            )

    def _chat(self, ask: Ask) -> Prompt:
        tokenizer = self.tokenizer
        if ask.tools and not (tokenizer.has_chat_template and tokenizer.has_tool_calling):
            raise ApiError(
                400, "This model's chat template knows no tools.", "unsupported_parameter", "tools"
            )
        if not tokenizer.has_chat_template and not self.default_template:
            from mlx_lm.server import convert_chat

            return Prompt(prompt_ids(self.model, tokenizer, convert_chat(ask.messages)))
        messages = [_with_arguments(m) for m in ask.messages]
        options = prompts.ChatOptions(
            default_template=self.default_template,
            config={**self.config, **ask.template, **({"tools": ask.tools} if ask.tools else {})},
        )
        text = prompts.render(tokenizer, messages, options)
        bos = tokenizer.bos_token
        special = not tokenizer.has_chat_template and not (bos and text.startswith(bos))
        ids = prompt_ids(self.model, tokenizer, prompts.encode(tokenizer, text, special))
        state = tokenizer.response_initial_state or "normal"
        if tokenizer.has_thinking and not tokenizer.response_initial_state:
            if tokenizer.rfind_think_start(ids) > tokenizer.rfind_think_end(ids):
                state = "reasoning"
        return Prompt(ids, self._marks(messages, options, text, ids), state)

    def _marks(self, messages: list, options: Any, text: str, ids: list) -> tuple:
        system = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
        ends = sorted({system, len(messages) - 2, len(messages) - 1})
        found = set()
        for n in (n for n in ends if 0 < n < len(messages)):
            try:
                begin = prompts.render(self.tokenizer, messages[:n], options, False)
            except HydraError:
                continue  # some templates want whole turns
            at = _common(begin, text)
            if at < len(text) // 2:
                where = len(prompts.encode(self.tokenizer, text[:at], False))
            else:
                where = len(ids) - len(prompts.encode(self.tokenizer, text[at:], False))
            if 0 < where < len(ids):
                found.add(where)
        return tuple(sorted(found))[:MARKS]


def _common(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _with_arguments(message: dict) -> dict:
    """A message whose calls have objects for arguments, as templates want them."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    out = []
    for call in calls:
        inner = dict(call["function"])
        if isinstance(inner.get("arguments"), str):
            inner["arguments"] = json.loads(inner["arguments"] or "{}")
        out.append({**call, "function": inner})
    return {**message, "tool_calls": out}


def tool_calls(parse: Any, texts: Sequence, tools: list | None, first: int) -> tuple:
    """Function calls in what a model wrote between its markers.

    Args:
        parse: The tokenizer's tool parser. first: Index of the first one in this reply.

    Returns:
        (calls for a client, texts that are none).
    """
    calls, broken = [], []
    for text in texts:
        try:
            found = parse(text, tools)
            found = found if isinstance(found, list) else [found]
            named = [(one["name"], one.get("arguments", {}), one.get("id")) for one in found]
        except Exception:  # a parser of mlx-lm's raises what it meets in a model's text
            broken.append(text)
            continue
        for name, arguments, id_ in named:
            calls.append(
                {
                    "index": first + len(calls),
                    "id": id_ or f"call_{uuid.uuid4().hex[:24]}",
                    "type": "function",
                    "function": {
                        "name": name,
                        "arguments": json.dumps(arguments, ensure_ascii=False),
                    },
                }
            )
    return calls, broken
