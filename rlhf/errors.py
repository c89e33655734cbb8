"""The errors that have a meaning at the command line, one class an exit code.

Everything else that is raised is a defect or a failure of the run and ends with exit code 4 and its traceback.
"""


class BadInput(Exception):
    """A config, data or model that cannot be used (exit code 2).

    The message names the place (file and key, row or tensor), what was found and what is expected.
    """


class NoCapacity(Exception):
    """The cluster cannot hold the run within the deadline (exit code 3): what was asked, what there is, what is
    missing."""


class RunFailed(Exception):
    """The run failed for good (exit code 4): which part, doing what, for which prompts or version."""


class ActorDied(RunFailed):
    """A process of the team ended. Nothing that was stored is lost, so the team can be built again and go on."""


class WeightMismatch(RunFailed):
    """An engine does not hold the weights that were published; the message names the tensor or the probe token."""


class JudgeFailed(RunFailed):
    """A judge raised, hung or answered with the wrong number of values; the message carries its traceback."""


class DeadlinePassed(RunFailed):
    """A wait took longer than it may; the message names who is late and what it holds."""
