"""What the model is given to read: chat template, token ids, what a prompt cache has of it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import cli
from .checkpoint_options import CheckpointOptions
from .errors import UsageError
from .text import count, first_line, join

SAME = "the prompt ends where it ends, and the last token must be read again"
# Of the tokens in a file. A prompt that shares less with it is taken for a wrong file, as the run
# would put the prompt into the place of what the file holds.
LEAST_SHARE = 0.1
# ChatML: what transformers once used for a tokenizer without a template of its own.
DEFAULT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    "{% if not (continue_final_message and loop.last) %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class ChatOptions:
    """How a prompt becomes the text that the model reads.

    Attributes:
        template: Use the tokenizer's chat template when it has one.
        default_template: Use ChatML when it has none.
        system: System prompt. prefill: Beginning of the reply, put into the model's mouth.
        config: Further variables of the template.
    """

    template: bool = True
    default_template: bool = False
    system: str | None = None
    prefill: str | None = None
    config: dict = field(default_factory=dict)

    def active(self, tokenizer: Any) -> bool:
        """Whether a template is used with this tokenizer.

        Raises:
            UsageError: Flags that need a template, and none is used.
        """
        active = self.template and (tokenizer.has_chat_template or self.default_template)
        if not active:
            given = {
                "--system-prompt": self.system is not None,
                "--prefill-response": self.prefill is not None,
                "--chat-template-config": bool(self.config),
            }
            for name in (n for n, is_given in given.items() if is_given):
                why = "--ignore-chat-template is given" if not self.template else "it has none"
                raise UsageError(
                    f"{name} needs the tokenizer's chat template, but {why}.",
                    f"Write the text into the prompt and leave {name} out"
                    + ("." if not self.template else ", or add --use-default-chat-template."),
                )
        return active


def parse_template_config(text: str | None) -> dict:
    """--chat-template-config as a dict.

    Raises:
        UsageError: Not a JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(
            f"--chat-template-config is {text[:60]!r}, expected a JSON object.",
            "For example: --chat-template-config '{\"enable_thinking\": false}'",
        )
    return value


def chat_messages(
    prompt: str, options: ChatOptions, history: Sequence = (), open_turn: bool = False
) -> list:
    """The conversation with a new user turn: [{"role": ..., "content": ...}, ...].

    Args:
        open_turn: The last message is a document: the prompt goes on with it, a blank line
            between, unless it begins with the document itself.

    Raises:
        UsageError: The conversation so far has another system prompt.
    """
    messages = [dict(m) for m in history]
    if options.system is not None:
        if not messages:
            messages = [{"role": "system", "content": options.system}]
        elif messages[0] != {"role": "system", "content": options.system}:
            raise UsageError(
                "--system-prompt differs from the one of the conversation in the prompt cache.",
                "Leave it out, take another cache file, or start anew with "
                "--prompt-cache-overwrite.",
            )
    if open_turn:
        document = messages.pop()["content"]
        prompt = prompt if prompt.startswith(document) else join(document, prompt)
    return [*messages, {"role": "user", "content": prompt}]


def render(tokenizer: Any, messages: list, options: ChatOptions, reply: bool = True) -> str:
    """The text of a conversation.

    Args:
        reply: End with the header of the reply; without it the text ends after the last turn.

    Raises:
        UsageError: The template fails on this conversation.
    """
    prefill = options.prefill is not None and reply
    if prefill:
        messages = [*messages, {"role": "assistant", "content": options.prefill}]
    settings = dict(options.config)
    if not tokenizer.has_chat_template:
        settings["chat_template"] = DEFAULT_TEMPLATE
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=prefill,
            add_generation_prompt=reply and not prefill,
            **settings,
        )
    except Exception as e:  # a template may raise whatever it likes
        raise UsageError(
            f"The chat template fails: {first_line(e)}.",
            "Check --chat-template-config, or use --ignore-chat-template.",
        ) from e
    return text


def encode(tokenizer: Any, text: str, special: bool) -> list:
    """Token ids; `special` lets the tokenizer add its begin-of-text token."""
    return list(tokenizer.encode(text, add_special_tokens=special))


