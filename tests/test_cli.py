"""What all programs share: subcommands, exit codes, errors in one or two lines, broken pipes."""

import importlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra_mlx
from hydra_mlx import cli, files
from hydra_mlx.__main__ import COMMANDS, main
from hydra_mlx.errors import UsageError

import pytest


def lines(text):
    return text.strip().splitlines()


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(name in out for name in COMMANDS) and not err
    assert main(["--version"]) == 0
    assert hydra_mlx.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, hint", [([], "--help"), (["genrate"], "generate"), (["zz"], "--help")]
)
def test_wrong_command(argv, hint, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and len(lines(err)) == 2 and hint in err


def test_every_command_has_help(capsys):
    for name, (module, _) in COMMANDS.items():
        with pytest.raises(SystemExit) as e:
            importlib.import_module(f"hydra_mlx.{module}").main(["--help"])
        assert e.value.code == 0 and f"hydra-mlx {name}" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from hydra_mlx.__main__ import main\n"
        "try: main(['generate', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'mlx', 'mlx_lm', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert lines(done.stdout)[-1] == "[]"


@pytest.mark.parametrize(
    "error, code, words",
    [
        (UsageError("found this", "type that"), 2, ["error: found this", "type that"]),
        (MemoryError(), 2, ["MemoryError", "Out of memory"]),
        (RuntimeError("[metal::malloc] too large"), 2, ["malloc", "--kv-bits"]),
        (OSError(28, "No space left on device"), 2, ["No space left", "--debug"]),
        (ValueError("odd\nsecond line"), 2, ["ValueError: odd", "--debug"]),
        (KeyboardInterrupt(), 130, ["Interrupted."]),
        (BrokenPipeError(), 141, []),
    ],
)
def test_errors_become_lines(error, code, words, capsys):
    def body():
        raise error

    assert cli.guard(body) == code
    err = capsys.readouterr().err
    assert all(w in err for w in words) and len(lines(err)) <= 2 and "Traceback" not in err


def test_debug_shows_the_traceback(capsys):
    def body():
        raise UsageError("found this")

    assert cli.guard(body, debug=True) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_a_flag_first():
    before = signal.getsignal(signal.SIGINT)
    with cli.Interrupt() as interrupt:
        assert not interrupt()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_no_bar_without_a_terminal(capsys):
    with cli.progress("work") as bar:
        bar("work", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    stdout = sys.stdout
    with cli.progress("work", unit="tokens") as bar:
        bar("work", 1000, 2000)
        assert sys.stdout is stdout
    assert "1,000/2,000 tokens" in sys.stderr.getvalue()


def test_user_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HYDRA_MLX_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.user_cache_dir() == tmp_path
    monkeypatch.delenv("HYDRA_MLX_CACHE")
    assert files.user_cache_dir() == tmp_path / "xdg" / "hydra_mlx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(files.sys, "platform", "darwin")
    assert files.user_cache_dir() == Path.home() / "Library" / "Caches" / "hydra_mlx"
    monkeypatch.setattr(files.sys, "platform", "linux")
    assert files.user_cache_dir() == Path.home() / ".cache" / "hydra_mlx"
