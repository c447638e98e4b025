"""Errors meant for people: what was found, what was expected, what to type next."""


class HydraError(Exception):
    """A problem the user can mend. Programs print it in one or two lines and exit with 2.

    Args:
        message: What was found and what was expected, one line.
        hint: What to type or change next, one line; may be empty.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class ConfigError(HydraError):
    """config.json is missing, malformed or contradicts itself."""


class CheckpointError(HydraError):
    """Weights are missing, truncated, unreadable or do not fit the config."""


class CacheError(HydraError):
    """A prompt cache is unreadable or belongs to another model."""


class UsageError(HydraError):
    """A flag, a prompt or a path cannot be honoured."""
