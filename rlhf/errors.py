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


class TrainerDied(ActorDied):
    """A rank of the policy or of the critic ended, and no other actor as far as is known: the trainer, both of them, is
    built again alone."""


class WorkerLost(ActorDied):
    """A worker of a pool died, hung or left and is replaced. `counted`: what it was working on may be the cause."""

    def __init__(self, message: str, *, counted: bool) -> None:
        super().__init__(message)
        self.counted = counted


class EngineLost(ActorDied):
    """A rollout engine lost one of its processes and cannot go on; another one can take its place."""


class HandleLost(ActorDied):
    """What a handle stood for went with the node that held it; it can be made again."""


class WeightMismatch(RunFailed):
    """An engine does not hold the weights that were published; the message names the tensor or the probe token."""


class JudgeFailed(RunFailed):
    """A judge raised, hung or answered with the wrong number of values; the message carries its traceback.

    reason, what the ledger keeps: one line without the samples; the message's first line unless given. again, whether
    the same call may go better.
    """

    def __init__(self, message: str, reason: str | None = None, *, again: bool = True) -> None:
        super().__init__(message, reason)  # both, so that it survives pickling
        self.reason = reason or message.splitlines()[0]
        self.again = again

    def __str__(self) -> str:
        return str(self.args[0])


class NothingScored(JudgeFailed):
    """A judge answered, and could score no sample of the group."""


class DeadlinePassed(RunFailed):
    """A wait took longer than it may; the message names who is late and what it holds."""
