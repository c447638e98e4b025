"""A model folder as far as config.json and the headers tell; nothing heavy is imported."""

import json
import os
from pathlib import Path

from .config import HydraArgs
from .errors import CheckpointError, ConfigError, UsageError


def read_config(folder: Path) -> dict:
    """config.json of a model folder as a dict.

    Raises:
        ConfigError: Absent or not a JSON object.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not a folder.", "Give the folder of a converted model or a hub id."
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} has no config.json; it is not a model folder.",
            "Give the folder that holds config.json and the weights.",
        ) from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} cannot be read ({type(e).__name__}).") from None
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not valid JSON ({e}).") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}, expected an object.")
    return config


def is_whole(folder: Path) -> bool:
    """Has the folder a config and all its weights? (A fetch that broke off leaves a part.)"""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return any(folder.glob("*.safetensors"))
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False
    return all((folder / str(shard)).is_file() for shard in shards)


def check_sizes(args: HydraArgs, headers: dict):
    """Refuse a config whose numbers do not fit the files before any memory is asked for.

    Raises:
        CheckpointError: More layers or a larger embedding than the files hold.
    """
    layers = {n.split(".")[2] for n in headers if n.startswith("model.layers.")}
    if len(layers) != args.num_hidden_layers:
        raise CheckpointError(
            f"config.json says {args.num_hidden_layers} layers, the weights have {len(layers)}."
        )
    embed = headers.get("model.embed_tokens.weight")
    if embed is not None and embed.shape[:1] != (args.vocab_size,):
        raise CheckpointError(
            f"config.json says vocab_size {args.vocab_size}, the embedding has shape "
            f"{list(embed.shape)}."
        )


def memory_bytes() -> int:
    """Physical memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
