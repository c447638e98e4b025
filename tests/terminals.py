"""Programs in pseudo-terminals of their own, started by a fork so that each is there at once."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

# A child that has imported everything but has not touched MLX's threads; each line names a
# terminal, arguments and variables for one chat, which gets a session and the terminal to itself.
SERVER = """
import fcntl, json, os, signal, sys, termios, time
import hydra_mlx, mlx_lm.generate
from hydra_mlx import cache_write, chat, chat_loop, drafts, generate, loading, session_file
try:
    import prompt_toolkit.shortcuts
except ImportError:
    pass
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        # As a terminal's shell has it; a job in the background ignores it, and so do its children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fd = os.open(order["terminal"], os.O_RDWR)
        fcntl.ioctl(fd, termios.TIOCSCTTY, 0)
        for n in (0, 1, 2):
            os.dup2(fd, n)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", closefd=False, buffering=1)
        sys.stderr = open(2, "w", closefd=False, buffering=1)
        os.environ.update(order["env"])
        for name in order["without"]:
            sys.modules[name] = None
        if order["slow"]:
            write = cache_write._data
            def slow(x):
                time.sleep(order["slow"])
                return write(x)
            cache_write._data = slow
        code = chat.main(order["argv"])
        sys.stdout.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[()][A-Z0-9]|[=>])|\r")
WAIT = 30
PROMPT = b"\x1b[?2004h"


class Terminals:
    """Starts chats one after the other."""

    def __init__(self):
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TERM": "xterm"}
        env.pop("NO_COLOR", None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], **pipes, text=True, env=env, stderr=subprocess.DEVNULL
        )
        self.last = None
        assert self.server.stdout.readline() == "ready\n"

    def start(
        self, *argv, env: dict | None = None, without: tuple = (), slow: float = 0
    ) -> "Terminal":
        """A chat with these arguments.

        Args:
            without: Names of modules that are not there. slow: Seconds before each array of a file.
        """
        master, slave = pty.openpty()
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        order = {
            "terminal": os.ttyname(slave),
            "argv": [str(a) for a in argv],
            "env": env or {},
            "without": without,
            "slow": slow,
        }
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        self.last = Terminal(master, slave, pid, self.server.stdout)
        return self.last

    def reap(self):
        """End a chat that a failed test has left."""
        if self.last is not None and self.last.code is None:
            self.last.kill()

    def close(self):
        """End the server."""
        self.reap()
        self.server.stdin.close()
        self.server.wait(timeout=30)


class Terminal:
    """One program and its screen, as text without escape sequences."""

    def __init__(self, master: int, slave: int, pid: int, codes):
        self.master, self.slave, self.pid, self.codes = master, slave, pid, codes
        self.raw, self.seen, self.code = b"", 0, None
        self.answered = 0  # prompts there were when the last line was sent

    def send(self, text: str | bytes):
        """Type."""
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def paste(self, text: str):
        """Paste, as a terminal with bracketed paste does."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def _more(self, timeout: float) -> bool:
        if not select.select([self.master], [], [], timeout)[0]:
            return False
        data = os.read(self.master, 1 << 16)
        self.raw += data
        if b"\x1b[6n" in data:  # where is the cursor?
            self.send("\x1b[1;1R")
        return True

    @property
    def text(self) -> str:
        """All that was printed."""
        return _ESCAPES.sub("", self.raw.decode(errors="replace"))

    def expect(self, pattern: str) -> str:
        """Wait for a pattern in what was not expected yet; what came up to its end."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            new = self.text[self.seen :]
            found = re.search(pattern, new)
            if found:
                self.seen += found.end()
                return new[: found.end()]
            self._more(0.2)
        raise AssertionError(f"{pattern!r} did not come: {self.text[self.seen :]!r}")

    def quiet(self, seconds: float = 0.15):
        """Wait until nothing comes for so long."""
        while self._more(seconds):
            pass

    def ready(self):
        """Wait until there is another prompt than the one of the last ask, or nothing comes."""
        while self.prompts <= self.answered and self._more(0.15):
            pass
        self.quiet(0.03)

    def ask(self, line: str, pattern: str) -> str:
        """Type a line; what is printed up to and with a pattern."""
        self.ready()
        self.seen = len(self.text)
        self.send(line)
        self.quiet(0.03)  # the echo, before Enter: editors read keys one by one
        self.answered = self.prompts
        self.send("\r")
        return self.expect(pattern)

    @property
    def prompts(self) -> int:
        """Prompts so far: editors ask for marked pastes at each."""
        return self.raw.count(PROMPT)

    def prompt(self, prompts: int) -> bool:
        """Wait for one more prompt than there were; False if the chat is over."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if self.prompts > prompts:
                return True
            if self.is_over():
                return False
            self._more(0.1)
        raise AssertionError(f"no prompt: {self.text[self.seen :]!r}")

    def wait(self) -> int:
        """The exit code, once it is over; late, it is killed and the test fails."""
        end, late = time.monotonic() + WAIT, False
        while not self.is_over():
            if time.monotonic() > end and not late:
                os.kill(self.pid, signal.SIGKILL)
                late = True
            self._more(0.1)
        self.code = int(self.codes.readline())
        self.quiet(0.05)
        os.close(self.master)
        os.close(self.slave)
        if late:
            raise AssertionError(f"it did not end: {self.text[self.seen :]!r}")
        return self.code

    def kill(self) -> int:
        """kill -9; the exit code."""
        if not self.is_over():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def is_over(self) -> bool:
        """Whether it has ended."""
        return bool(select.select([self.codes], [], [], 0)[0])
