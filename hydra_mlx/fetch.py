"""Fetches models from the hub, into its own cache; what is wrong is told in words."""

from pathlib import Path

from .errors import UsageError
from .folder import is_whole

HUB_PATTERNS = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "merges.txt", "vocab.txt"]
WAIT_S = 5.0  # for the hub's first answer


def _hub_error(error: Exception, repo_id: str, revision: str | None) -> UsageError:
    """The error of huggingface_hub in words, with the next step."""
    from huggingface_hub import errors

    wanted = f"{repo_id!r} at revision {revision!r}" if revision else repr(repo_id)
    if isinstance(error, errors.GatedRepoError):
        hint = "Accept the terms on the page of the model, then run: hf auth login"
        return UsageError(f"{repo_id!r} is gated: the hub asks for a login.", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageError(f"{repo_id!r} has no revision {revision!r}.", "Try --revision main.")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "Check the spelling (owner/name); for a private one run: hf auth login"
        return UsageError(f"The hub has no repository {repo_id!r} that you may read.", hint)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo_id!r} is not a name on the hub.", "Expected: owner/name.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        hint = "Unset HF_HUB_OFFLINE, or give the path of a local folder."
        return UsageError(f"HF_HUB_OFFLINE is set and {wanted} is not in the cache.", hint)
    hint = "Check the network and HF_ENDPOINT, or give the path of a local folder."
    reason = f"{error}".strip().split("\n")[0][:120] or type(error).__name__
    return UsageError(f"Cannot fetch {wanted} from the hub: {reason}", hint)


def _snapshot(repo_id: str, revision: str | None, local: bool) -> Path:
    """huggingface_hub's snapshot_download; raises what the library raises."""
    from huggingface_hub import snapshot_download

    options = {"allow_patterns": HUB_PATTERNS, "etag_timeout": WAIT_S, "local_files_only": local}
    return Path(snapshot_download(repo_id, revision=revision, **options))


def _hub_is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def fetch_hub(repo_id: str, revision: str | None = None, progress: bool = True) -> Path:
    """The folder of a model repository, downloaded where it is not in the hub's cache yet.

    Args:
        repo_id: "owner/name".
        revision: Branch, tag or commit; None is the main branch.
        progress: Show the hub's progress bars on stderr.

    Returns:
        The snapshot folder: config.json, safetensors, tokenizer files.

    Raises:
        UsageError: no network, no such repository or revision, gated, or nothing usable in it.
    """
    from huggingface_hub import errors, utils

    quiet = not progress and not utils.are_progress_bars_disabled()
    if quiet:
        utils.disable_progress_bars()
    try:
        folder = _snapshot(repo_id, revision, local=_hub_is_off())
    except Exception as e:  # the hub's own errors and those of its HTTP client share no base
        cause = errors.OfflineModeIsEnabled() if _hub_is_off() else e
        raise _hub_error(cause, repo_id, revision) from e
    finally:
        if quiet:
            utils.enable_progress_bars()
    if not is_whole(folder):
        raise UsageError(
            f"{repo_id!r} has no complete set of config.json and safetensors.",
            "Choose a repository with safetensors; if the network broke off, run this again.",
        )
    return folder
