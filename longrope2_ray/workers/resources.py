"""What the cluster has, and what one worker takes of it."""

import logging
from collections.abc import Collection, Iterable, Mapping

import ray

from longrope2_ray.recipe.sections import ScorerSection

log = logging.getLogger("longrope2")


def capacity(nodes: Iterable[Mapping[str, float]], resources: Mapping[str, float]) -> int:
    """How many actors of ``resources`` each the nodes have room for; none spans two."""
    return sum(
        int(min(node.get(name, 0) / amount + 1e-9 for name, amount in resources.items() if amount))
        for node in nodes
    )


def node_resources(without: Collection[str] = ()) -> list[Mapping[str, float]]:
    """What each living node of the cluster has, but for those whose ids are in ``without``."""
    return [
        node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in without
    ]


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away soon: a spot notice, ``ray drain-node``, an autoscaler that scales down.
    Ray has no public call for it; Ray Train asks the same one."""
    try:
        return set(ray._private.state.state.get_draining_nodes())
    except Exception as error:  # of another version: a notice then costs the unit in flight
        log.debug("cannot ask which nodes are being drained: %s", error)
        return set()


def _brief(cluster: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in cluster.items() if name in ("CPU", "GPU")}


def scorer_resources(
    settings: ScorerSection, device: str, cluster: Mapping[str, float]
) -> dict[str, float]:
    """What one scorer takes: CPUs, and GPUs where the cluster has any and the recipe does not say cpu."""
    with_gpu = device == "cuda" or (device == "auto" and cluster.get("GPU", 0) > 0)
    return {"CPU": settings.cpus_per_scorer, "GPU": settings.gpus_per_scorer if with_gpu else 0}
