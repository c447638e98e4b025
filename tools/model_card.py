"""Writes README.md of a model folder from measured results, each with the command that made it.

    python tools/model_card.py hydra_mlx/models/SmolLM2-135M-HydraHead --base-id OWNER/NAME \\
        --perplexity perplexity.json --needles student.json teacher.json --answers answers.json \\
        --log align/log.jsonl --log distil/log.jsonl --commands commands.txt

--perplexity: of tools/perplexity.py. --needles: of `hydra-mlx needle --out`, the same texts for the
model and for the one it was made from, or - where that was not asked; repeatable. --answers: of
tools/side_by_side.py. --log: of tools/transfer_torch, in order; one may have several stages.
--commands: a text file with the commands that made the model, shown as it is.

No figure is typed by hand: what is neither in these files nor in the folder is not in the card.
Results of other weights than the folder's are refused.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra_mlx import cli, facts
from hydra_mlx.errors import UsageError
from hydra_mlx.files import read_json, write_whole
from hydra_mlx.manifest import model_hash
from hydra_mlx.needles import accuracy
from hydra_mlx.text import count

FORMATS = {
    "perplexity": "hydra_mlx perplexity ratio",
    "answers": "hydra_mlx side by side",
    "needles": "hydra_mlx needle accuracy",
}
ABSENT = "-"


def build_parser() -> cli.Parser:
    """The flags."""
    p = cli.Parser("model_card.py", __doc__)
    p.add_argument("folder", metavar="FOLDER", type=Path, help="the model; README.md goes there")
    p.add_argument("--base-id", required=True, metavar="OWNER/NAME", help="its base on the hub")
    p.add_argument("--perplexity", required=True, metavar="FILE", type=Path)
    p.add_argument(
        "--needles", required=True, action="append", nargs=2, metavar=("OWN", "BASE"), type=Path
    )
    p.add_argument("--answers", required=True, metavar="FILE", type=Path)
    p.add_argument("--log", required=True, action="append", metavar="FILE", type=Path)
    p.add_argument("--commands", required=True, metavar="FILE", type=Path)
    p.add_argument("--debug", action="store_true", help="show tracebacks")
    return p


# -------------------------------------------------------------------------------------- reading


def read_result(kind: str, path: Path) -> dict:
    """A result file of one of FORMATS.

    Raises:
        UsageError: It is something else. HydraError: It cannot be read.
    """
    data = read_json(path.expanduser(), f"The {kind} result", "See --help for what makes it.")
    if not isinstance(data, dict) or data.get("format") != FORMATS[kind]:
        raise UsageError(f"{path} is no {FORMATS[kind]!r} file.", "See --help for what makes it.")
    return data


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        UsageError: It cannot be read, or is empty.
    """
    try:
        text = path.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read ({type(e).__name__}).") from None
    if not text.strip():
        raise UsageError(f"{path} is empty.")
    return text


def read_log(path: Path) -> list:
    """The entries of a training log, at least one.

    Raises:
        UsageError: A line is not JSON, or has no stage and step.
    """
    try:
        entries = [json.loads(line) for line in read_text(path).splitlines() if line.strip()]
    except ValueError as e:
        raise UsageError(f"{path} is no log of JSON lines ({e}).") from None
    if not all(isinstance(e, dict) and {"stage", "step"} <= e.keys() for e in entries):
        raise UsageError(f"{path} has a line without stage and step.")
    return entries


def require_same(folder: Path, results: Sequence):
    """Refuse results of other weights.

    Args:
        results: (path, result) pairs.

    Raises:
        UsageError: One has another sha256 than the folder.
    """
    sha256 = model_hash(folder)
    for path, result in results:
        if result["model"]["sha256"] != sha256:
            raise UsageError(
                f"{path} was made with other weights than those in {folder}.", "Measure again."
            )


