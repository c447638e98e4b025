"""Replies that are decoded together, and those that are decoded alone.

Rows of a batch are padded to the longest, and are copied when they join and leave. So only rows of
like lengths share a batch, and a row whose keys and values weigh as much as the model is decoded
alone, in place: together they could save less than half of what a token reads.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream

from .batch import Batch
from .server_job import Job
from .server_memory import SHORT


def fits(lengths: Sequence, new: int) -> bool:
    """Whether a row of `new` tokens may join rows of these lengths.

    Then no row is ever padded to more than twice its tokens, or SHORT more: all grow alike.
    """
    both = [*lengths, new]
    return max(both) <= max(SHORT, 2 * min(both))


class Together:
    """A batch of replies.

    Attributes:
        jobs: In the order of its rows.
    """

    def __init__(self, model: Any):
        self.jobs: list = []
        self._batch, self._started = Batch(model), set()
        self._y = mx.zeros((0,), mx.int32)  # what each row reads next, lazy

    def takes(self, job: Job) -> bool:
        """Whether a job may join."""
        lengths = [len(j.ids) + j.count for j in self.jobs]
        return fits(lengths, len(job.ids))

    def join(self, job: Job):
        """Have a job whose prompt is read but for its last token."""
        self._batch.put([job.sequence])
        self.jobs.append(job)
        self._y = mx.concatenate([self._y, mx.array(job.ids[-1:], mx.int32)])

    def leave(self, jobs: Sequence):
        """Let jobs go; their sequences hold what they have read."""
        self._batch.take([j.sequence for j in jobs])
        stay = [i for i, j in enumerate(self.jobs) if j not in jobs]
        self._started -= {id(j) for j in jobs}
        self.jobs = [self.jobs[i] for i in stay]
        self._y = self._y[mx.array(stay, mx.int32)] if stay else mx.zeros((0,), mx.int32)

    def show(self, job: Job, look: Callable):
        """Have look(job) while its sequence is its own; then it goes on."""
        i = self.jobs.index(job)
        order = [*(k for k in range(len(self.jobs)) if k != i), i]
        self._batch.take([job.sequence])
        try:
            look(job)
        finally:
            self._batch.put([job.sequence])
            self.jobs = [self.jobs[k] for k in order]
            self._y = self._y[mx.array(order, mx.int32)]

    def step(self, heard: Callable):
        """One token for each; heard(job, token) -> whether that was its last."""
        y = self._y
        following = self._choose(self._batch.step(y), y)
        over = []
        # Only now: every row has read its token, so a reply that ends holds it.
        for job, token in zip(self.jobs, y.tolist(), strict=True):
            if id(job) not in self._started:
                self._started.add(id(job))  # the last of its prompt
            elif heard(job, token):
                over.append(job)
        self._y = following
        if over:
            self.leave(over)

    def _choose(self, logits: mx.array, y: mx.array) -> mx.array:
        with mx.stream(generation_stream):
            found = mx.argmax(logits, axis=-1).astype(mx.int32)
            if not all(job.pick.plain for job in self.jobs):
                found = mx.concatenate(
                    [
                        found[i : i + 1]
                        if job.pick.plain
                        else job.pick.read(y[i : i + 1], logits[i : i + 1]).astype(mx.int32)
                        for i, job in enumerate(self.jobs)
                    ]
                )
            mx.async_eval(found)
        return found


class Alone:
    """One reply, decoded in its own cache."""

    def __init__(self, job: Job):
        self.jobs = [job]
        self._tokens = self._from(job.ids[-1])

    def _from(self, token: int) -> Iterator[int]:
        job = self.jobs[0]
        left = job.max_tokens - job.count
        return job.sequence.generate([token], left, job.pick, job.pick.processors)

    def takes(self, job: Job) -> bool:
        """Nobody joins."""
        return False

    def leave(self, jobs: Sequence):
        """End the reply; the sequence holds what was told."""
        self._tokens.close()
        self.jobs = []

    def show(self, job: Job, look: Callable):
        """Have look(job) while its sequence is at rest; then it goes on."""
        self._tokens.close()
        look(job)
        sequence = job.sequence
        if len(sequence) < len(job.ids):  # not begun
            self._tokens = self._from(job.ids[-1])
            return
        last = sequence.tokens[-1]
        sequence.back_to(len(sequence) - 1)
        job.pick.rewind(job.count)
        self._tokens = self._from(last)

    def step(self, heard: Callable):
        """One token; heard(job, token) -> whether that was its last."""
        token = next(self._tokens, None)
        if token is None or heard(self.jobs[0], token):
            self.leave(self.jobs)
