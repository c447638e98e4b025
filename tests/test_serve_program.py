"""hydra-mlx serve as a program: flags, addresses, signals; and a short soak."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak_server

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no such host"], "not an address"),
        (["--port", "70000"], "from 0 to 65535"),
        (["--cache-memory", "lots"], "not a size"),
        (["--cache-memory", "900GB"], "there is room for"),
        (["--memory", "1MB"], "not enough"),
        (["--memory", "90000GB"], "--memory is"),
        (["--api-key", " "], "--api-key is empty"),
        (["--alias", ""], "--alias is empty"),
        (["--kv-bits", "7"], "kv-bits is 7"),
        (["--kv-group-size", "32"], "without --kv-bits"),
        (["--top-p", "0.5"], "without --temp"),
        (["--checkpoints", "1MB", "--checkpoint-dtype", "int8"], "int8"),
        (["--chat-template-args", "[1]"], "expected a JSON object"),
        (["--prompt-cache-bytes", "1GB"], "use --cache-memory"),
        (["--draft-model", "x"], "without drafts"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--frob"], "--frob"),
    ],
)
def test_wrong_flags(program, flags, words):
    code, out, err = program("serve", *flags)
    assert code == 2 and words in err and "Traceback" not in err
    assert len(err.splitlines()) <= 3 and not out


def test_a_port_that_is_taken(program):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        code, _, err = program("serve", "--port", s.getsockname()[1])
    assert code == 2 and "cannot be listened on" in err and "--port" in err


@pytest.mark.parametrize("host, number", [("0.0.0.0", signal.SIGINT), (None, signal.SIGTERM)])
def test_a_process_of_its_own(tiny_model_dir, host, number):
    """It warns, answers, and ends quietly in the middle of a reply."""
    flags = ["--model", str(tiny_model_dir), "--port", "0", "--verbose"]
    flags += ["--host", host] if host else []
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HYDRA_API_KEY": "k" if host else ""}
    p = subprocess.Popen(
        [sys.executable, "-m", "hydra_mlx.serve", *flags],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip
    lines = []
    while not lines or " at http://" not in lines[-1]:
        lines.append(p.stderr.readline())
        assert lines[-1], lines
    assert any("warning: 0.0.0.0 can be reached" in x for x in lines) == bool(host)
    port = int(lines[-1].split("/v1")[0].rsplit(":", 1)[1])
    c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    c.request("GET", "/v1/models")
    assert c.getresponse().status == (401 if host else 200)
    c.close()
    ask = {"prompt": "abc", "max_tokens": 3000, "stream": True, "logit_bias": {"257": -100}}
    c.request("POST", "/v1/completions", json.dumps(ask), {"Authorization": "Bearer k"})
    r = c.getresponse()
    assert r.status == 200 and r.readline()
    p.send_signal(number)
    rest = r.read().decode()
    assert "[DONE]" not in rest and '"stopping"' in rest
    out, err = p.communicate(timeout=30)
    assert p.returncode == 0 and "Traceback" not in err and "Stopped." in err and not out


def test_ten_seconds_of_32_clients(capsys):
    code = soak_server.main(["--seconds", "10", "--documents", "3"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0, figures
    assert figures["replies"] and figures["cached_tokens"] and not figures["faults"]
