"""Raise these for a user's mistake: a message names field, value, what is accepted and the fix."""


class MegatronModeError(Exception):
    """Report what a user can mend; programs print one sentence and leave with `exit_status`."""

    exit_status = 2


class ConfigError(MegatronModeError):
    """Report a configuration or a command line that cannot run."""


class DataError(MegatronModeError):
    """Report input text, a tokenizer or a prepared source that cannot be used."""


class CheckpointError(MegatronModeError):
    """Report a checkpoint that is missing, damaged or belongs to another run."""


class DamagedError(CheckpointError):
    """Report a checkpoint that is not what was written; `checkpoint.fallback` passes it over."""


class StallError(MegatronModeError):
    """Report processes that wait for others in vain; `engine/watchdog` ends a run alike."""

    exit_status = 4


class HealthError(MegatronModeError):
    """Report that training ended because a step cannot be right (a policy of `health`)."""

    exit_status = 3
