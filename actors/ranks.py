"""A group of rank actors that train one model together: the policy's, or the critic's."""

import socket
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle


class RankGroup:
    """The ranks of one role, which meet in collectives of their own. dismiss ends them, dead or alive."""

    def __init__(
        self,
        name: str,
        hire: Callable[[], Sequence[ActorHandle]],
        dismiss: Callable[[Sequence[ActorHandle]], None],
    ) -> None:
        self._name, self._hire, self._dismiss = name, hire, dismiss
        self.ranks = list(hire())

    def hire_again(self) -> None:
        """Other ranks in the place of all; those that are left wait for a dead one in a collective."""
        self._dismiss(self.ranks)
        self.ranks = list(self._hire())

    def begin_setup(self) -> dict[str, ray.ObjectRef]:
        """Starts the set-up of all ranks, which wait for each other; the caller waits for the answers."""
        meeting_point: ray.ObjectRef[str] = self.ranks[0].meeting_point.remote()
        return self.named([rank.setup.remote(meeting_point) for rank in self.ranks])

    def named(self, refs: Sequence[ray.ObjectRef]) -> dict[str, ray.ObjectRef]:
        """One answer a rank, by who gives it."""
        return {f"{self._name} rank {number}": ref for number, ref in enumerate(refs)}

    def has(self, actor_id: str) -> bool:
        """Whether an actor (hex id) is one of the ranks."""
        return actor_id in {rank._actor_id.hex() for rank in self.ranks}


def free_address() -> str:
    """host:port of this node, where the ranks of a group may meet: rank 0 is asked, and its system picks the port."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"
