"""Twenty everyday questions to a HydraHead model and to the model it was made from.

    python tools/side_by_side.py MODEL BASE --out answers.json

BASE is the plain model (GGUF, folder or hub id), with every head full attention as --head-map
identity makes it, in float32. Both get the same tokens, of MODEL's chat template, and answer
greedily. The answers are written as they come; nothing is chosen or mended.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import hydra_mlx
from hydra_mlx import cli
from hydra_mlx.errors import UsageError
from hydra_mlx.files import write_json
from hydra_mlx.journal import command_line, versions
from hydra_mlx.manifest import model_hash, model_name

FORMAT = "hydra_mlx side by side"
PROMPTS = (
    "What is the capital of Australia?",
    "Why do leaves change colour in autumn? Answer in two sentences.",
    "Who wrote the play Romeo and Juliet, and in which century?",
    "List five things to pack for a day of hiking.",
    "Give me three names for a small bakery by the sea.",
    "Rewrite this sentence politely: Send me the report today.",
    "Correct the spelling: I recieved you're mesage yesturday.",
    "Put this into the past tense: She runs to the station and takes the first train.",
    "Translate into French: Good morning, where is the train station?",
    "Write a Python function that returns the larger of two numbers.",
    "Write a shell command that counts the lines of the file notes.txt.",
    "What is 17 + 25?",
    "A train leaves at 9:40 and arrives at 11:05. How long is the journey?",
    "Write a poem of four lines about rain.",
    "Write a short email to my landlord: the kitchen tap is dripping.",
    "Explain to a child why the moon seems to change its shape.",
    "Summarise in one sentence: The library was built in 1904 with money that a shipowner had "
    "left. It burned down in 1941, and the town read in a school until the new building opened in "
    "1956. Today it lends more films than books, but the reading room is full every afternoon.",
    "Anna is taller than Ben. Ben is taller than Clara. Who is the shortest?",
    "From this text give only the date and the place: The meeting is moved from Tuesday to Friday, "
    "12 May, and will be held in the town hall.",
    "Is this review positive or negative? The soup was cold and we waited for an hour.",
)


def build_parser() -> cli.Parser:
    """The flags."""
    p = cli.Parser("side_by_side.py", __doc__)
    p.add_argument("model", metavar="MODEL", help="folder of a HydraHead model")
    p.add_argument("base", metavar="BASE", help="the plain model it was made from")
    p.add_argument(
        "--max-tokens", type=cli.number(int, 1), default=120, metavar="N", help="of an answer"
    )
    p.add_argument("--out", metavar="FILE", type=Path, required=True, help="JSON to write")
    cli.add_common(p)
    return p


def answer(model: Any, tokenizer: Any, ids: list, max_tokens: int) -> dict:
    """The greedy reply to a prompt of token ids: {"text", "tokens", "finish_reason"}."""
    parts = list(hydra_mlx.stream_generate(model, tokenizer, ids, max_tokens))
    return {
        "text": "".join(p.text for p in parts),
        "tokens": sum(p.token is not None for p in parts),
        "finish_reason": parts[-1].finish_reason,
    }


def work(args: argparse.Namespace) -> int:
    """Ask both and write; returns the exit code."""
    from hydra_mlx.convert import resolve_source
    from hydra_mlx.loading import resolve_path
    from hydra_mlx.teacher import load_teacher, open_base

    out = args.out.expanduser()
    cli.check_target(out)
    folder, source = resolve_path(args.model), open_base(resolve_source(args.base, None))
    model, tokenizer = hydra_mlx.load(folder)
    base = load_teacher(source)
    if model.args.vocab_size != source.args.vocab_size:
        sizes = f"MODEL knows {model.args.vocab_size:,} tokens, BASE {source.args.vocab_size:,}."
        raise UsageError(sizes)
    if not tokenizer.chat_template:
        raise UsageError(f"{folder} has no chat template.")
    answers = []
    with cli.Meter("asking", args.quiet, unit="questions") as meter:
        for i, prompt in enumerate(PROMPTS):
            meter("asking", i, len(PROMPTS))
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True
            )
            row = {"prompt": prompt}
            for name, one in (("student", model), ("teacher", base)):
                row[name] = answer(one, tokenizer, ids, args.max_tokens)
            answers.append(row)
    result = {
        "format": FORMAT,
        "command": command_line("python tools/side_by_side.py", args.argv),
        "model": {"name": model_name(args.model, folder), "sha256": model_hash(folder)},
        "base": {"name": model_name(args.base, source.path), "sha256": model_hash(source.path)},
        "max_tokens": args.max_tokens,
        "weights": model.load_report.weights,
        "versions": versions(),
        "answers": answers,
    }
    write_json(out, result)
    return 0


def main(argv: list | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run(args: argparse.Namespace) -> int:
        args.argv = argv
        return work(args)

    return cli.run(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