def require_pair(own: dict, base: dict, paths: Sequence):
    """Refuse two needle results that are not of the same texts.

    Raises:
        UsageError: Their settings differ.
    """
    wrong = [k for k, v in own["settings"].items() if base["settings"].get(k) != v]
    if wrong:
        raise UsageError(f"{paths[0]} and {paths[1]} differ in {wrong[0]}.", "Measure again.")


# -------------------------------------------------------------------------------------- writing


def fenced(text: str, kind: str = "text") -> list:
    """Lines of a code block that no content can end early."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{kind}", *text.rstrip().split("\n"), fence, ""]


def table(head: Sequence, rows: Sequence) -> list:
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(x) for x in line) + " |" for line in lines] + [""]


def figure(x: Any, digits: int = 3) -> str:
    """A number with so many significant digits, thousands apart; ABSENT where there is none."""
    if x is None:
        return ABSENT
    if isinstance(x, int) or abs(x) >= 10**digits:
        return f"{x:,.0f}"
    return f"{x:.{digits}g}"


def head(f: facts.Facts, base_id: str) -> list:
    """The first lines: metadata for the hub, and what the model is."""
    args = f.args
    full = sum(map(len, args.full_attention_heads))
    total = args.num_hidden_layers * args.num_attention_heads
    kept = " and ".join(f"{n} of {what}" for what, n in f.bits.items())
    return [
        "---", "license: apache-2.0", f"base_model: {base_id}", "language: en",
        "pipeline_tag: text-generation", "library_name: hydra_mlx",
        "tags: [mlx, hydrahead, linear-attention]", "---", "",
        f"# {f.path.name}", "",
        f"[{base_id}](https://huggingface.co/{base_id}) as a HydraHead: {full} of its {total} "
        f"attention heads are full attention, the other {total - full} are Gated DeltaNet linear "
        f"attention with a state of fixed size. {f.parameters / 1e6:.1f} M parameters, "
        f"{f.nbytes / 1e6:.1f} MB ({f.bits_per_weight:.2f} bits each; matrices: {kept}). It is the "
        "model that hydra_mlx takes where none is named.", "",
        f"Its cache grows by {f.kv_bytes():,.0f} bytes a token, beside "
        f"{f.state_bytes / 1e6:.1f} MB of state; `hydra-mlx info` has the head map and more.", "",
    ]  # fmt: skip


USE = """\
## Use

