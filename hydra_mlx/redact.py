"""A bug report without the names of people, their folders and their secrets."""

import getpass
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

# Variables whose values say nothing about a person; of others only that they are set.
SHOWN = ("HYDRA_KERNELS", "HYDRA_BLAS", "HF_HUB_OFFLINE", "MLX_ENABLE_TF32", "OMP_NUM_THREADS")
NAMED = ("HYDRA_MLX_CACHE", "HF_HOME", "HF_ENDPOINT", "XDG_CACHE_HOME")


def environment() -> list:
    """Variables that matter, as lines of a report."""
    lines = [f"{n}={os.environ[n]}" for n in SHOWN if n in os.environ]
    return lines + [f"{n} is set" for n in NAMED if n in os.environ]


def without_names(said: str, secrets: Sequence = ()) -> str:
    """Text without the names of people and their folders.

    Args:
        secrets: Paths to take out whole: all but their last part goes.
    """
    home = str(Path.home())
    for path in secrets:
        above = os.path.dirname(path)
        if above not in ("", "/", ".", home):
            said = said.replace(above + "/", ".../")
    if len(home) > 1:
        said = re.sub(re.escape(home) + r"(?=\W|$)", "~", said)
    said = re.sub(r"/(home|Users|var/folders)/[^/\s'\",]+", "~", said)
    user = getpass.getuser()
    said = re.sub(rf"(?<=/){re.escape(user)}(?=\W|$)", "USER", said)
    host = platform.node()
    return said.replace(host, "HOST") if len(host) > 2 else said
