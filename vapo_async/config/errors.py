"""How a run or its configuration is refused."""


class ConfigError(ValueError):
    """A user's mistake, told in one line: what was found, what was expected, what to do."""


class RunError(RuntimeError):
    """A run that cannot go on, told in one line: who failed or waited for whom, and what to do.

    Lines below the first are evidence.
    """
