"""Sessions in files: a prompt cache file that also says how the conversation came about.

Whatever reads prompt cache files reads these, and a document from `cache read` or a conversation
from `generate --prompt-cache` opens as a session; only the ids of their earlier turns are unknown.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .checkpoint_options import CheckpointOptions
from .conversation import Conversation, Turn
from .errors import CacheError, UsageError
from .generation import make_sequence
from .kv_cache import kv_format
from .prompt_cache import StoredCache, check_model, fingerprint, load_cache, save_cache
from .prompts import ChatOptions
from .session import Session
from .text import count

CANNOT = "Take another file; the conversation here is as it was."


def save_session(
    path: Path,
    session: Session,
    label: str,
    progress: Callable | None = None,
    should_stop: Callable | None = None,
) -> int:
    """Write a session; an older file is replaced only when the new one is whole.

    Args:
        label: The model in words. progress: Called with (tokens read, to read) where the model has
            to read something first, after turns were taken back. should_stop: True stops that.

    Returns:
        Tokens in the file.

    Raises:
        UsageError: There is nothing to save, or it was stopped. CacheError: It cannot be written.
    """
    talk = session.talk
    if not talk.turns:
        raise UsageError("There is nothing to save yet.")
    text, ids = session.settle(progress, should_stop)
    messages, document = talk.messages(), talk.document()
    if document:
        messages.append({"role": "user", "content": document})
    sequence, mark = session.sequence, fingerprint(session.model)
    stored = StoredCache(sequence.cache, ids, text, len(ids), messages, mark, label)
    stored.open_turn = bool(document)
    stored.checkpoints = sequence.checkpoints if sequence.keeps_checkpoints else None
    stored.session = _pack(talk, text, ids)
    save_cache(path, stored)
    session.changed = False
    return len(ids)


def open_session(
    path: Path,
    model: Any,
    tokenizer: Any,
    chat: ChatOptions,
    points: CheckpointOptions,
    kv_bits: int | tuple | None = None,
    kv_group_size: int = 64,
    step: int | None = None,
) -> Session:
    """Go on with a session.

    Args:
        chat: Its system prompt is the file's unless it is given. points, kv_bits, kv_group_size:
            As asked, or as the file has them. step: As in Session.

    Raises:
        CacheError: The file is damaged or of another model. UsageError: It holds no conversation,
            or one that contradicts what is asked.
    """
    stored = load_cache(path)
    if stored.messages is None:
        raise UsageError(
            f"{path} holds plain text, not a conversation.", "`hydra-mlx generate` goes on with it."
        )
    check_model(stored, model)
    system, turns = _unpack(stored)
    if chat.system is not None and system != chat.system and stored.tokens:
        raise UsageError(
            "--system-prompt differs from the one of the conversation in the file.",
            "Leave it out, and change it with /system.",
        )
    found = next((f for f in map(kv_format, stored.cache) if f is not None), None)
    if found is not None and kv_bits is None:
        kv_bits, kv_group_size = (found[:2] if found[0] != found[1] else found[0]), found[2]
    talk = Conversation(tokenizer, replace(chat, system=system), turns)
    sequence = make_sequence(
        model,
        stored.cache,
        stored.tokens,
        points.make(model, stored.checkpoints, stored.cache),
        kv_bits,
        kv_group_size,
    )
    return Session(sequence, talk, step)


def describe(session: Session) -> str:
    """What was opened, one line."""
    n = sum(t.reply is not None for t in session.talk.turns)
    documents = sum(t.reply is None for t in session.talk.turns)
    parts = [count(len(session.sequence), "token"), count(n, "turn")]
    return ", ".join([*parts, count(documents, "document")] if documents else parts)


def _pack(talk: Conversation, text: str, ids: list) -> dict:
    """The turns; what they share with the end of the conversation is only counted."""
    turns = []
    for t in talk.turns:
        entry = asdict(t)
        a, b = t.kept or (0, 0)
        entry["text"] = len(t.text) if text[a : a + len(t.text)] == t.text else t.text
        entry["ids"] = len(t.ids) if tuple(ids[b : b + len(t.ids)]) == t.ids else list(t.ids)
        turns.append(entry)
    return {"system": talk.options.system, "turns": turns}


def _unpack(stored: StoredCache) -> tuple:
    """(system prompt, turns)."""
    try:
        if stored.session is None:
            return _from_messages(stored)
        text, ids = stored.text, stored.tokens
        turns = []
        for entry in stored.session["turns"]:
            kept = entry["kept"] and tuple(entry["kept"])
            a, b = kept or (0, 0)
            said, own = entry["text"], entry["ids"]
            said = text[a : a + said] if isinstance(said, int) else said
            own = tuple(ids[b : b + own] if isinstance(own, int) else own)
            turns.append(Turn(**{**entry, "kept": kept, "text": said, "ids": own}))
        return stored.session["system"], turns
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise CacheError(f"{stored.path} holds a conversation of another kind.", CANNOT) from e


def _from_messages(stored: StoredCache) -> tuple:
    """A conversation of which only the last state is known."""
    messages = [(m["role"], m["content"]) for m in stored.messages]
    system = messages.pop(0)[1] if messages and messages[0][0] == "system" else None
    turns = []
    for i, (role, content) in enumerate(messages):
        if role != ("user", "assistant")[i % 2]:
            raise CacheError(f"{stored.path} has a message of the {role}, out of turn.", CANNOT)
        if role == "user":
            turns.append(Turn(content, None, str(stored.path.name)))
        else:
            turns[-1] = replace(turns[-1], reply=content, source="")
    if turns and turns[-1].reply is None and not stored.open_turn:
        raise CacheError(f"{stored.path} ends with a message that has no reply.", CANNOT)
    if turns:
        ids = tuple(stored.tokens[: stored.text_tokens])
        turns[-1] = replace(turns[-1], kept=(0, 0), text=stored.text, ids=ids)
    return system, turns
