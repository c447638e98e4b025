"""Shell completion: the scripts run in the shells themselves, where these are installed."""

import importlib.util
import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import hydra_mlx  # noqa: F401
from hydra_mlx import completion, flags
from hydra_mlx.__main__ import COMMANDS, main

import pytest

ROOT = Path(__file__).parents[1]
# What a shell sends besides text; newlines stay.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x00-\x09\x0b-\x1f]")
SHELLS = {"bash": completion.bash, "zsh": completion.zsh, "fish": completion.fish}


def needs(shell: str):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell}")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("completion")
    (folder / "here").mkdir()
    (folder / "here" / "a folder").mkdir()
    (folder / "here" / "a file.txt").write_text("")
    for shell, make in SHELLS.items():
        (folder / shell).write_text(make())
    return {shell: folder / shell for shell in SHELLS} | {"cwd": folder / "here"}


def ask_bash(scripts, *lines) -> list:
    """What bash would offer for each line's last word, without a terminal."""
    calls = "\n".join(
        f"COMP_WORDS=({line}); [[ {line!r} == *' ' ]] && COMP_WORDS+=('')\n"
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _hydra_mlx; "
        'for w in "${COMPREPLY[@]}"; do echo "$w"; done; echo --'
        for line in lines
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", f"source {scripts['bash']}\n{calls}"],
        capture_output=True, text=True, cwd=scripts["cwd"], check=True,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return [part.split("\n")[:-1] for part in done.stdout.split("--\n")[:-1]]


@needs("bash")
def test_bash_offers_every_flag_of_every_command(scripts):
    # "-" is offered whole words that begin with it; split on "--\n" needs none equal to "--".
    found = ask_bash(scripts, "hydra-mlx ", *(f"hydra-mlx {name} -" for name in COMMANDS))
    assert set(found[0]) == {*COMMANDS, "--help", "--version"}
    for name, offered in zip(COMMANDS, found[1:], strict=True):
        wanted = {n for f in flags.flags_of(flags.parser_of(name)) for n in f.names}
        assert set(offered) == wanted and "--help" in wanted, name


@needs("bash")
def test_bash_values(scripts):
    asked = {
        "hydra-mlx gen": ["generate"],
        "hydra-mlx generate --dtype f": ["float32", "float16"],
        "hydra-mlx generate --dtype = f": ["float32", "float16"],
        "hydra-mlx completion ": ["bash", "zsh", "fish"],
        "hydra-mlx completion b": ["bash"],
        "hydra-mlx bench --geometry ": ["1.7b", "0.6b"],
        "hydra-mlx convert --mlx-path a": ["a folder"],
        "hydra-mlx generate --seed ": [],
        "hydra-mlx generate --prompt-cache a": [],  # bash's own file names
        "hydra-mlx nonsense --x": [],
    }
    assert dict(zip(asked, ask_bash(scripts, *asked), strict=True)) == asked


@needs("fish")
def test_fish(scripts):
    def ask(line: str) -> list:
        command = f"source {scripts['fish']}; complete -C '{line}'"
        done = subprocess.run(
            ["fish", "--no-config", "-c", command],
            capture_output=True, text=True, cwd=scripts["cwd"], check=True,
        )  # fmt: skip
        assert not done.stderr, done.stderr
        return [x.split("\t")[0] for x in done.stdout.splitlines()]

    assert set(ask("hydra-mlx ")) == set(COMMANDS)
    assert ask("hydra-mlx generate --dtype f") == ["float16", "float32"]
    assert ask("hydra-mlx completion ") == ["bash", "fish", "zsh"]
    assert "a folder/" in ask("hydra-mlx convert --mlx-path ")
    for name in COMMANDS:
        wanted = {n for f in flags.flags_of(flags.parser_of(name)) for n in f.names}
        assert {x for x in ask(f"hydra-mlx {name} -") if x.startswith("-")} >= {
            n for n in wanted if n.startswith("--")
        }, name


class Terminal:
    """An interactive shell on a pseudo-terminal."""

    def __init__(self, argv: list, cwd):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            env = {"PATH": os.environ["PATH"], "TERM": "dumb", "PS1": "% ", "HOME": str(cwd)}
            os.execvpe(argv[0], argv, env)
        self.screen = ""

    def type(self, text: str, until: str, seconds: float = 15) -> str:
        """Send keys; what the screen gains until a pattern is on it."""
        os.write(self.fd, text.encode())
        gained, end = "", time.monotonic() + seconds
        while not re.search(until, CONTROL.sub("", gained)):
            assert time.monotonic() < end, f"{until!r} did not come:\n{self.screen}{gained}"
            if select.select([self.fd], [], [], 0.1)[0]:
                gained += os.read(self.fd, 65536).decode(errors="replace")
        self.screen += gained
        return gained

    def close(self):
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@needs("zsh")
def test_zsh_in_a_terminal(scripts):
    shell = Terminal(["zsh", "-f", "-i"], scripts["cwd"])
    try:
        shell.type(f"autoload -U compinit; compinit -u -D; source {scripts['zsh']}; echo re''ady\n",
                   "\nready")  # fmt: skip
        shell.type("hydra-mlx generate --dty\t", r"generate --dtype")
        shell.type("floa\t", r"float")
        shell.type("\x15hydra-mlx completion f\t", r"completion fish")
        shell.type("\x15hydra-mlx convert --mlx-path a\t", r"a\\ folder")
        shell.type("\x15hydra-mlx doc\t", r"doctor")
    finally:
        shell.close()


@needs("bash")
def test_bash_in_a_terminal(scripts):
    shell = Terminal(["bash", "--norc", "-i"], scripts["cwd"])
    try:
        shell.type(f"source {scripts['bash']}; echo re''ady\n", "\nready")
        shell.type("hydra-mlx generate --dty\t", r"--dtype ")
        shell.type("float3\t", r"float32 ")
        shell.type("\x15hydra-mlx generate --file a\\ fi\t", r"a\\ file.txt")
        shell.type("\x15hydra-mlx convert --mlx-path a\t", r"a\\ folder/")
    finally:
        shell.close()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_the_script(shell, capsys, scripts):
    assert main(["completion", shell]) == 0
    out, err = capsys.readouterr()
    assert out == scripts[shell].read_text() and not err
    assert main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err


def test_quotes_in_help_do_not_end_a_string():
    f = flags.Flag(("--x",), "N", False, True, (), False, "it's [a]: b", "flags")
    assert completion._zsh_spec(f) == ["'--x[it'\\''s \\[a\\]\\: b]:N: '"]
    assert completion._fish_quoted("it's \\") == "'it\\'s \\\\'"


# ------------------------------------------------------------------------- docs/cli.md


def reference():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "tools/cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_current(capsys):
    assert reference().main(["--check"]) == 0, "run: python tools/cli_reference.py"


def test_the_reference_does_not_depend_on_the_terminal(monkeypatch):
    whole = reference().render()
    for columns in ("20", "300"):
        monkeypatch.setenv("COLUMNS", columns)
        assert reference().render() == whole
    for name in COMMANDS:
        assert f"## hydra-mlx {name}\n" in whole
        for f in flags.flags_of(flags.parser_of(name)):
            assert not f.names or f"`{f.names[0]}" in whole


def test_an_old_reference_is_noticed(monkeypatch, tmp_path, capsys):
    module = reference()
    monkeypatch.setattr(module, "TARGET", tmp_path / "cli.md")
    assert module.main(["--check"]) == 1
    assert module.main([]) == 0 and module.main(["--check"]) == 0
    (tmp_path / "cli.md").write_text(module.render().replace("--model PATH", "--model FILE"))
    assert module.main(["--check"]) == 1


def pythons() -> list:
    """Other versions of Python on this machine."""
    found = [shutil.which(f"python3.{n}") for n in range(10, 14)]
    found += map(str, (Path.home() / ".pyenv/versions").glob("3.1[0-3]*/bin/python"))
    return [p for p in found if p]


@pytest.mark.parametrize("python", pythons(), ids=lambda p: p[-20:])
def test_other_pythons_give_the_same_reference(python):
    """The parsers need nothing but the standard library."""
    code = (
        "import runpy, sys, types\n"
        "numpy = types.ModuleType('numpy'); numpy.__getattr__ = lambda name: object\n"
        "sys.modules['numpy'] = numpy  # some name it in annotations\n"
        "sys.argv = ['cli_reference.py', '--check']\n"
        f"runpy.run_path({str(ROOT / 'tools' / 'cli_reference.py')!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    if "pyenv: " in done.stderr:
        pytest.skip("not this version")
    assert done.stdout == "current\n", done.stderr
