"""The actors behind a pool: started, placed, loaded, watched and dropped."""

import logging
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

import ray
from ray.actor import ActorHandle

from longrope2_ray.workers.failures import Limits
from longrope2_ray.workers.resources import Cluster, brief, capacity

log = logging.getLogger("longrope2")
RESIZE_SECONDS = 5.0
LOOK_SECONDS = 1.0

Setup = Callable[[int], Callable[[Any], Any]]
Stage = Literal["placing", "loading", "idle", "busy"]


class Worker:
    """An actor that sets itself up once and then does one unit of work after another.

    Args:
        setup: number of this actor's GPUs -> the function that does a unit of work.
    """

    def __init__(self, setup: Setup):
        self._setup = setup

    def place(self) -> tuple[int, str]:
        """Return the process id and the node id, once the actor has a place in the cluster."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        """Set the worker up, such as by loading a model, and return once that is done."""
        self._work = self._setup(len(ray.get_gpu_ids()))

    def work(self, unit: Any) -> Any:
        """Do one unit of work."""
        return self._work(unit)


def actor_factory(setup: Setup, resources: Mapping[str, float]) -> Callable[[str], ActorHandle]:
    """Return a function that starts a worker with a given name.

    ``setup`` goes to Ray's object store, so that it is sent to a node once. Ray's own restarts and
    retries are off: they run a killed call twice. In a process that has a placement group, such as
    a study's trial, workers are placed outside of it. Their names are free in a namespace of their
    own, since trials that run at once belong to one job.
    """
    actor_class: Any = ray.remote(Worker)
    shared = ray.put(setup)
    options = {
        "namespace": f"longrope2-{uuid.uuid4().hex[:8]}",
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "max_restarts": 0,
        "max_task_retries": 0,
        "scheduling_strategy": "DEFAULT",
    }

    def make(name: str) -> ActorHandle:
        return actor_class.options(name=name, **options).remote(shared)

    return make


@dataclass(eq=False)
class Slot:
    """One actor as the driver sees it.

    Attributes:
        stage: what it is doing.
        since: monotonic time at which it entered its stage.
        process: its process id; 0 until it has a place.
        node: id of its node; empty until it has a place.
        task: the task that it is busy with.
        num_done: number of units that it has done.
    """

    name: str
    actor: ActorHandle
    stage: Stage = "placing"
    since: float = 0.0
    process: int = 0
    node: str = ""
    task: Any = None
    num_done: int = 0


class Actors:
    """The actors of a pool: as many as are wanted, or as the cluster has room for.

    An autoscaler sees the actors that wait for a place, and brings nodes for them.

    Args:
        make_actor: name -> a new actor with the methods of ``Worker``.
        num_actors: number of actors; 0 follows the size of the cluster.
        resources: resources that one actor takes, such as ``{"CPU": 1, "GPU": 1}``.
        name: name of the actors; a number follows it.
        cluster: the cluster, which is asked for its nodes and resources.
    """

    def __init__(
        self,
        make_actor: Callable[[str], ActorHandle],
        num_actors: int,
        resources: Mapping[str, float],
        name: str = "worker",
        cluster: Cluster | None = None,
    ):
        self.resources = resources
        self.cluster = cluster or Cluster()
        self.slots: dict[str, Slot] = {}
        self.idle: dict[str, Slot] = {}
        self.draining: set[str] = set()
        self._make_actor = make_actor
        self._num_actors = num_actors
        self._name = name
        self._num_made = 0
        # An answer that has not come yet -> the slot that owes it; and the answers that have come.
        self._asked: dict[Future[Any], Slot] = {}
        self._answers: SimpleQueue[Future[Any]] = SimpleQueue()
        self._resized = -math.inf
        self._looked = -math.inf

    def resize(self) -> None:
        """Start actors up to the wanted number; drop those that wait for room that is gone."""
        # Ray is asked for its nodes every few seconds, not for every result.
        now = time.monotonic()
        if now - self._resized < RESIZE_SECONDS:
            return
        self._resized = now
        wanted = self._num_actors or capacity(self.cluster.nodes(self.draining), self.resources)
        # Actors that wait for a place would keep an autoscaler's request open; those at work stay.
        waiting = [slot for slot in self.slots.values() if slot.stage == "placing"]
        for slot in waiting[: max(len(self.slots) - wanted, 0)]:
            self.drop(slot)
        while len(self.slots) < wanted:
            name = f"{self._name}-{self._num_made:02d}"
            self._num_made += 1
            slot = Slot(name, self._make_actor(name))
            self.slots[name] = slot
            # The answer comes once Ray has found a place, which may take as long as a new node.
            self.ask(slot, "placing", slot.actor.place.remote())

    def ask(self, slot: Slot, stage: Stage, ref: Any) -> None:
        """Put an actor into a stage that ends with its answer."""
        slot.stage = stage
        slot.since = time.monotonic()
        self.idle.pop(slot.name, None)
        answer = ref.future()
        self._asked[answer] = slot
        # Answers queue up by themselves, so that a look costs the same however many are asked.
        answer.add_done_callback(self._answers.put)

    def rest(self, slot: Slot) -> None:
        """Put an actor into the idle stage."""
        slot.stage = "idle"
        slot.since = time.monotonic()
        self.idle[slot.name] = slot

    def wait(self) -> None:
        """Wait up to a second for an answer, briefly where none is expected."""
        # The answer goes back into the queue, for ``answered`` to take it with all others.
        with suppress(Empty):
            self._answers.put(self._answers.get(timeout=1.0 if self._asked else 0.2))

    def answered(self) -> Iterator[tuple[Slot, Future[Any]]]:
        """Yield each answer that has come, with its actor; those of dropped actors are ignored."""
        while not self._answers.empty():
            answer = self._answers.get()
            slot = self._asked.pop(answer, None)
            if slot is not None:
                yield slot, answer

    def look(self) -> bool:
        """Ask which nodes are being drained, at most once a second; return whether it asked."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return False
        self._looked = now
        self.draining = self.cluster.draining_nodes()
        return True

    def overdue(self, limits: Limits) -> list[tuple[Slot, str]]:
        """Return the actors that are busy, or loading, for too long, with the reason in words."""
        seconds = {"busy": limits.stall_seconds, "loading": limits.load_seconds}
        fields = {"busy": "stall_seconds", "loading": "load_seconds"}
        now = time.monotonic()
        return [
            (slot, f"{stage} for {seconds[stage]:g} s ({limits.section}.{fields[stage]})")
            for slot in self.slots.values()
            if (stage := slot.stage) in seconds and now - slot.since > seconds[stage]
        ]

    def idle_slot(self, not_named: str | None) -> Slot | None:
        """Return an idle actor: the named one only if no other is idle or busy, else None."""
        other = next((slot for slot in self.idle.values() if slot.name != not_named), None)
        if other is not None:
            return other
        others_busy = any(slot.stage == "busy" for slot in self.slots.values())
        return None if others_busy else self.idle[str(not_named)]

    @property
    def some_are_up(self) -> bool:
        """Whether an actor is idle or busy."""
        return any(slot.stage in ("idle", "busy") for slot in self.slots.values())

    def on_draining_nodes(self) -> list[Slot]:
        """Return the actors that are not busy on nodes that will be taken away soon."""
        slots = self.slots.values()
        return [slot for slot in slots if slot.node in self.draining and slot.stage != "busy"]

    def drop(self, slot: Slot) -> None:
        """Stop an actor and forget it; the next resize starts another one."""
        # Ray itself may be gone.
        with suppress(Exception):
            ray.kill(slot.actor)
        self.slots.pop(slot.name, None)
        self.idle.pop(slot.name, None)
        for answer in [answer for answer, owner in self._asked.items() if owner is slot]:
            del self._asked[answer]
        # The next resize is due at once.
        self._resized = -math.inf

    def counts(self) -> dict[str, int]:
        """Return the number of actors by state."""
        stages = [slot.stage for slot in self.slots.values()]
        idle, busy = stages.count("idle"), stages.count("busy")
        return {"starting": len(stages) - idle - busy, "idle": idle, "busy": busy}

    @property
    def num_answers(self) -> int:
        """Number of answers that have come and were not taken yet."""
        return self._answers.qsize()

    def process_ids(self) -> dict[str, int]:
        """Return name -> process id of the actors that are idle or busy; for tests."""
        slots = self.slots.values()
        return {slot.name: slot.process for slot in slots if slot.stage in ("idle", "busy")}

    def describe_room(self) -> str:
        """Return in words what one actor takes and what the cluster has."""
        has = brief(self.cluster.resources())
        return f"one takes {dict(self.resources)}, the cluster has {has}"

    def close(self) -> None:
        """Stop every actor."""
        for slot in list(self.slots.values()):
            self.drop(slot)
