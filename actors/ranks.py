"""A group of rank actors that train one model together: the policy's, or the critic's."""

import socket
from collections.abc import Callable, Sequence

import ray
from ray.actor import ActorHandle


class RankGroup:
    """The ranks of one role, which meet in collectives of their own. start_again brings others in the place of all, and
    dismiss ends them, dead or alive."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[ActorHandle],
        start_again: Callable[[], Sequence[ActorHandle]],
        dismiss: Callable[[Sequence[ActorHandle]], None],
    ) -> None:
        self.ranks = list(ranks)
        self._name, self._start_again, self._dismiss = name, start_again, dismiss

    def hire_again(self) -> None:
        """Other ranks in the place of all; those that are left wait for a dead one in a collective."""
        self._dismiss(self.ranks)
        self.ranks = list(self._start_again())

    def begin_setup(self) -> dict[str, ray.ObjectRef]:
        """Starts the set-up of all ranks, which wait for each other; the caller waits for the answers."""
        meeting_point: ray.ObjectRef[str] = self.ranks[0].meeting_point.remote()
        return self.named([rank.setup.remote(meeting_point) for rank in self.ranks])

    def named(self, refs: Sequence[ray.ObjectRef]) -> dict[str, ray.ObjectRef]:
        """One answer a rank, by who gives it."""
        return {self.name_of(number): ref for number, ref in enumerate(refs)}

    def name_of(self, number: int) -> str:
        return f"{self._name} rank {number}"

    def has(self, actor_id: str) -> bool:
        """Whether an actor (hex id) is one of the ranks."""
        return actor_id in {rank._actor_id.hex() for rank in self.ranks}


def free_address() -> str:
    """host:port of this node, where the ranks of a group may meet: rank 0 is asked, and its system picks the port."""
    address: str = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as probe:
        return f"{address}:{probe.getsockname()[1]}"
