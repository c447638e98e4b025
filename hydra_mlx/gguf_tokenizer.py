"""Writes a Hugging Face tokenizer folder from the metadata of a GGUF file.

A GGUF carries the whole tokenizer: vocabulary, merges, special tokens and chat template. Only
the pre-tokeniser (how text is cut before the merges) is a mere name in it; PRE_TOKENIZERS says
what each name means. Byte-level BPE ("gpt2") is what current Llama, Qwen and SmolLM files use;
SentencePiece vocabularies are refused, since they cannot be rebuilt exactly from a GGUF.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError

AGAIN = "The file is damaged or cut short: download it again."
KEY = "tokenizer.ggml."
# Kinds of token in tokenizer.ggml.token_type (1 is a plain token, 5 an unused one, 6 a byte).
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges; the parts apply in this order.

    Attributes:
        nfc: Unicode NFC first.
        digits: Each digit alone.
        split: Regular expression whose matches become the pieces; None uses GPT-2's.
        whole_words: A piece that is in the vocabulary is taken as it is, without the merges.
    """

    nfc: bool = False
    digits: bool = False
    split: str | None = None
    whole_words: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "default": PreTokenizer(),
    "smollm": PreTokenizer(digits=True),
    "llama-bpe": PreTokenizer(
        split=rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", whole_words=True
    ),
    "qwen2": PreTokenizer(nfc=True, split=rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}"),
}


def _strings(meta: dict, name: str) -> list[str]:
    found = meta.get(KEY + name)
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found) or not found:
        raise CheckpointError(f"GGUF metadata: {KEY}{name} is not a list of texts.", AGAIN)
    return found


def _token(meta: dict, tokens: list[str], name: str) -> str | None:
    """The text of the token whose id is under `name`, or None where the file names none."""
    at = meta.get(f"{KEY}{name}_token_id")
    if at is None:
        return None
    if type(at) is not int or not 0 <= at < len(tokens):
        raise CheckpointError(
            f"GGUF metadata: {name}_token_id is {at!r}, the vocabulary has {len(tokens)}.", AGAIN
        )
    return tokens[at]


def _pre_tokenizer(meta: dict) -> PreTokenizer:
    """The table entry for this file; refuses what would give other token ids than llama.cpp."""
    model = meta.get(KEY + "model")
    if model != "gpt2":
        raise CheckpointError(
            f"This GGUF has a tokenizer of the kind {model!r}; only 'gpt2' (byte-level BPE) is "
            "supported.",
            "Convert the Hugging Face safetensors of this model instead.",
        )
    pre = meta.get(KEY + "pre", "default")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"This GGUF cuts text by the rules {pre!r}; known are {', '.join(PRE_TOKENIZERS)}.",
            "Convert the Hugging Face safetensors of this model instead.",
        )
    return PRE_TOKENIZERS[pre]


def build_tokenizer(meta: dict):
    """The tokenizer of a GGUF file.

    Args:
        meta: GGUFFile.metadata.

    Returns:
        A tokenizers.Tokenizer.

    Raises:
        CheckpointError: another kind of tokenizer, or parts missing or contradicting each other.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre

    rules = _pre_tokenizer(meta)
    tokens, merges = _strings(meta, "tokens"), _strings(meta, "merges")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError("GGUF metadata: a token is in the vocabulary twice.", AGAIN)
    pairs = [tuple(merge.split(" ")) for merge in merges]  # a blank inside a token is written Ġ
    kinds = meta.get(KEY + "token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise CheckpointError("GGUF metadata: token_type and tokens differ in length.", AGAIN)
    try:
        model = models.BPE(vocab, pairs, fuse_unk=False, ignore_merges=rules.whole_words)
    except Exception as e:  # the library raises a plain Exception on a merge outside the vocabulary
        raise CheckpointError(f"GGUF metadata: the merges are unusable ({e}).", AGAIN) from e
    out = Tokenizer(model)
    if rules.nfc:
        out.normalizer = normalizers.NFC()
    steps = [pre.Digits(individual_digits=True)] if rules.digits else []
    if rules.split:
        steps.append(pre.Split(Regex(rules.split), "isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=rules.split is None))
    out.pre_tokenizer = pre.Sequence(steps)
    out.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, kinds, strict=bool(kinds))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
    ]
    out.add_tokens(added)
    bos = _token(meta, tokens, "bos")
    if meta.get(KEY + "add_bos_token") is True and bos is not None:
        out.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=[bos, "$A"],
                    pair=[bos, "$A", f"{bos}:1", "$B:1"],
                    special_tokens=[(bos, vocab[bos])],
                ),
            ]
        )
    return out


def write_tokenizer(meta: dict, folder: str | Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into an existing folder.

    transformers.AutoTokenizer and mlx_lm.tokenizer_utils.load read the folder without a network.

    Args:
        meta: GGUFFile.metadata.
        folder: Where to write; other files there are left alone.

    Raises:
        CheckpointError: see build_tokenizer.
    """
    tokenizer = build_tokenizer(meta)
    tokens = _strings(meta, "tokens")
    config = {
        # The generic class: it takes tokenizer.json as it is, others would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": meta.get(KEY + "add_bos_token") is True,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
    }
    for name, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        token = _token(meta, tokens, name)
        if token is not None:
            config[f"{ours}_token"] = token
    # Batches need a pad token; the end token does the same work where the file names none.
    if "pad_token" not in config and "eos_token" in config:
        config["pad_token"] = config["eos_token"]
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        config["chat_template"] = template
    length = meta.get(f"{meta.get('general.architecture')}.context_length")
    if type(length) is int and length > 0:
        config["model_max_length"] = length
    folder = Path(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
