"""hydra-mlx serve under load: many clients that ask, edit, fork, go away and send nonsense.

python benchmarks/soak_server.py --seconds 600 --clients 32

Starts the server as a process of its own with a random model of 0.2 M parameters. Every reply is
compared with a single run of the same prompt, computed before. Fails if the server dies or answers
anything unexpected, if a reply differs or breaks off, if memory grows, if the cache is larger than
allowed, or if cached_tokens is never above 0. The last line is JSON.
"""

import argparse
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import hydra_mlx
from hydra_mlx.generation import stream_generate
from hydra_mlx.text import size

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.conftest import write_model  # noqa: E402

CACHE = 12_000_000  # bytes: a fraction of what all prompts together would take
MOST = 2600  # --max-context
LETTERS = "abcdefghijkl .,\n"
NONSENSE = [  # (path, body, expected status)
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[]", 400),
    ("/v1/completions", b"\xff\x00", 400),
    ("/v1/completions", b'{"prompt": 7}', 400),
    ("/v1/completions", b'{"prompt": "a", "max_tokens": "x"}', 400),
    ("/v1/completions", b'{"prompt": "a", "what": 1}', 400),
    ("/v1/completions", json.dumps({"prompt": "a" * MOST}).encode(), 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "elf"}]}', 400),
    ("/v1/completions", b" " * 1_200_000, 413),
    ("/v1/nothing", b"{}", 404),
]


def make_prompts(seed: int, documents: int) -> list:
    """(prompt, tokens of the reply): documents with questions, edits, turns; short ones."""
    rng = random.Random(seed)

    def text(n: int) -> str:
        return "".join(rng.choices(LETTERS, k=n))

    found = [(text(rng.randint(3, 200)), rng.randint(1, 60)) for _ in range(4 * documents)]
    for _ in range(documents):
        document = text(rng.randint(300, 2000))
        for _ in range(4):
            found.append((f"{document} Q{rng.randint(0, 99)}?", rng.randint(1, 60)))
        for _ in range(4):
            at = rng.randint(0, len(document) - 1)
            edited = document[:at] + text(rng.randint(0, 20)) + document[at + 5 :]
            found.append((f"{edited} Q{rng.randint(0, 9)}?", rng.randint(1, 60)))
    return found


