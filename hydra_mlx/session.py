"""A conversation and the model that has read it: replies, documents, and the way back.

The conversation is what counts. What the model has read, a CachedSequence, follows it when the next
thing is read, so taking turns back costs nothing at once, and whatever breaks off a reply leaves
both right:

- A reply broken off after its first token stays, as far as it went, as the reply of its turn.
- One broken off before that leaves the conversation as it was. The message is kept as `unsent`, and
  the tokens that were read are not read again if it is sent once more.

Going back is exact: the calls after the nearest checkpoint are repeated as they were, and what
comes next is what it would be had the turns that were taken back never been.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from . import cache as caches
from .config import is_hydra
from .conversation import Conversation, Read, Turn
from .errors import UsageError
from .generation import PREFILL_STEP, REPLY_ROOM, Part, stream_generate
from .rollback import common_prefix
from .sequence import CachedSequence
from .session_plan import How, Size, fit_context, fit_memory


class Session:
    """A conversation with a model.

    session = Session(sequence, Conversation(tokenizer, ChatOptions(system="Be brief.")))
    for part in session.reply("Hello", How(max_tokens=100)):
        print(part.text, end="")
    session.undo()

    Attributes:
        sequence: What the model has read; it may be ahead of the conversation or behind it.
        talk: The Conversation. unsent: A message whose reply was broken off before it began.
        timings: Of the last reply. replayed: Tokens that were computed again to go back for it.
        changed: Whether there is something to save.
    """

    def __init__(
        self,
        sequence: CachedSequence,
        talk: Conversation,
        step: int | None = None,
        note: Callable | None = None,
    ):
        """Begin a conversation, or go on with one.

        Args:
            step: Tokens of a prefill call at most; None as in stream_generate.
            note: Prints a line on what a long prompt takes in memory.
        """
        if step is None and not sequence.keeps_checkpoints:
            step = PREFILL_STEP
        self.sequence, self.talk, self.step = sequence, talk, step
        self.note = note or (lambda line: None)
        self.unsent: str | None = None
        self.timings, self.replayed, self.changed = None, 0, False

    @property
    def model(self) -> Any:
        """The model."""
        return self.sequence.model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.talk.tokenizer

    def size(self) -> Size:
        """What it takes now."""
        kv, state = caches.cache_bytes(self.sequence.cache)
        points = self.sequence.checkpoints
        return Size(len(self.talk.state().ids), kv, state, len(points.held), points.nbytes)

    # ---------------------------------------------------------------------------------- replies

    def reply(
        self,
        message: str,
        how: How,
        instead: bool = False,
        progress: Callable | None = None,
        should_stop: Callable | None = None,
        going_back: Callable | None = None,
    ) -> Iterator[Part]:
        """Send a message; yields the parts of the reply. The turn is there when the iterator ends.

        Args:
            instead: In the place of the last turn, which stays if there is no reply.
            progress: Called with (tokens read, to read). should_stop: True ends the reply.
            going_back: Called with the tokens that are to be computed again, before they are.

        Raises:
            UsageError: At once: the conversation is too long, there is no turn to replace, or the
                template fails.
        """
        n = len(self.talk)
        if instead:
            self.last_reply()
            n -= 1
        before, after = self.talk.state(n), self.talk.prompt(message, n)
        most = fit_context(len(after.ids), how.max_tokens, how.max_context)
        fit_memory(self.sequence, after.ids, most, self.step, self.note)
        return self._reply(message, how, n, before, after, most, progress, should_stop, going_back)

    def _reply(self, message, how, n, before, after, most, progress, should_stop, going_back):
        tokens, part, whole = [], None, False
        try:
            self.replayed = self._go_back(after.ids, before, going_back)
            for part in stream_generate(
                self.model,
                self.tokenizer,
                after.ids,
                max_tokens=most,
                sampler=how.sampler,
                logits_processors=list(how.processors),
                prefill_step_size=self.step,
                stop=how.stop,
                progress=progress,
                should_stop=should_stop,
                sequence=self.sequence,
                drafts=how.drafts,
                law=how.law,
            ):
                if part.token is not None:
                    tokens.append(part.token)
                if part.timings is not None:
                    self.timings = self._told(part.timings)
                    whole = True
                yield part
        finally:
            self.changed = True
            if tokens:
                ended = part.finish_reason if whole else "interrupt"
                said, read = self.talk.replied(after, tokens)
                turn = Turn(message, said, ended=ended).of(before, read)
                self.talk.turns[n:] = [turn]
                self.unsent = None
            elif n == len(self.talk):
                self.unsent = message

    def _told(self, timings: Any) -> Any:
        """Timings in which what was computed again counts as such."""
        again = min(self.replayed, timings.cached_tokens)
        return replace(
            timings,
            cached_tokens=timings.cached_tokens - again,
            processed_tokens=timings.processed_tokens + again,
        )

    def last_reply(self) -> Turn:
        """The last turn.

        Raises:
            UsageError: There is none, or it is a document.
        """
        if not self.talk.turns:
            raise UsageError("There is no message yet.", "Type one.")
        last = self.talk.turns[-1]
        if last.reply is None:
            raise UsageError(
                f"The last thing in the conversation is {last.source or 'a document'}, which has "
                "no reply yet.",
                "Ask something about it, or take it back with /undo.",
            )
        return last

    # -------------------------------------------------------------------------------- documents

    def read(
        self,
        document: str,
        source: str,
        max_context: int | None = None,
        progress: Callable | None = None,
        should_stop: Callable | None = None,
    ) -> int:
        """Read a document, with which the next message begins.

        Args:
            source: What it is, in words. Others: as in reply.

        Returns:
            Tokens it has; 0 if stopped: the conversation is as it was then, and what was read is
            not read again.

        Raises:
            UsageError: It is empty or too long, or the template fails.
        """
        if not document.strip():
            raise UsageError(f"{source} is empty.", "Give a file with text in it.")
        before = self.talk.state()
        after = self.talk.opened(document)
        fit_context(len(after.ids), -1, max_context)
        fit_memory(self.sequence, after.ids, -1, self.step, self.note)
        self._go_back(after.ids, before, None)
        if not self._follow(after.ids, progress, should_stop):
            return 0
        self.talk.turns.append(Turn(document, None, source).of(before, after))
        self.unsent, self.changed = None, True
        return len(after.ids) - len(before.ids)

    # --------------------------------------------------------------------------------- the way back

    def undo(self) -> Turn:
        """Take the last turn or document back; nothing is computed.

        Raises:
            UsageError: There is none.
        """
        if not self.talk.turns:
            raise UsageError("There is nothing to take back.")
        self.changed = True
        return self.talk.turns.pop()

    def clear(self):
        """Forget all turns; the system prompt stays."""
        self.talk.turns.clear()
        self.unsent, self.changed, self.timings = None, False, None

    def set_system(self, system: str | None) -> int:
        """Change the system prompt; None removes it.

        Returns:
            Tokens that the next message will have to read again.

        Raises:
            UsageError: The template does not take it.
        """
        talk = self.talk.with_system(system)
        if not talk.turns:
            self.talk = talk
            return 0
        ids = talk.prompt("Hello").ids
        self.talk, self.changed = talk, True
        return len(self.sequence) - self.sequence.keepable(ids)

    def settle(self, progress: Callable | None = None, should_stop: Callable | None = None) -> Read:
        """Have the model hold the conversation and nothing else, as a file should.

        Returns:
            What it has read.

        Raises:
            UsageError: It was stopped.
        """
        state = self.talk.state()
        ids, sequence = state.ids, self.sequence
        sequence.mend()
        if ids and ids == sequence.tokens[: len(ids)] and self._goes_back():
            sequence.back_to(len(ids))
        elif ids != sequence.tokens and not self._follow(ids, progress, should_stop):
            raise UsageError("Stopped before all was read that is to be saved; nothing is written.")
        return state

    def _goes_back(self) -> bool:
        return not self.sequence.obstacle and self.sequence.keeps_checkpoints

    def _go_back(self, ids: list, before: Read, tell: Callable | None) -> int:
        """To the end of the turn before, where reuse alone would have to go further.

        Reading on from an earlier checkpoint would give the same up to rounding; repeating the
        calls gives the same.

        Returns:
            Tokens that were computed again.
        """
        sequence, end = self.sequence, len(before.ids)
        sequence.mend()
        if not self._goes_back() or not sequence.keepable(ids) < end < len(sequence):
            return 0
        if common_prefix(ids, sequence.tokens) < end:
            return 0
        point = sequence.checkpoints.nearest(end)
        if tell is not None:
            tell(end - (point.position if point else 0))
        return sequence.back_to(end)

    def _follow(self, ids: list, progress: Callable | None, should_stop: Callable | None) -> bool:
        """Read what is missing of some ids; False if stopped."""
        sequence = self.sequence
        rest = ids[sequence.fit(ids) :]
        if is_hydra(self.model):
            caches.own_cache(sequence.cache, len(ids) + REPLY_ROOM)
        return sequence.read(rest, self.step, progress, should_stop, mark=True) == len(rest)