def add_end_tokens(tokenizer: Any, tokens: Sequence):
    """Make further tokens (text or id) end a reply.

    Raises:
        UsageError: One of them is not a token.
    """
    for token in tokens:
        known = token.isdigit() and int(token) < len(tokenizer)
        if not (known or token in tokenizer.get_vocab()):
            raise UsageError(
                f"--extra-eos-token {token!r} is not a token of this model's tokenizer.",
                "For text of several tokens use --stop.",
            )
        tokenizer.add_eos_token(token)


@dataclass
class Request:
    """One prompt, ready for the model.

    Attributes:
        text: What the model reads. ids: Of all of it. max_tokens: Longest reply.
        messages: The conversation with this turn; None for plain text.
        stored: The prompt cache file as it was, or None. common: Ids that it begins with alike.
        kept: Of these, what need not be computed again; known once there is a sequence.
        fingerprint: Of the model, once known. keep_points: Whether checkpoints go into the file.
        kv_bits, kv_group_size: As asked, or as the prompt cache has them.
    """

    text: str
    ids: list
    max_tokens: int
    messages: list | None
    stored: Any = None
    common: int = 0
    kept: int = 0
    fingerprint: str = ""
    keep_points: bool = True
    kv_bits: int | tuple | None = None
    kv_group_size: int = 64

    def make_sequence(
        self, model: Any, points: CheckpointOptions, note: Callable, kv_start: int = 0
    ) -> Any:
        """The sequence to start from, of the stored cache or a new one; says what is reused.

        Args:
            points: What is asked for. note: Prints a line.

        Raises:
            CacheError: The stored cache belongs to another model.
            UsageError: Checkpoints or kv_bits that cannot be had.
        """
        from .generation import make_sequence

        old, cache, tokens = self.stored, None, ()
        self.keep_points = points.budget is not None
        if old is not None:
            from .prompt_cache import check_model

            check_model(old, model)
            self.fingerprint = old.fingerprint
            cache, tokens = old.cache, old.tokens
        sequence = make_sequence(
            model,
            cache,
            tokens,
            points.make(model, old and old.checkpoints, cache),
            self.kv_bits,
            self.kv_group_size,
            kv_start,
        )
        self.kept = sequence.keepable(self.ids)
        if old is not None:
            self._tell(note)
        return sequence

    def _tell(self, note: Callable):
        n, rest = len(self.stored.tokens), len(self.ids) - self.kept
        has = f"{self.stored.path} holds {count(n, 'token')}"
        if self.kept == n:
            note(f"{has}; {count(rest, 'token')} to read.")
            return
        if self.common == len(self.ids):
            why = SAME if self.common == n else "the prompt ends before they do"
        else:
            why = f"the prompt differs after {count(self.common, 'token')}"
            if self.messages is not None:
                why += ", as the chat template renders the earlier turns differently"
        if self.kept:
            note(f"{has}, {self.kept:,} of them are reused: {why}. {count(rest, 'token')} to read.")
        else:
            cli.say(f"{has}, 0 of them can be reused: {why}. Reading all {rest:,} again.")

    def save(
        self,
        path: str,
        label: str,
        model: Any,
        tokenizer: Any,
        sequence: Any,
        tokens: list,
        prefill: str,
    ) -> int:
        """Write the prompt cache after a run.

        Args:
            tokens: The reply's ids. prefill: What the reply was made to begin with.

        Returns:
            Tokens in the file; 0 when it is as it was, because nothing was read, or because the
            prompt that was to replace what it holds was broken off.

        Raises:
            CacheError: It cannot be written.
        """
        from .prompt_cache import StoredCache, fingerprint, save_cache

        ids, extends = sequence.tokens, self.stored and self.kept == len(self.stored.tokens)
        broken_off = len(ids) < len(self.ids)
        if len(ids) == self.kept or (broken_off and self.stored and not extends):
            return 0
        messages, open_turn = self.messages, False
        if broken_off:  # this turn has not happened yet
            known = self.stored if extends else None
            text, text_tokens = (known.text, known.text_tokens) if known else ("", 0)
            if messages is not None:
                messages = self.stored.messages if self.stored else []
                open_turn = bool(self.stored and self.stored.open_turn)
        else:
            ended = bool(tokens) and tokens[-1] in tokenizer.eos_token_ids
            # All of it, a stop string too: the conversation is what the model has read.
            said = tokenizer.decode(tokens[:-1] if ended else tokens)
            text = self.text + said + (tokenizer.decode(tokens[-1:]) if ended else "")
            text_tokens = len(ids)
            if messages is not None and self.max_tokens != 0:
                messages = [*messages, {"role": "assistant", "content": prefill + said}]
        mark = self.fingerprint or fingerprint(model)
        stored = StoredCache(sequence.cache, ids, text, text_tokens, messages, mark, label)
        stored.open_turn = open_turn
        if self.keep_points and sequence.keeps_checkpoints:
            stored.checkpoints = sequence.checkpoints
        save_cache(path, stored)
        return len(ids)


