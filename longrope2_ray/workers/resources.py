"""The resources of the cluster, and the number of workers that it has room for."""

import logging
from collections.abc import Collection, Iterable, Mapping

import ray

log = logging.getLogger("longrope2")


class Cluster:
    """The cluster that this process is connected to, as the pool asks about it."""

    def resources(self) -> Mapping[str, float]:
        """Return the total of every resource."""
        return dict(ray.cluster_resources())

    def nodes(self, without: Collection[str] = ()) -> list[Mapping[str, float]]:
        """Return the resources of each living node whose id is not in ``without``."""
        return [
            node["Resources"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] not in without
        ]

    def draining_nodes(self) -> set[str]:
        """Return the ids of the nodes that will be taken away soon.

        A spot notice, ``ray drain-node`` and an autoscaler that scales down all announce it. Ray
        has no public call for it; Ray Train uses the same one. In a version without it, a notice
        costs the unit under way.
        """
        try:
            return set(ray._private.state.state.get_draining_nodes())
        except Exception as error:
            log.debug("cannot ask which nodes are being drained: %s", error)
            return set()


def capacity(nodes: Iterable[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """Return how many workers the nodes have room for; each takes ``resources`` on one node."""
    return sum(
        int(min(node.get(name, 0) / amount + 1e-9 for name, amount in resources.items() if amount))
        for node in nodes
    )


def use_gpu(device: str, cluster: Mapping[str, float]) -> bool:
    """Tell whether workers take GPUs: with ``cuda``, and with ``auto`` if the cluster has any."""
    return device == "cuda" or (device == "auto" and cluster.get("GPU", 0) > 0)


def brief(cluster: Mapping[str, float]) -> dict[str, float]:
    """Return the resources that a message names: CPUs and GPUs."""
    return {name: amount for name, amount in cluster.items() if name in ("CPU", "GPU")}
