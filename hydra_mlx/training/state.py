"""What a stage leaves on disk so that a killed run goes on exactly where it was.

RUN/recipe.json       what decides the course of the stage; another recipe does not continue it
RUN/step-00000200/    weights and optimizer after 200 steps, written beside and renamed
RUN/losses.jsonl      one line for each report; cut back to the state that a run resumes from

Nothing is drawn at random while training but the order of the text, which follows from the seed
and the step; so these are the whole state.
"""

import fcntl
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, UsageError
from ..files import sync_folder, write_json, write_whole
from ..shards import load_arrays, read_header
from .steps import Recipe, Trainer

STATE = "state.safetensors"
LOG = "losses.jsonl"


class Run:
    """The folder of one stage.

    Args:
        folder: Made if absent. recipe: Of the stage. inputs: {name: fingerprint} of student,
            teacher and text. keep: States to keep. restart: Forget what the folder holds.

    Raises:
        UsageError: The folder belongs to a run with another recipe or other inputs, or another
            process is at it.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, inputs: dict, keep: int, restart: bool = False
    ):
        self.folder, self.keep = folder, keep
        mine = {**asdict(recipe), **inputs}
        path = folder / "recipe.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("w")  # let go when the process ends
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if restart:
                path.unlink(missing_ok=True)
                (folder / LOG).unlink(missing_ok=True)
                for state in self.states():
                    shutil.rmtree(state)
            for partial in folder.glob(".partial-*"):
                shutil.rmtree(partial, ignore_errors=True)
            if path.is_file():
                _require_same(path, mine)
            else:
                write_json(path, mine)
        except BlockingIOError:
            raise UsageError(f"Another run is writing {folder}.", "Wait for it to end.") from None
        except OSError as e:
            raise UsageError(
                f"{folder} cannot be written ({e.strerror or e}).", "Choose another --out."
            ) from None

    def states(self) -> list:
        """Folders of the states there are, oldest first."""
        return sorted(p for p in self.folder.glob("step-*") if p.is_dir())

    def save(self, trainer: Trainer):
        """Write a state beside and rename it, then drop the oldest."""
        step = trainer.step
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            return
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.folder))
        mx.save_safetensors(str(partial / STATE), trainer.arrays(), {"step": str(step)})
        sync_folder(partial)
        partial.rename(target)
        sync_folder(self.folder, files=False)
        for old in self.states()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def resume(self, trainer: Trainer) -> int:
        """Put the newest state into the trainer and cut the log back to it.

        Returns:
            Steps done; 0 when there is no state.

        Raises:
            CheckpointError: The newest state is damaged.
        """
        states = self.states()
        step = int(states[-1].name.removeprefix("step-")) if states else 0
        if states:
            file = states[-1] / STATE
            read_header(file)  # refuses a truncated file by name
            arrays = load_arrays(file)
            if set(arrays) != set(trainer.arrays()):
                raise CheckpointError(f"{file} is of another model.")
            trainer.restore(arrays, step)
        kept = [r for r in read_log(self.folder / LOG) if step and r.get("step", 0) <= step]
        lines = "".join(json.dumps(r) + "\n" for r in kept)
        write_whole(self.folder / LOG, lambda beside: beside.write_text(lines, "utf-8"))
        return step

    def log(self, record: dict):
        """Add a line to losses.jsonl."""
        with (self.folder / LOG).open("a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")


def _require_same(path: Path, mine: dict):
    try:
        theirs = json.loads(path.read_text("utf-8"))
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise UsageError(
            f"{path} is damaged.", "Add --restart to begin anew, or choose another --out."
        )
    other = [k for k in mine if theirs.get(k) != mine[k]]
    if other:
        raise UsageError(
            f"{path.parent} is of a run with another {', '.join(other)}.",
            "Repeat that run's flags to continue it, add --restart to begin anew, or choose "
            "another --out.",
        )


def read_log(path: Path) -> list:
    """The records of a losses.jsonl; a line torn by a kill is left out."""
    out = []
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                out.append(record)
    return out
