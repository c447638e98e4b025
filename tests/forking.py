"""A child that has imported everything and forks one program for each line it reads.

So a program starts in milliseconds, and each is a process of its own that can be killed.
"""

import os
import subprocess
import sys


class ForkServer:
    """Starts programs one after the other; wait() gives the exit code of the last."""

    def __init__(self, source: str, *arguments):
        """Run `source` with these arguments.

        It must print "ready", then for each line of its input, blank-separated arguments, the
        process id of what it started and its exit code, and must not touch MLX's threads.
        """
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", source, *map(str, arguments)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.server = subprocess.Popen(
            command, **pipes, stderr=subprocess.DEVNULL, text=True, env=env
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        return self.server.stdout.readline().strip()

    def start(self, *argv) -> int:
        """Start a program with these arguments (no blanks in them); its process id."""
        self.server.stdin.write(" ".join(map(str, argv)) + "\n")
        self.server.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Exit code of the program, negative for a signal."""
        return int(self._line())

    def close(self):
        """End the server."""
        self.server.stdin.close()
        self.server.wait(timeout=30)