def plan(
    args: Any,
    prompt: str,
    chat: ChatOptions,
    tokenizer: Any,
    config: dict,
    note: Callable,
    stored: Any = None,
) -> Request:
    """Render and encode a prompt, match it with the prompt cache, check lengths; no weights yet.

    Args:
        args: Parsed flags of generate. config: The model's config.json. note: Prints a line.
        stored: What open_cache found.

    Raises:
        UsageError, CacheError: The prompt does not fit the file, or --max-context.
    """
    from .kv_cache import in_words, kv_format

    active = chat.active(tokenizer)
    messages = None
    if active:
        history, open_turn = (stored.messages, stored.open_turn) if stored else ((), False)
        messages = chat_messages(prompt, chat, history, open_turn)
        prompt = render(tokenizer, messages, chat, args.max_tokens != 0)
    bos = tokenizer.bos_token
    ids = encode(tokenizer, prompt, not active and not (bos and prompt.startswith(bos)))
    common = 0
    if stored is not None:
        ids, common = stored.match(prompt, ids, lambda rest: encode(tokenizer, rest, False))
        if not active and common < LEAST_SHARE * len(stored.tokens):
            raise UsageError(
                f"{stored.path} holds {count(len(stored.tokens), 'token')}, but the prompt does "
                "not begin with the text they stand for.",
                "Take another file, or --prompt-cache-overwrite to give up what is in it.",
            )
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int) and len(ids) > limit:
        note(f"The prompt has {len(ids):,} tokens, more than the {limit:,} this model is made for.")
    request = Request(prompt, ids, args.max_tokens, messages, stored, common)
    request.max_tokens = fit_context(len(ids), args.max_tokens, args.max_context)
    quantised = [f for f in map(kv_format, stored.cache) if f is not None] if stored else []
    request.kv_bits, request.kv_group_size = args.kv_bits, args.kv_group_size or 64
    if quantised and args.kv_bits is None:
        k_bits, v_bits, request.kv_group_size = quantised[0]
        request.kv_bits = k_bits if k_bits == v_bits else (k_bits, v_bits)
        words = in_words(k_bits, v_bits)
        note(f"{stored.path} holds keys and values in {words} bits; keeping to that.")
    return request


def fit_context(prompt_tokens: int, max_tokens: int, max_context: int | None) -> int:
    """max_tokens within --max-context.

    Raises:
        UsageError: Prompt and reply do not fit.
    """
    if max_context is None:
        return max_tokens
    least = 1 if max_tokens == -1 else max_tokens
    if prompt_tokens + least > max_context:
        ask = "a reply" if max_tokens == -1 else f"--max-tokens {max_tokens}"
        raise UsageError(
            f"The prompt has {prompt_tokens} tokens; with {ask} over --max-context {max_context}.",
            "Shorten the prompt, lower --max-tokens or raise --max-context.",
        )
    return max_context - prompt_tokens if max_tokens == -1 else max_tokens
