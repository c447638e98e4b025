"""Writes the transcript in docs/chat.md: two chats in a terminal, over a long file.

    python tools/chat_transcript.py FILE [--model DIR] > transcript.txt

What is typed is in STEPS, what comes back is the program's. Figures and times are of the machine it
runs on. Needs Linux or macOS (a pseudo-terminal).
"""

import argparse
import os
import pty
import re
import select
import shutil
import sys
import tempfile
import time
from pathlib import Path

STEPS = [
    [
        "/read {file}",
        "Who published this text?",
        "/stats",
        "What may I do with the program? One sentence.",
        "/edit Is there a warranty? One sentence.",
        "/stats",
        "/undo",
        "/savee talk.safetensors",
        "/save talk.safetensors",
        "/context",
        "/exit",
    ],
    [
        "/load talk.safetensors",
        "Is there a warranty? One sentence.",
        "/stats",
        "/save talk.safetensors",
        "/exit",
    ],
]
READY = b"\x1b[?2004h"  # readline asks for marked pastes when it is ready
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def main(argv: list | None = None) -> int:
    """Run the steps and print what the screen showed."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("file", type=Path)
    p.add_argument("--model", help="default: the one that programs use")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.file, folder)
        command = ["hydra-mlx", "chat", "--max-tokens", "48"]
        hidden = ["--input", "readline", "--history", "off"]
        hidden += ["--model", str(Path(args.model).resolve())] if args.model else []
        for i, steps in enumerate(STEPS):
            print(f"{'' if i == 0 else chr(10)}$ {' '.join(command)}")
            lines = [s.format(file=args.file.name) for s in steps]
            print(chat([*command[1:], *hidden], folder, lines), end="")
    return 0


def chat(argv: list, folder: str, lines: list) -> str:
    """The screen of one chat."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="xterm", COLUMNS="100")
        os.execv(sys.executable, [sys.executable, "-m", "hydra_mlx", *argv])
    seen = b""
    for n, line in enumerate(lines):
        seen += until(terminal, seen, n + 1)
        time.sleep(0.2)
        os.write(terminal, line.encode() + b"\r")
    seen += until(terminal, seen, 1 << 30)
    os.waitpid(pid, 0)
    text = ESCAPES.sub("", seen.decode(errors="replace")).replace("\r\n", "\n")
    kept = [line.rpartition("\r")[2] for line in text.split("\n")]  # progress bars come before \r
    return (
        "\n".join(line.rstrip() for line in kept if not line.startswith("reading ")).strip() + "\n"
    )


def until(terminal: int, seen: bytes, prompts: int) -> bytes:
    """What comes until so many prompts were there, or the program ends."""
    new = b""
    while (seen + new).count(READY) < prompts:
        if select.select([terminal], [], [], 600)[0]:
            try:
                data = os.read(terminal, 1 << 16)
            except OSError:  # Linux says so at the end
                break
            if not data:
                break
            new += data
    return new


if __name__ == "__main__":
    sys.exit(main())
