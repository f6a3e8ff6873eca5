"""The one error a user can cause: a single message that names the value, the rule and the remedy."""


class CinemeshError(Exception):
    """A mistake in a plan, a config, the data or the environment.

    The message is one or two sentences: what was given, the rule it breaks with its numbers, what to do.
    Commands print it without a traceback and exit with code 2. A bug is an ``assert``, never this.
    """
