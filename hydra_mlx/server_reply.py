"""A reply as OpenAI's API has it: tokens of the engine become messages, tool calls and usage.

mlx-lm's text state machine tells reasoning and tool calls from the rest, its handler makes the
objects; this is what happens in between.
"""

from typing import Any

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from .server_job import Job, Piece
from .server_prompt import Prompt, tool_calls
from .server_request import Ask


class Reply:
    """Sorts the pieces of one reply.

    Args:
        tokenizer: Wrapped, as mlx-lm does it.

    Attributes:
        text, reasoning, calls, logprobs: What has come since the last `taken`.
        tokens: Of the reply, its end token included. reason: Once it is over.
    """

    def __init__(self, ask: Ask, prompt: Prompt, job: Job, tokenizer: Any):
        self.ask, self.job, self.tokenizer = ask, job, tokenizer
        self.prompt_tokens, self.tokens = len(prompt.ids), 0
        self.reason: str | None = None
        self._state, self._now = None, "normal"
        if ask.chat:
            self._now = prompt.state
            self._state = make_text_state_machine(tokenizer).make_state(prompt.state)
        self._tool, self._called = "", 0
        self._clear()

    def _clear(self):
        self.text = self.reasoning = ""
        self.calls: list = []
        self.logprobs: list = []

    def hear(self, piece: Piece):
        """Take the next piece."""
        self.tokens += 1
        if piece.logprob is not None:
            self.logprobs.append(piece)
        for state, text in self._sorted(piece):
            if self._now == "tool" and state != "tool":
                self._end_tool()
            self._now = state
            if state == "tool":
                self._tool += text
            elif state == "reasoning":
                self.reasoning += text
            else:
                self.text += text
        if piece.reason:
            self._end_tool()
            called = piece.reason == "stop" and self._called
            self.reason = "tool_calls" if called else piece.reason

    def _sorted(self, piece: Piece) -> list:
        if self._state is None:
            return [("normal", piece.text)]
        self._state, parts = TextStateMachine.split(self._state, piece.text)
        if piece.reason:
            # What looks like the beginning of a marker is none, as the text ends here.
            self._state, rest, state = TextStateMachine.flush(self._state)
            parts.append((state, rest))
        return [(state or "normal", text) for state, text in parts]

    def _end_tool(self):
        text, self._tool = self._tool, ""
        if not text.strip():
            return
        calls, broken = tool_calls(self.tokenizer.tool_parser, [text], self.ask.tools, self._called)
        self._called += len(calls)
        self.calls += calls
        self.text += "".join(broken)  # nothing that the model wrote is lost

    @property
    def empty(self) -> bool:
        """Whether there is nothing to tell."""
        return not (self.text or self.reasoning or self.calls or self.logprobs)

    def taken(self, handler: Any) -> dict:
        """What has come since the last time, as an object; the whole reply if never asked before.

        Args:
            handler: mlx-lm's, with the request's ids and names.
        """
        calls = self.calls
        if not self.ask.stream:
            calls = [{k: v for k, v in c.items() if k != "index"} for c in calls]
        made = handler.generate_response(
            self.text,
            self.reason,
            self.prompt_tokens,
            self.tokens,
            self.job.cached,
            tool_calls=calls,
            reasoning_text=self.reasoning,
        )
        if self.ask.top_logprobs is not None:
            made["choices"][0]["logprobs"] = self._logprobs()
        self._clear()
        return made

    def usage(self, handler: Any) -> dict:
        """The last object of a stream, for a client that asks for it."""
        made = handler.completion_usage_response(self.prompt_tokens, self.tokens, self.job.cached)
        return {**made, "object": handler.object_type}

    def _logprobs(self) -> dict:
        if not self.ask.chat:
            return {
                "tokens": [self._token(p.token)["token"] for p in self.logprobs],
                "token_logprobs": [p.logprob for p in self.logprobs],
                "top_logprobs": [
                    {self._token(i)["token"]: g for i, g in p.top} for p in self.logprobs
                ],
            }
        return {
            "content": [
                {
                    **self._token(p.token),
                    "logprob": p.logprob,
                    "top_logprobs": [{**self._token(i), "logprob": g} for i, g in p.top],
                }
                for p in self.logprobs
            ]
        }

    def _token(self, token: int) -> dict:
        text = self.tokenizer.decode([token])
        return {"token": text, "bytes": list(text.encode("utf-8", "replace"))}
