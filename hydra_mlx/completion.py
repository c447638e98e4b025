"""hydra-mlx completion: a script that makes a shell complete hydra-mlx's commands and flags.

bash: hydra-mlx completion bash > ~/.hydra-mlx.bash; echo 'source ~/.hydra-mlx.bash' >> ~/.bashrc
zsh:  hydra-mlx completion zsh > ~/.hydra-mlx.zsh; echo 'source ~/.hydra-mlx.zsh' >> ~/.zshrc
fish: hydra-mlx completion fish > ~/.config/fish/completions/hydra-mlx.fish
"""

import argparse
import sys
from collections.abc import Sequence

from . import cli, flags

TOP = ("--help", "--version")
HEAD = "made by `hydra-mlx completion {shell}`; make it again after an update"


def build_parser() -> cli.Parser:
    """Flags of `hydra-mlx completion`."""
    p = cli.parser("completion", __doc__)
    p.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


def commands() -> dict:
    """{command: (what it does, its Flags)}."""
    from .__main__ import COMMANDS

    found = {n: (about, flags.flags_of(flags.parser_of(n))) for n, (_, about) in COMMANDS.items()}
    return found


def bash() -> str:
    """The script for bash, 3.2 (macOS) and newer."""
    cases, words, arguments = [], [], []
    for name, (_, found) in commands().items():
        words.append(f'    {name}) flags="{" ".join(n for f in found for n in f.names)}" ;;')
        for f in found:
            if not f.names and f.choices:
                arguments.append(f'    {name}) choices="{" ".join(f.choices)}" ;;')
            if not f.names or not f.completes:
                continue
            pattern = "|".join(f"{name}:{n}" for n in f.names)
            todo = {
                "choice": f'_hydra_mlx_words "{" ".join(f.choices)}"',
                "folder": "_hydra_mlx_folders",
                "file": ":",
                "text": "compopt +o default 2>/dev/null",
            }[f.completes]
            cases.append(f"    {pattern}) {todo}; return 0 ;;")
    names = " ".join([*commands(), *TOP])
    return f"""# bash completion, {HEAD.format(shell="bash")}
# Where nothing is offered, bash completes file names (complete -o default).
_hydra_mlx_words() {{
  local IFS=$' \\t\\n'
  COMPREPLY=($(compgen -W "$1" -- "$cur"))
  compopt +o default 2>/dev/null
}}
_hydra_mlx_folders() {{
  local IFS=$'\\n'
  compopt -o filenames 2>/dev/null
  COMPREPLY=($(compgen -d -- "$cur"))
}}
_hydra_mlx() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" flags="" choices=""
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then _hydra_mlx_words "{names}"; return 0; fi
  if [ "$cur" = "=" ]; then cur=""  # --flag=
  elif [ "$prev" = "=" ]; then prev="${{COMP_WORDS[COMP_CWORD-2]}}"  # --flag=value
  fi
  case "${{COMP_WORDS[1]}}:$prev" in
{chr(10).join(cases)}
  esac
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(words)}
  esac
  if [ "${{cur:0:1}}" = "-" ]; then _hydra_mlx_words "$flags"; return 0; fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(arguments) or "    *) ;;"}
  esac
  if [ -n "$choices" ]; then _hydra_mlx_words "$choices"; fi
  return 0
}}
complete -o default -F _hydra_mlx hydra-mlx
"""


def _quoted(text: str) -> str:
    """In single quotes, for bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_spec(f: flags.Flag) -> list:
    """Specifications of one flag for zsh's _arguments."""
    said = f.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    act = {
        "choice": f"({' '.join(f.choices)})",
        "folder": "_files -/",
        "file": "_files",
        "text": " ",
        "": "",
    }[f.completes]
    value = f.value.replace(":", "\\:")
    if not f.names:
        place = "*" if f.many else ""
        return [_quoted(f"{place}:{value}:{act if f.completes != 'text' else '_files'}")]
    tail = f":{value}:{act}" if f.value else ""
    others = "" if len(f.names) == 1 or f.repeats else f"({' '.join(f.names)})"
    star = "*" if f.repeats else ""
    return [_quoted(f"{others}{star}{n}[{said}]{tail}") for n in f.names]


def zsh() -> str:
    """The script for zsh; also good as a file _hydra-mlx on its fpath."""
    lines, cases = [], []
    for name, (about, found) in commands().items():
        lines.append(f"    {_quoted(name + ':' + about)}")
        specs = " \\\n        ".join(s for f in found for s in _zsh_spec(f))
        cases.append(f"    {name}) _arguments -S \\\n        {specs} ;;")
    return f"""#compdef hydra-mlx
# zsh completion, {HEAD.format(shell="zsh")}
_hydra_mlx() {{
  local -a commands
  commands=(
{chr(10).join(lines)}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    compadd -- {" ".join(TOP)}
    return
  fi
  shift words
  (( CURRENT-- ))
  case $words[1] in
{chr(10).join(cases)}
  esac
}}
if (( ! $+functions[compdef] )); then
  autoload -U compinit && compinit
fi
if [[ $funcstack[1] == _hydra[_-]mlx ]]; then
  _hydra_mlx "$@"
else
  compdef _hydra_mlx hydra-mlx
fi
"""


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def fish() -> str:
    """The script for fish."""
    lines = [f"# fish completion, {HEAD.format(shell='fish')}", "complete -c hydra-mlx -f"]
    start = "complete -c hydra-mlx -n __fish_use_subcommand"
    lines += [f"{start} -l {n.lstrip('-')}" for n in TOP]
    for name, (about, found) in commands().items():
        lines.append(f"{start} -a {name} -d {_fish_quoted(about)}")
        mine = f"complete -c hydra-mlx -n '__fish_seen_subcommand_from {name}'"
        for f in found:
            what = {
                "choice": f"-x -a {_fish_quoted(' '.join(f.choices))}",
                "folder": "-x -a '(__fish_complete_directories)'",
                "file": "-r -F",
                "text": "-x",
                "": "",
            }[f.completes]
            if not f.names:
                lines.append(f"{mine} -F" if not f.choices else f"{mine} {what.replace('-x ', '')}")
                continue
            names = " ".join(
                f"-l {n[2:]}" if n.startswith("--") else f"-{'s' if len(n) == 2 else 'o'} {n[1:]}"
                for n in f.names
            )
            lines.append(f"{mine} {names} {what} -d {_fish_quoted(f.help)}".replace("  ", " "))
    return "\n".join(lines) + "\n"


def work(args: argparse.Namespace) -> int:
    """Print the script; returns the exit code."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[args.shell](), end="")
    return 0


def main(argv: Sequence | None = None) -> int:
    """Entry point of `hydra-mlx completion`; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
