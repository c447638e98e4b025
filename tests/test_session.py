"""Sessions: after any undo, regen, edit, load or interrupt the reply is a fresh conversation's."""

import random
from dataclasses import replace

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.checkpoint_options import CheckpointOptions
from hydra_mlx.conversation import Conversation
from hydra_mlx.errors import CacheError, UsageError
from hydra_mlx.generation import make_sequence
from hydra_mlx.prompts import ChatOptions
from hydra_mlx.sequence import make_checkpoints
from hydra_mlx.session import Session
from hydra_mlx.session_file import describe, open_session, save_session
from hydra_mlx.session_plan import How

import pytest

from .conftest import TEMPLATE
from .sequences import difference

SYSTEM = "You answer in capitals, always, whatever is asked."
BUDGET = CheckpointOptions(1 << 24, every=16)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('s')[-1] if m['role'] == 'assistant' else m['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def options(**changes) -> ChatOptions:
    return replace(ChatOptions(system=SYSTEM), **changes)


def start(tiny, kv=None, every=16, budget=1 << 24, chat=None) -> Session:
    model, tokenizer = tiny
    points = make_checkpoints(model, budget, every=every)
    sequence = make_sequence(model, None, (), points, kv, 32)
    return Session(sequence, Conversation(tokenizer, chat or options()))


def say(session: Session, message: str, n: int = 12, **more) -> str:
    return "".join(p.text for p in session.reply(message, How(n), **more))


def ids(session: Session) -> list:
    return session.talk.state().ids


def play(tiny, script: list, **options) -> Session:
    """A conversation of messages and documents (in a tuple) without any turning back."""
    session = start(tiny, **options)
    for step in script:
        session.read(step[0], "file") if isinstance(step, tuple) else say(session, step)
    return session


def same(session: Session, script: list, tiny, **options):
    """The session, and its reply to one more message, are those of a fresh conversation."""
    fresh = play(tiny, script, **options)
    assert ids(session) == ids(fresh)
    assert say(session, "And now?") == say(fresh, "And now?")
    assert ids(session) == ids(fresh) == session.sequence.tokens
    assert difference(session.sequence.cache, fresh.sequence.cache) == 0


# ----------------------------------------------------------------------------- turning back


@pytest.mark.parametrize("kv", [None, (8, 4)], ids=["full", "8,4 bits"])
def test_undo_regen_edit(tiny, kv):
    session = play(tiny, ["One", "Two " * 20, "Three"], kv=kv)
    session.undo()
    same(session, ["One", "Two " * 20], tiny, kv=kv)  # which says one more
    session.undo()
    session.undo()
    assert say(session, "Deux", instead=True) and session.sequence.tokens == ids(session)
    same(session, ["Deux"], tiny, kv=kv)
    again = session.talk.turns[-1]
    assert say(session, again.user, instead=True) == again.reply
    assert session.timings.cached_tokens == session.timings.prompt_tokens - 1
    same(session, ["Deux", "And now?"], tiny, kv=kv)


def test_undo_beyond_every_mark_repeats_calls(tiny):
    """12 turns back: no mark is left, the replies are replayed token by token."""
    words = [f"Message {i}" for i in range(14)]
    session = play(tiny, words, every=64, budget=200_000)
    for _ in range(12):
        session.undo()
    told = []
    assert say(session, "Well", going_back=told.append)
    assert told == [session.replayed] and session.replayed > 12
    fresh = play(tiny, [*words[:2], "Well"], every=64, budget=200_000)
    assert difference(session.sequence.cache, fresh.sequence.cache) == 0
    t = session.timings
    assert t.cached_tokens + t.processed_tokens == t.prompt_tokens
    assert t.cached_tokens == len(session.talk.state(2).ids) - session.replayed


@pytest.mark.parametrize("seed", range(4))
def test_random_walks(tiny, seed):
    """Messages, documents, undo, regen, edit, interrupts, settling: the script that is left."""
    rng, script, session = random.Random(seed), [], start(tiny)
    for _ in range(14):
        what = rng.choice(["say", "say", "read", "undo", "edit", "regen", "settle", "stop"])
        text = "".join(rng.choice("abc \n") for _ in range(rng.choice([1, 5, 40])))
        replied = script and isinstance(script[-1], str)
        if what == "say":
            say(session, text)
            script.append(text)
        elif what == "read" and text.strip():
            assert session.read(text, "file")
            script.append((text,))
        elif what == "undo" and script:
            session.undo()
            script.pop()
        elif what == "edit" and replied:
            say(session, text, instead=True)
            script[-1] = text
        elif what == "regen" and replied:
            say(session, script[-1], instead=True)
        elif what == "settle":
            session.settle()
        elif what == "stop":  # before the first token
            assert say(session, text, should_stop=lambda: True) == "" and session.unsent == text
    fresh = play(tiny, script)
    assert ids(session) == ids(fresh)
    assert say(session, "And now?") == say(fresh, "And now?") and ids(session) == ids(fresh)


def test_the_system_prompt_is_read_once(tiny):
    session = start(tiny)
    say(session, "One")
    for message in ("Two", "Three"):
        say(session, message)
        assert session.timings.processed_tokens < len(SYSTEM)
    session.clear()
    say(session, "One")
    assert session.timings.cached_tokens >= len(SYSTEM) // 16 * 16


def test_another_system_prompt(tiny):
    session = play(tiny, ["One", "Two"])
    say(session, "Three")
    known = session.set_system("Be brief.")
    assert known == len(session.sequence) - session.sequence.keepable(
        session.talk.prompt("Hello").ids
    )
    assert say(session, "Four")
    other = start(tiny, chat=options(system="Be brief."))
    other.talk.turns[:] = [replace(t, kept=None) for t in session.talk.turns[:3]]
    assert say(other, "Four") == session.talk.turns[-1].reply and ids(other) == ids(session)
    session.set_system(None)
    assert "system" not in session.talk.prompt("x").text


# ------------------------------------------------------------------------------ breaking off


@pytest.mark.parametrize("n", [1, 5])
def test_a_reply_broken_off_stays(tiny, n):
    session, said = play(tiny, ["One"]), []
    whole = say(play(tiny, ["One"]), "Two")
    stop = lambda: len(said) >= n  # noqa: E731
    for part in session.reply("Two", How(12), should_stop=stop):
        said += [part.token] if part.token is not None else []
    turn = session.talk.turns[-1]
    assert turn.ended == "interrupt" and turn.reply == whole[:n] and session.unsent is None
    assert ids(session) == session.sequence.tokens
    assert say(session, "Three")
    session.undo()
    assert say(session, "Two", instead=True) == whole
    same(session, ["One", "Two"], tiny)


def test_a_closed_reply_stays_too(tiny):
    session = play(tiny, ["One"])
    stream = session.reply("Two", How(12))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(session.talk.turns[-1].reply) == 3 and ids(session) == session.sequence.tokens
    session.undo()
    same(session, ["One"], tiny)


def test_broken_off_before_the_reply(tiny):
    session, calls = play(tiny, ["One"]), []
    long = "Two " * 30
    assert say(session, long, should_stop=lambda: len(calls) > 4 or calls.append(1)) == ""
    assert session.unsent == long and len(session.talk) == 1
    read = len(session.sequence)
    assert len(ids(session)) < read
    assert say(session, session.unsent)
    assert session.timings.cached_tokens == read // 16 * 16 and session.unsent is None
    same(session, ["One", long], tiny)
    # in the place of a turn that has a reply, that one stays
    before = list(session.talk.turns)
    assert say(session, "Other", instead=True, should_stop=lambda: True) == ""
    assert session.talk.turns == before and session.unsent is None
    assert say(session, "More")


def test_a_document_broken_off(tiny):
    session, calls = start(tiny), []
    text = "A long text. " * 20
    assert session.read(text, "file", should_stop=lambda: len(calls) > 7 or calls.append(1)) == 0
    assert len(session.talk) == 0 and len(session.sequence) > 64
    n = session.read(text, "file")
    assert n == len(ids(session)) == len(session.sequence)
    same(session, [(text,)], tiny)


# ----------------------------------------------------------------------------------- documents


def test_documents_before_a_message(tiny):
    session = play(tiny, [("First text.",), ("Second text.\n",)])
    assert session.talk.document() == "First text.\n\nSecond text.\n"
    say(session, "Which?")
    assert session.timings.processed_tokens < 25  # both documents were read
    sent = session.talk.messages()[1]["content"]
    assert sent == "First text.\n\nSecond text.\n\nWhich?"
    session.undo()
    session.undo()
    same(session, [("First text.",)], tiny)
    with pytest.raises(UsageError, match="is empty"):
        session.read(" \n", "file")
    with pytest.raises(UsageError, match="no reply yet"):
        play(tiny, [("Text",)]).reply("x", How(4), instead=True)


def test_limits(tiny):
    session = start(tiny)
    room = len(session.talk.prompt("One").ids)
    assert "".join(p.text for p in session.reply("One", How(99, max_context=room + 3)))
    assert len(session.talk.turns[-1].reply) == 3 and len(ids(session)) == room + 3
    with pytest.raises(UsageError, match=f"the limit is {room + 3}"):
        session.reply("Two", How(9, max_context=room + 3))
    with pytest.raises(UsageError, match="context is full"):
        session.read("Text " * 99, "file", room + 99)
    assert len(session.talk) == 1 and say(session, "Two")


# -------------------------------------------------------------------------------- other templates


def test_a_template_that_forgets_the_thinking(tiny, make_model_dir, tmp_path):
    """What the model read is not what it reads later; each state is as it was all the same."""
    model, tokenizer = hydra_mlx.load(make_model_dir(seed=0))
    old, tokenizer.chat_template = tokenizer.chat_template, THINKS
    try:
        thinks = (model, tokenizer)
        words = ["One", "Two", "Three"]
        session = play(thinks, words)
        assert any("s" in t.reply for t in session.talk.turns[:2])
        assert any(
            t.kept[1] < len(session.talk.state(i).ids) for i, t in enumerate(session.talk.turns)
        )
        session.undo()
        assert ids(session) == ids(play(thinks, words[:2]))
        save_session(tmp_path / "s", session, "it")
        other = open_session(tmp_path / "s", model, tokenizer, options(), BUDGET)
        assert other.talk.turns == session.talk.turns
        expected = say(play(thinks, words[:2]), "Four")
        assert say(session, "Four") == say(other, "Four") == expected
    finally:
        tokenizer.chat_template = old


def test_without_checkpoints_or_template(tiny, make_model_dir):
    session = play(tiny, ["One", "Two"], budget=None)
    session.undo()
    assert say(session, "Three") == say(play(tiny, ["One"], budget=None), "Three")
    assert session.timings.cached_tokens == 0
    plain = hydra_mlx.load(make_model_dir(template=False))
    with pytest.raises(UsageError, match="no chat template"):
        start(plain, chat=ChatOptions())
    assert TEMPLATE and say(start(plain, chat=ChatOptions(default_template=True)), "One")


# -------------------------------------------------------------------------------------------- files


def reopen(tiny, path, **more) -> Session:
    return open_session(path, *tiny, more.pop("chat", options(system=None)), BUDGET, **more)


@pytest.mark.parametrize("kv", [None, (8, 4)], ids=["full", "8,4 bits"])
def test_save_and_load(tiny, tmp_path, kv):
    script = [("A text.",), "One", "Two"]
    session, path = play(tiny, script, kv=kv), tmp_path / "talk.safetensors"
    assert save_session(path, session, "it") == len(ids(session)) and not session.changed
    other = reopen(tiny, path)
    assert other.talk.turns == session.talk.turns and other.talk.options.system == SYSTEM
    assert describe(other).endswith("2 turns, 1 document")
    assert difference(other.sequence.cache, session.sequence.cache) == 0
    same(other, script, tiny, kv=kv)
    assert other.timings.processed_tokens < 50
    for n in (2, 1):
        other = reopen(tiny, path)
        for _ in range(3 - n):
            other.undo()
        same(other, script[:n], tiny, kv=kv)


def test_a_file_holds_the_conversation_and_no_more(tiny, tmp_path):
    """Turns that were taken back, or read for nothing, are not in it."""
    session, path = play(tiny, ["One", "Two", "Three"]), tmp_path / "talk"
    session.undo()
    say(session, "Never", should_stop=lambda: True)
    assert save_session(path, session, "it") == len(ids(session)) == len(session.sequence)
    same(reopen(tiny, path), ["One", "Two"], tiny)
    with pytest.raises(UsageError, match="nothing to save"):
        save_session(path, start(tiny), "it")
    assert path.is_file()


def test_files_of_other_programs(tiny, tiny_model_dir, program, tmp_path):
    model = ("--model", tiny_model_dir)
    path, text = tmp_path / "c.safetensors", tmp_path / "t.txt"
    argv = ("--prompt-cache", path, "-m", 12, "--system-prompt", SYSTEM)
    assert program("generate", "One", *argv)[0] == 0
    assert program("generate", "Two", *argv[:4])[0] == 0
    session = reopen(tiny, path)
    fresh = play(tiny, ["One", "Two"])
    assert [t.reply for t in session.talk.turns] == [t.reply for t in fresh.talk.turns]
    assert say(session, "And now?") == say(fresh, "And now?")
    assert session.timings.processed_tokens < 50
    session.undo()
    session.undo()
    assert say(session, "Zwei") == say(play(tiny, ["One"]), "Zwei")

    text.write_text("A long text. " * 20)
    assert program("cache", "read", text, *model, "--out", tmp_path / "d", model=False)[0] == 0
    session = reopen(tiny, tmp_path / "d")
    held = len(session.sequence)
    assert session.talk.turns[0].reply is None and held == len(ids(session)) > 260
    assert say(session, "What?") == say(
        play(tiny, [(text.read_text(),)], chat=ChatOptions()), "What?"
    )
    assert session.timings.cached_tokens == held
    save_session(tmp_path / "e", session, "it")
    result = program("generate", "More?", "--prompt-cache", tmp_path / "e", "-m", 12)
    assert result[0] == 0 and result[1].strip() == say(session, "More?").strip()


def test_files_that_do_not_fit(tiny, program, make_model_dir, tmp_path):
    path = tmp_path / "talk"
    save_session(path, play(tiny, ["One"]), "it")
    with pytest.raises(CacheError, match="belongs to another model"):
        reopen(hydra_mlx.load(make_model_dir(seed=1)), path)
    with pytest.raises(UsageError, match="--system-prompt differs"):
        reopen(tiny, path, chat=options(system="Other."))
    with pytest.raises(UsageError, match="kv-bits"):
        save_session(tmp_path / "q", play(tiny, ["One"], kv=(8, 4)), "it")
        reopen(tiny, tmp_path / "q", kv_bits=4, kv_group_size=32)
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100])
    with pytest.raises(CacheError, match="damaged or incomplete"):
        reopen(tiny, tmp_path / "cut")
    assert (
        program("generate", "x", "--ignore-chat-template", "--prompt-cache", tmp_path / "p")[0] == 0
    )
    with pytest.raises(UsageError, match="plain text, not a conversation"):
        reopen(tiny, tmp_path / "p")
