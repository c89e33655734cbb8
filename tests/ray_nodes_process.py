"""A Ray cluster of several nodes on this machine, in a process of its own so that it has its own token and can be ended
whole: `python ray_nodes_process.py`, requests and answers as JSON lines. Used by ray_nodes.py."""

import json
import sys
from typing import Any

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster()
    nodes: dict[str, Any] = {}
    answers, sys.stdout = sys.stdout, sys.stderr  # Ray prints
    for line in sys.stdin:
        request = json.loads(line)
        name = request["name"]
        if request["do"] == "add":
            more = {} if nodes else {"include_dashboard": False}
            nodes[name] = cluster.add_node(
                wait=True,
                num_cpus=request["cpus"],
                resources=request["resources"],
                object_store_memory=80 << 20,
                **more,
            )
            answer = {"node_id": nodes[name].node_id, "address": cluster.address}
        else:  # without notice, as when power fails
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
            answer = {}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