```
pip install .          # in a clone of hydra_mlx
hydra-mlx chat
hydra-mlx generate "Why is the sky blue?"
hydra-mlx generate --model hydra_mlx/models/{name} "Why is the sky blue?"
```
"""


def stages(entries: list) -> list:
    """The entries of each stage in a log: another name, or an earlier step, begins one."""
    out = [[entries[0]]]
    for before, entry in zip(entries, entries[1:], strict=False):
        if entry["stage"] != before["stage"] or entry["step"] < before["step"]:
            out.append([])
        out[-1].append(entry)
    return out


def training(commands: str, logs: Sequence) -> list:
    """How it was made: the commands, and a row for each stage.

    Args:
        logs: Entries of every log.
    """
    rows = []
    for entries in [stage for log in logs for stage in stages(log)]:
        steps = [e for e in entries if "lr" in e]
        held = next((e for e in reversed(entries) if "long" in e), {})
        last = steps[-1] if steps else {}
        speeds = [e["tok_s"] for e in steps if "tok_s" in e]
        rows.append(
            [entries[-1]["stage"], figure(entries[-1]["step"]), figure(last.get("seen"))]
            + [figure(last.get(k)) for k in ("loss", "kl")]
            + [figure(held.get(part, {}).get("kl")) for part in ("long", "teacher")]
            + [figure(round(statistics.median(speeds)) if speeds else None)]
        )
    names = ["stage", "steps", "tokens", "loss", "KL", "KL held out, documents"]
    return [
        "## How it was made", "",
        "The definition is in arXiv 2606.20097; the text, its licences and the programs are "
        "described in [tools/transfer_torch](../../../tools/transfer_torch/README.md).", "",
        *fenced(commands, ""),
        "At the end of each stage, as the log of training has it; KL to the plain model in nats a "
        "token:", "",
        *table([*names, "KL held out, the teacher's text", "tokens/s"], rows),
    ]  # fmt: skip


def perplexity(found: dict) -> list:
    """The section of tools/perplexity.py."""
    rows = []
    for x in found["lengths"]:
        error = x["perplexity_ratio"] * x["log_ratio_standard_error"]
        rows.append(
            [f"{x['length']:,}", x["windows"], f"{x['base_perplexity']:.3f}"]
            + [f"{x['perplexity']:.3f}", f"{x['perplexity_ratio']:.4f} (± {error:.4f})"]
            + [f"{x['kl']:.4f}", f"{100 * x['same_top1']:.1f} %"]
        )
    text = found["text"]
    names = ["tokens", "windows", "plain model", "this model", "ratio (± standard error)"]
    return [
        "## Perplexity", "",
        *fenced(found["command"], ""),
        f"Windows of {count(text['documents'], 'document')} that training leaves out "
        f"({text['tokens']:,} tokens). This model as it is in this folder, the plain one in "
        f"float32; run on: {found['device']}. KL from the plain model in nats a token.", "",
        *table([*names, "KL", "same likeliest token"], rows),
    ]  # fmt: skip


def needle_command(found: dict) -> str:
    """The command of a needle result."""
    name, settings = found["model"]["name"], found["settings"]
    flags = [f"--{k} {','.join(map(str, settings[k]))}" for k in ("lengths", "depths", "keys")]
    flags += [f"--{k} {settings[k]}" for k in ("trials", "digits", "seed")]
    flags += ["--haystack FILE"] if settings["haystack_sha256"] else []
    flags += ["--chat"] if settings["chat"] else []
    return f"{found.get('program', 'hydra-mlx needle')} {name} {' '.join(flags)} --out FILE"


def needles(pairs: Sequence) -> list:
    """The section of `hydra-mlx needle`.

    Args:
        pairs: (result of this model, result of the plain one or None).
    """
    lines = [
        "## Needles", "",
        "Numbers hidden in long texts, found again digit for digit; in brackets what the plain "
        "model finds in the same texts, where it was asked.", "",
    ]  # fmt: skip
    for pair in pairs:
        found = [r for r in pair if r is not None]
        s = found[0]["settings"]
        lines += fenced("\n".join(needle_command(r) for r in found), "")
        lines += ["Run on: " + "; ".join(dict.fromkeys(r["device"] for r in found)) + ".", ""]
        for keys in s["keys"]:
            rows = [
                [f"{d:g}", *(cell(found, keys, n, d) for n in s["lengths"])] for d in s["depths"]
            ]
            shares = [[accuracy(r["cells"], keys, n) for r in found] for n in s["lengths"]]
            rows.append(["all", *(beside([f"{100 * x:.0f} %" for x in both]) for both in shares)])
            names = [f"{count(keys, 'key')}, depth", *(f"{n:,}" for n in s["lengths"])]
            lines += table(names, rows)
    return lines


def cell(found: Sequence, keys: int, length: int, depth: float) -> str:
    """Right answers of both at one place."""
    place = (keys, length, depth)
    cells = [
        next(c for c in r["cells"] if (c["keys"], c["length"], c["depth"]) == place) for r in found
    ]
    return beside([f"{c['right']}/{c['trials']}" for c in cells])


def beside(texts: Sequence) -> str:
    """This model's figure, and the plain one's in brackets if there is one."""
    return texts[0] if len(texts) == 1 else f"{texts[0]} ({texts[1]})"


def answers(found: dict) -> list:
    """The section of tools/side_by_side.py: every answer, as it came."""
    lines = [
        "## Beside its teacher", "",
        *fenced(found["command"], ""),
        f"{len(found['answers'])} questions, greedy, at most {found['max_tokens']} tokens, "
        "unedited; [...] marks an answer that was cut off there.", "",
    ]  # fmt: skip
    for i, x in enumerate(found["answers"], 1):
        lines += [f"**{i}.** {x['prompt']}", ""]
        for name, who in (("This model", "student"), ("Plain model", "teacher")):
            cut = " [...]" if x[who]["finish_reason"] == "length" else ""
            lines += [f"{name}:", "", *fenced((x[who]["text"].strip() or "(nothing)") + cut)]
    return lines


def limits(f: facts.Facts, found: dict, pairs: Sequence) -> list:
    """What the model cannot do, in figures where there are some."""
    worst = max(found["lengths"], key=lambda x: x["perplexity_ratio"])
    cells = [[c for r in column if r for c in r["cells"]] for column in zip(*pairs, strict=True)]
    said = [f"{sum(c['right'] for c in x)} of {sum(c['trials'] for c in x)}" for x in cells]
    return [
        "## Limits", "",
        "- A model of this size says wrong things in good English, and its answers above are what "
        "they are. It is there to try the program with; check what it tells you.",
        "- Asked about a document of thousands of tokens it finds facts, but other replies tend to "
        "repeat themselves; [docs/chat.md](../../../docs/chat.md) shows some.",
        f"- Its perplexity is {worst['perplexity_ratio']:.3f} times the plain model's at "
        f"{worst['length']:,} tokens, and it finds {said[0]} needles, the plain one {said[1]} "
        "it was asked for.",
        f"- Made for {f.positions:,} tokens; what is not in the tables above was not measured.",
        "- English only.", "",
    ]  # fmt: skip


def licence(base_id: str) -> list:
    """The last section."""
    return [
        "## Licence", "",
        f"Apache-2.0, as {base_id}, from whose weights it was made by the steps above, which "
        "changed them. The licences of the text it was trained on are in "
        "[tools/transfer_torch](../../../tools/transfer_torch/README.md).",
    ]  # fmt: skip


def card(folder: Path, base_id: str, commands: str, logs: list, found: dict) -> str:
    """The whole text.

    Args:
        logs: As in training. found: {"perplexity", "answers": results, "needles": pairs}.

    Raises:
        HydraError: The folder is no model.
    """
    f = facts.read(folder)
    if f.args is None or f.form == "plain":
        raise UsageError(f"{folder} is no HydraHead model.")
    lines = [
        *head(f, base_id), *USE.format(name=f.path.name).split("\n"), *training(commands, logs),
        *perplexity(found["perplexity"]), *needles(found["needles"]), *answers(found["answers"]),
        *limits(f, found["perplexity"], found["needles"]), *licence(base_id),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def work(args: argparse.Namespace) -> int:
    """Read, check and write; returns the exit code."""
    folder = args.folder.expanduser()
    one = {k: read_result(k, getattr(args, k)) for k in ("perplexity", "answers")}
    pairs = [
        tuple(None if str(p) == "-" else read_result("needles", p) for p in paths)
        for paths in args.needles
    ]
    for pair, paths in zip(pairs, args.needles, strict=True):
        if pair[0] is None:
            raise UsageError("--needles - FILE: the first is this model's result.")
        if pair[1] is not None:
            require_pair(*pair, paths)
    own = [(getattr(args, k), one[k]) for k in one]
    require_same(folder, own + [(p[0], x[0]) for p, x in zip(args.needles, pairs, strict=True)])
    logs = [read_log(p) for p in args.log]
    text = card(folder, args.base_id, read_text(args.commands), logs, {**one, "needles": pairs})
    target = folder / "README.md"
    write_whole(target, lambda beside: beside.write_text(text, "utf-8"))
    cli.say(f"Wrote {target}.")
    return 0


def main(argv: list | None = None) -> int:
    """Entry point; returns the exit code."""
    return cli.run(build_parser(), work, argv)


if __name__ == "__main__":
    sys.exit(main())
