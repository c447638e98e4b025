"""The one thread that owns the model: admission, prompts in steps, replies in between.

Between two calls for prompts every reply under way gets a token, so a long prompt delays the
others by one prefill step a token; prompts take turns too. Where a prompt begins as another that
is being read, it waits and goes on from there: a document is read once, however many ask about it.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import cli
from .cache import own_cache
from .config import is_hydra
from .generation import REPLY_ROOM
from .rollback import common_prefix
from .sequence import NEVER
from .server_fields import ApiError
from .server_job import Job, Limits, Progress
from .server_memory import Memory
from .server_pool import Pool
from .server_prompt import Prompt
from .server_request import Ask
from .server_rows import Alone, Together
from .text import first_line

SHARED = 64  # tokens more than are known already: worth waiting for
CLEAR = 256  # steps between returns of MLX's free buffers


class Engine:
    """Serves requests with one model.

    engine = Engine(model, tokenizer, pool, memory)
    job = engine.submit(prompt, ask)           # from any thread; then read job.events
    engine.stop()

    Attributes:
        pool: Sequences at rest. used: Bytes set aside for requests at work.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pool: Pool,
        memory: Memory,
        limits: Limits | None = None,
        log: Callable = cli.say,
    ):
        self.model, self.tokenizer, self.pool, self.memory = model, tokenizer, pool, memory
        self.limits, self.log = limits or Limits(), log
        self.used = self._steps = 0
        self._waiting: deque = deque()
        self._reading: deque = deque()
        self._groups: list = []
        self._news = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------- from other threads

    def submit(self, prompt: Prompt, ask: Ask) -> Job:
        """Let a request wait for its turn.

        Raises:
            ApiError: It cannot fit, too many are waiting, or the server stops.
        """
        room = self.memory.reply_room(len(prompt.ids), ask.max_tokens, self.limits.max_tokens)
        job = Job(prompt.ids, prompt.marks, ask.options, room, ask.stop, ask.top_logprobs)
        job.nbytes = self.memory.needs(len(job.ids) + room)
        with self._news:
            if self._stopped or not self._thread.is_alive():
                raise ApiError(503, "The server is stopping.", "stopping", kind="server_error")
            if len(self._waiting) >= self.limits.waiting:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} requests are waiting already; try again later.",
                    "rate_limit_exceeded",
                    kind="rate_limit_error",
                )
            self._waiting.append(job)
            self._news.notify()
        return job

    @property
    def healthy(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._stopped

    def figures(self) -> dict:
        """What is going on, for /stats."""
        return {
            "running": len(self._reading) + sum(len(g.jobs) for g in list(self._groups)),
            "waiting": len(self._waiting),
            "cached_sequences": len(self.pool),
            "cached_bytes": self.pool.nbytes,
            "evicted_sequences": self.pool.evicted,
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }

    def stop(self):
        """End all replies and the thread."""
        with self._news:
            self._stopped = True
            self._news.notify()
        self._thread.join()

    # -------------------------------------------------------------------------- the thread

    def _run(self):
        while True:
            with self._news:
                while not (self._stopped or self._waiting or self._reading or self._groups):
                    self._news.wait()
                if self._stopped:
                    break
            self._guarded(None, self._turn)
        error = ApiError(503, "The server is stopping.", "stopping", kind="server_error")
        for job in self._all():
            job.events.put(error)
        for group in self._groups:  # in this thread, whose streams they use
            self._guarded([], lambda group=group: group.leave(list(group.jobs)))
        self._groups = []
        mx.synchronize()
        mx.clear_streams()

    def _turn(self):
        self._drop_cancelled()
        self._admit()
        self._decode()
        self._read()

    def _all(self) -> list:
        return [*self._waiting, *self._reading, *(j for g in self._groups for j in g.jobs)]

    def _drop_cancelled(self):
        with self._news:
            self._waiting = deque(j for j in self._waiting if not j.cancelled.is_set())
        for job in [j for j in self._reading if j.cancelled.is_set()]:
            self._reading.remove(job)
            self._guarded([job], lambda job=job: self._finish(job))
        for group in list(self._groups):
            gone = [j for j in group.jobs if j.cancelled.is_set()]
            if gone:
                self._in_group(group, lambda group=group, gone=gone: group.leave(gone))

    def _admit(self):
        """Begin what may begin, in the order of arrival."""
        for job in list(self._waiting):
            at_work = len(self._reading) + sum(len(g.jobs) for g in self._groups)
            room = self.memory.room
            if at_work >= self.limits.rows or (
                room is not None and self.used + job.nbytes > room and self.used
            ):
                return
            if self._others_read_it(job):
                continue
            with self._news:
                self._waiting.remove(job)
            self.used, job.admitted, job.leader = self.used + job.nbytes, True, None
            self._reading.append(job)
            self._guarded([job], lambda job=job: self._begin(job))

    def _others_read_it(self, job: Job) -> bool:
        """Whether to wait for a prompt being read; what a reply under way has read is shared."""
        if not self.pool.limit:
            return False
        if job.leader in self._reading:
            return True
        known = self.pool.match(job.ids)[1]
        for other in self._reading:
            points, n = other.sequence.checkpoints, common_prefix(other.ids, job.ids)
            N, ends = points.grid.every, (*other.marks, len(other.ids) - 1)
            ends = [*(m for m in ends if m <= n), 0 if N == NEVER else n // N * N]
            if max(ends) >= known + SHARED:
                job.leader = other
                return True
        for group in self._groups:
            for other in group.jobs:
                n = min(common_prefix(other.ids, job.ids), len(job.ids) - 1)
                point = other.sequence.checkpoints.nearest(n)
                if point is not None and point.position >= known + SHARED:
                    self._in_group(group, lambda g=group, o=other: g.show(o, self._keep))
                    return False
        return False

    def _keep(self, job: Job):
        job.links = self.pool.put(job.sequence, job.links)
        self._make_room()

    def _make_room(self):
        room = self.memory.room
        self.pool.trim(self.pool.limit if room is None else max(0, room - self.used))

    def _begin(self, job: Job):
        n, room = len(job.ids), self.memory.room
        rows = n + (min(job.max_tokens, REPLY_ROOM) if self._solo(job) else 0)
        spare = None if room is None else max(0, room - self.used)
        job.sequence, job.links = self.pool.take(job.ids, rows, spare)
        job.cached = len(job.sequence)
        if is_hydra(self.model):
            own_cache(job.sequence.cache, rows)
        job.begin(self.tokenizer)
        job.events.put(Progress(job.cached, n))

    def _solo(self, job: Job) -> bool:
        return self.memory.solo(len(job.ids) + job.max_tokens)

    def _read(self):
        """One call for the next prompt."""
        if not self._reading:
            return
        job = self._reading[0]
        self._reading.rotate(-1)
        self._guarded([job], lambda: self._read_some(job))

    def _read_some(self, job: Job):
        sequence, n = job.sequence, len(job.ids)
        at = len(sequence)
        if at < n - 1:
            to = next(m for m in (*job.marks, n - 1) if at < m)
            stops = iter((False,))
            sequence.read(
                job.ids[at : min(to, n - 1)],
                self.limits.step,
                should_stop=lambda: next(stops, True),
                mark=True,
            )
            job.events.put(Progress(len(sequence), n))
        if len(sequence) == n - 1:
            self._reading.remove(job)
            group = next((g for g in self._groups if g.takes(job)), None)
            if self._solo(job):
                self._groups.append(Alone(job))
            elif group is None:
                self._groups.append(Together(self.model))
                self._groups[-1].join(job)
            else:
                group.join(job)

    def _decode(self):
        for group in list(self._groups):
            self._in_group(group, lambda group=group: group.step(self._heard))
        self._steps += 1
        if self._steps % CLEAR == 0:
            mx.clear_cache()

    def _heard(self, job: Job, token: int) -> bool:
        return job.hear(token, self.tokenizer.eos_token_ids)

    def _in_group(self, group: Any, work: Callable):
        """Do something with a group; whoever has left it then is done."""
        before = list(group.jobs)
        if self._guarded(before, work):
            for job in before:
                if job not in group.jobs:
                    self._guarded([job], lambda job=job: self._finish(job))
        if not group.jobs and group in self._groups:
            self._groups.remove(group)

    def _finish(self, job: Job):
        sequence, job.sequence = job.sequence, None
        if sequence is not None:
            self.pool.put(sequence, job.links, release=True)
        self._release(job)
        self._make_room()

    def _release(self, job: Job):
        self.used -= job.nbytes if job.admitted else 0
        job.admitted = False

    def _guarded(self, jobs: list | None, work: Callable) -> bool:
        """Whether a piece of work succeeded; if not, its requests fail and the server goes on.

        Args:
            jobs: Whose work it is; None: of all.
        """
        try:
            work()
            return True
        except Exception as e:
            self.log(f"error: {type(e).__name__}: {first_line(e)}")
            error = ApiError(500, f"It failed: {first_line(e)}.", "failed", kind="server_error")
            jobs = self._all() if jobs is None else jobs
            failed = {id(j) for j in jobs}
            for job in jobs:
                job.events.put(error)
                self._release(job)
                job.sequence = None
            with self._news:
                self._waiting = deque(j for j in self._waiting if id(j) not in failed)
            self._reading = deque(j for j in self._reading if id(j) not in failed)
            self._groups = [g for g in self._groups if not failed & {id(j) for j in g.jobs}]
            mx.clear_cache()
            return False