class Soak:
    """What the clients share.

    Attributes:
        prompts: (prompt, tokens, expected text). counts: What happened. faults: What should not.
    """

    def __init__(self, port: int, prompts: list, seconds: float):
        self.port, self.prompts, self.end = port, prompts, time.monotonic() + seconds
        self.counts: Counter = Counter()
        self.faults: list = []
        self.lock = threading.Lock()
        self.first_s: list = []

    def count(self, **more: int):
        """Add to the counts."""
        with self.lock:
            self.counts.update(more)

    def fault(self, text: str):
        """Something that should not have happened."""
        with self.lock:
            self.faults.append(text[:300])

    def post(self, path: str, body: bytes) -> tuple:
        """(connection, response)."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        c.request("POST", path, body, {"Content-Type": "application/json"})
        return c, c.getresponse()

    def client(self, seed: int):
        """One client, until the time is over."""
        rng = random.Random(seed)
        acts = [self.ask, self.stream, self.turn, self.leave, self.nonsense]
        while time.monotonic() < self.end:
            act = rng.choices(acts, (4, 4, 2, 1, 1))[0]
            try:
                act(rng)
            except Exception as e:
                self.fault(f"{act.__name__}: {type(e).__name__}: {e}")

    def ask(self, rng: random.Random):
        """A whole reply."""
        prompt, n, expected = rng.choice(self.prompts)
        self.check(prompt, n, expected)

    def turn(self, rng: random.Random):
        """A reply, the same again, and the prompt with the reply as the beginning of another."""
        prompt, n, expected = rng.choice(self.prompts)
        for _ in range(2):
            self.check(prompt, n, expected)
        c, r = self.post(
            "/v1/completions",
            json.dumps({"prompt": prompt + expected + " More?", "max_tokens": 3}).encode(),
        )
        if r.status != 200:
            self.fault(f"turn: {r.status} {r.read()[:200]!r}")
        c.close()
        self.count(turns=1)

    def check(self, prompt: str, n: int, expected: str):
        """Ask and compare."""
        body = json.dumps({"prompt": prompt, "max_tokens": n}).encode()
        c, r = self.post("/v1/completions", body)
        found = json.loads(r.read())
        c.close()
        if r.status != 200:
            self.fault(f"ask: {r.status} {found}")
            return
        text, usage = found["choices"][0]["text"], found["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        self.count(replies=1, prompt_tokens=len(prompt), cached_tokens=cached)
        if text != expected or usage["prompt_tokens"] != len(prompt) or cached >= len(prompt):
            self.fault(f"ask: {text!r} for {expected!r}, {usage}")

    def stream(self, rng: random.Random):
        """A reply in pieces, to its end."""
        prompt, n, expected = rng.choice(self.prompts)
        ask = {"prompt": prompt, "max_tokens": n, "stream": True}
        start = time.monotonic()
        c, r = self.post("/v1/completions", json.dumps(ask).encode())
        lines = [x for x in r.read().decode().split("\n\n") if x.startswith("data: ")]
        c.close()
        self.first_s.append(time.monotonic() - start)
        if not lines or lines[-1] != "data: [DONE]":
            self.fault(f"stream: it ends with {lines[-1:]}")
            return
        chunks = [json.loads(x[6:]) for x in lines[:-1]]
        text = "".join(x["choices"][0]["text"] for x in chunks)
        if text != expected or not chunks[-1]["choices"][0]["finish_reason"]:
            self.fault(f"stream: {text!r} for {expected!r}")
        self.count(streams=1)

    def leave(self, rng: random.Random):
        """A client that goes before the reply is there, or in the middle of it."""
        prompt, _, _ = rng.choice(self.prompts)
        ask = {"prompt": prompt, "max_tokens": 300, "stream": rng.random() < 0.7}
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        c.request("POST", "/v1/completions", json.dumps(ask).encode())
        if ask["stream"] and rng.random() < 0.5:
            c.getresponse().read(rng.randint(1, 2000))
        else:
            time.sleep(rng.random() / 5)
        c.close()
        self.count(left=1)

    def nonsense(self, rng: random.Random):
        """What must be refused."""
        path, body, status = rng.choice(NONSENSE)
        c, r = self.post(path, body)
        found = json.loads(r.read())
        c.close()
        if r.status != status or not found["error"]["message"]:
            self.fault(f"nonsense: {r.status} for {status}: {found}")
        self.count(refused=1)


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def stats(port: int) -> dict:
    """/stats of the server."""
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    c.request("GET", "/stats")
    found = json.loads(c.getresponse().read())
    c.close()
    return found


def start(folder: Path, log: Path, extra: list) -> tuple:
    """(process, port) of a server."""
    command = [sys.executable, "-m", "hydra_mlx", "serve", "--model", str(folder), "--port", "0"]
    command += ["--cache-memory", str(CACHE), "--max-context", str(MOST), "--max-request", "1MB"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as out:
        process = subprocess.Popen([*command, *extra], stderr=out, env=env)
    for _ in range(1200):
        found = [x for x in log.read_text().splitlines() if " at http://" in x]
        if found:
            return process, int(found[0].split("/v1")[0].rsplit(":", 1)[1])
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"The server does not start:\n{log.read_text()}")


def run(args: argparse.Namespace, folder: Path) -> dict:
    """The figures."""
    write_model(folder / "model")
    model, tokenizer = hydra_mlx.load(folder / "model")
    prompts = []
    for prompt, n in make_prompts(args.seed, args.documents):
        parts = stream_generate(model, tokenizer, tokenizer.encode(prompt), n)
        prompts.append((prompt, n, "".join(p.text for p in parts)))
    log = folder / "log"
    process, port = start(folder / "model", log, args.serve)
    soak, samples, started = Soak(port, prompts, args.seconds), [], time.monotonic()
    threads = [threading.Thread(target=soak.client, args=(i,)) for i in range(args.clients)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        time.sleep(min(1.0, args.seconds / 20))
        if process.poll() is not None:
            soak.fault(f"the server has ended with {process.returncode}")
            break
        now = stats(port)
        samples.append((rss(process.pid), now["active_bytes"], now["cached_bytes"]))
    for t in threads:
        t.join()
    seconds = time.monotonic() - started
    last = {}
    if process.poll() is None:
        for _ in range(100):
            last = stats(port)
            if not last["running"] + last["waiting"]:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        if process.wait(60):
            soak.fault(f"the server ends with {process.returncode}")
    told = [x for x in log.read_text().splitlines() if x.startswith(("error", "Traceback"))]
    quarter = max(1, len(samples) // 4)
    early, late = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    grown = {
        name: median(x[i] for x in late) / max(1, median(x[i] for x in early))
        for i, name in enumerate(("rss", "active"))
    }
    return {
        "seconds": round(seconds, 1),
        "clients": args.clients,
        "prompts": len(prompts),
        **soak.counts,
        "median_stream_s": round(median(soak.first_s), 3) if soak.first_s else None,
        "rss_bytes": samples[-1][0] if samples else None,
        "rss_growth": round(grown["rss"], 3),
        "active_growth": round(grown["active"], 3),
        "cached_bytes_most": max((x[2] for x in samples), default=0),
        "cache_limit": CACHE,
        "evicted": last.get("evicted_sequences"),
        "left_running": last.get("running"),
        "faults": len(soak.faults),
        "first_faults": soak.faults[:5],
        "told": told[:5],
    }


def verdict(figures: dict, short: bool) -> list:
    """What is wrong, in words."""
    wrong = [] if not figures["faults"] else [f"{figures['faults']} faults"]
    wrong += ["errors in the log"] if figures["told"] else []
    wrong += ["requests left running"] if figures["left_running"] else []
    if figures["cached_bytes_most"] > figures["cache_limit"]:
        wrong.append("the cache is larger than allowed")
    if not figures.get("cached_tokens"):
        wrong.append("nothing was reused")
    if not short and figures["rss_growth"] > 1.1:
        wrong.append("memory grows")
    return wrong


def main(argv: list | None = None) -> int:
    """Run, print; 1 if anything is wrong."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seconds", type=float, default=600)
    p.add_argument("--clients", type=int, default=32)
    p.add_argument("--documents", type=int, default=20)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("serve", nargs="*", help="more flags of hydra-mlx serve, after --")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, Path(folder))
    for name, value in figures.items():
        shown = (
            size(value) if isinstance(value, int) and name.endswith(("bytes", "most")) else value
        )
        print(f"{name:18} {shown}")
    wrong = verdict(figures, args.seconds < 60)
    print("fine" if not wrong else "WRONG: " + "; ".join(wrong))
    print(json.dumps(figures))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
