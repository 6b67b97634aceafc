"""Scorer actors on Ray and the pool that keeps them busy: elastic, self-healing, no mathematics.

The driver owns retries: an actor dies with its unit, the unit goes to another one. Actors come and go; pending ones are
what an autoscaler sees.
"""

import logging
import math
import os
import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.sections import ModelSection, ScorerSection
from longrope2_ray.search.scores import Score, Unit
from longrope2_ray.tasks.needle import NeedleSample
from longrope2_ray.workers.failures import _MEMORY, Decision, decide
from longrope2_ray.workers.resources import _brief, capacity, draining_nodes, node_resources

log = logging.getLogger("longrope2")


RESIZE_SECONDS = 5.0


class Scorer:
    """An actor that loads the model once and scores units until it is told to stop.

    Args:
        model: the recipe's model section.
        settings: the recipe's scorer section.
        needle_sets: name -> samples, the same objects for every scorer.
    """

    def __init__(
        self,
        model: ModelSection,
        settings: ScorerSection,
        needle_sets: Mapping[str, Sequence[NeedleSample]],
    ):
        self._model, self._settings, self._needle_sets = model, settings, needle_sets

    def place(self) -> tuple[int, str]:
        """(process id, id of the node), as soon as the actor has a place in the cluster."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        """Load the model; returns once it is resident."""
        from longrope2_ray.model.loading import load_model
        from longrope2_ray.model.spec import read_spec
        from longrope2_ray.search.scorer import NeedleScorer

        model, settings = self._model, self._settings
        spec = read_spec(model.path, original_length=model.original_length, **model.reading)
        loaded = load_model(
            model.path,
            **model.reading,
            dtype=model.dtype,
            device=model.device,
            attention=model.attention,
            num_gpus=max(1, len(ray.get_gpu_ids())),  # none where the cluster has none
            threads=settings.threads,
        )
        self._scorer = NeedleScorer(loaded, spec, mlp_chunk_tokens=settings.mlp_chunk_tokens)

    def score(
        self,
        needle_set: str,
        sample: int,
        values: Sequence[float],
        attention_factor: float,
        start_tokens: int,
    ) -> tuple[float, int, bool, float]:
        """(nll_sum, num_tokens, correct, seconds) of one sample under one vector."""
        needle = self._needle_sets[needle_set][sample]
        result = self._scorer.score(needle, np.array(values), attention_factor, start_tokens)
        return result.nll_sum, result.num_tokens, result.correct, result.seconds


Stage = Literal["placing", "loading", "idle", "busy"]


@dataclass
class _Slot:
    """One actor as the driver sees it: waiting for a place in the cluster, loading, idle, or busy with a unit."""

    name: str
    actor: ActorHandle
    stage: Stage = "placing"
    since: float = 0.0  # monotonic time of the stage
    unit: Unit | None = None
    handed_out: float = 0.0  # Unix time, for the record
    process: int = 0
    node: str = ""
    num_scored: int = 0


class ScorerPool:
    """Keeps ``num_scorers`` actors (or as many as the cluster has room for) and hands units to free ones.

    Args:
        make_actor: name -> a new actor with methods ``place()``, ``ready()`` and ``score``, as ``Scorer`` has them.
        num_scorers: how many; 0 follows the size of the cluster.
        resources: what one actor takes, e.g. ``{"CPU": 1, "GPU": 1}``.
        settings: attempts, stall, load and start limits.
    """

    def __init__(
        self,
        make_actor: Callable[[str], ActorHandle],
        num_scorers: int,
        resources: Mapping[str, float],
        settings: ScorerSection,
    ):
        self._make_actor, self._num_scorers, self._resources, self._settings = (
            make_actor,
            num_scorers,
            resources,
            settings,
        )
        self._slots: dict[str, _Slot] = {}
        self._idle: dict[str, _Slot] = {}
        self._asked: dict[Future[Any], _Slot] = {}  # answer that has not come yet -> who owes it
        self._answers: SimpleQueue[Future[Any]] = (
            SimpleQueue()
        )  # those that have come, some of them nobody's any more
        self._scores: list[Score] = []  # that have come in; another's failure loses none of them
        self._stopped: StoppedError | None = None  # a failure among the answers that will not mend
        self._queue: deque[Unit] = deque()
        self._attempts: dict[tuple[str, str, int], int] = {}
        self._disputed: dict[
            tuple[str, str, int], str
        ] = {}  # unit -> who said that its score is not finite
        self._losses = dict.fromkeys(("requeued", "deaths", "preemptions", "stalls", "disputed"), 0)
        self._made = self._failed_starts = 0
        self._resized, self._last_ready = -math.inf, time.monotonic()
        self._next_start = self._looked = -math.inf
        self._draining: set[str] = set()  # nodes that will be taken away soon
        self._resize()

    # --- the Scorers protocol

    def free(self) -> int:
        """Idle scorers that no queued unit waits for."""
        return len(self._idle) - len(self._queue)

    def submit(self, unit: Unit) -> None:
        """Queue a unit; the next idle scorer takes it."""
        self._queue.append(unit)
        self._dispatch()

    def wait(self) -> list[Score]:
        """Scores that have come in, waiting up to a second for the first.

        Raises:
            StoppedError: if a failure will not mend.
        """
        self._resize()
        self._look_after()
        self._dispatch()
        with suppress(Empty):
            self._answers.put(self._answers.get(timeout=1.0 if self._asked else 0.2))
        self._gather()
        if self._stopped is not None:
            raise self._stopped
        self._check_starting()
        self._dispatch()
        return self.flush()

    def flush(self) -> list[Score]:
        """Scores that have come in by now, whatever failed beside them; hands out nothing new."""
        self._gather()
        scores, self._scores = self._scores, []
        return scores

    def _gather(self) -> None:
        while not self._answers.empty():
            answer = self._answers.get()
            if answer not in self._asked:
                continue
            try:
                if score := self._collect(answer):
                    self._scores.append(score)
            except StoppedError as error:
                self._stopped = self._stopped or error

    def counts(self) -> dict[str, int]:
        """Scorers by state."""
        stages = [slot.stage for slot in self._slots.values()]
        idle, busy = stages.count("idle"), stages.count("busy")
        return {"starting": len(stages) - idle - busy, "idle": idle, "busy": busy}

    def losses(self) -> dict[str, int]:
        """What went wrong and was mended, by kind."""
        return dict(self._losses)

    def process_ids(self) -> dict[str, int]:
        """Name -> process id of the scorers that are up; for tests and people."""
        return {
            slot.name: slot.process
            for slot in self._slots.values()
            if slot.stage in ("idle", "busy")
        }

    def close(self) -> None:
        """Stop every scorer."""
        for slot in self._slots.values():
            with suppress(Exception):  # Ray itself may be gone
                ray.kill(slot.actor)
        self._slots.clear()

    # --- one actor's life

    def _enter(self, slot: _Slot, stage: Stage, ref: Any = None) -> None:
        slot.stage, slot.since = stage, time.monotonic()
        self._idle.pop(slot.name, None)
        if stage == "idle":
            self._idle[slot.name] = slot
        else:
            answer = ref.future()
            self._asked[answer] = slot
            answer.add_done_callback(
                self._answers.put
            )  # a look costs the same however many are asked

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            unit = self._queue[0]
            doubter = self._disputed.get(unit.key)
            slot = next((s for s in self._idle.values() if s.name != doubter), None)
            if slot is None:
                if any(s.stage == "busy" for s in self._slots.values()):
                    return  # a second opinion takes a second scorer, and there is one
                slot = self._idle[str(doubter)]
            self._queue.popleft()
            slot.unit, slot.handed_out = unit, time.time()
            vector = unit.factors
            numbers = vector.values.tolist(), vector.attention_factor, vector.start_tokens
            self._enter(
                slot, "busy", slot.actor.score.remote(unit.needle_set, unit.sample, *numbers)
            )

    def _collect(self, answer: Future[Any]) -> Score | None:
        """The score that an actor came back with; None if it only came up, or failed and its unit was requeued."""
        slot = self._asked.pop(answer)
        unit, slot.unit = slot.unit, None
        try:
            result = answer.result()
        except RayTaskError as error:  # the scorer raised; its process lives
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._failed(slot, unit, "raised", f"{type(cause).__name__}: {cause}")
            return None
        except RayError as error:  # its process or node is gone
            self._losses["deaths"] += 1
            self._losses["preemptions"] += getattr(error, "preempted", False)
            blameless = getattr(error, "preempted", False) or "node has died" in str(error)
            self._failed(slot, unit, "died", str(error), blameless)
            return None
        if slot.stage == "placing":
            slot.process, slot.node = result
            self._enter(slot, "loading", slot.actor.ready.remote())
            return None
        self._enter(slot, "idle")
        if slot.node in self._draining:
            self._leave(slot)
        if unit is None:
            self._failed_starts, self._last_ready = 0, time.monotonic()
            log.info("%s is ready", slot.name)
            return None
        slot.num_scored += 1
        return self._judge(slot, unit, *result)

    def _judge(
        self,
        slot: _Slot,
        unit: Unit,
        nll_sum: float | None,
        num_tokens: int,
        correct: bool,
        seconds: float,
    ) -> Score | None:
        """A finite number counts. One that is not counts if a second opinion agrees, and who was wrong is replaced."""
        doubter = self._disputed.pop(unit.key, None)
        if nll_sum is None or not math.isfinite(nll_sum):
            if doubter is None:
                log.warning("%s gave %s on sample %d of %s for %s: asking again", slot.name, nll_sum, unit.sample,
                            unit.needle_set, unit.vector_id)  # fmt: skip
                self._disputed[unit.key] = slot.name
                self._losses["disputed"] += 1
                self._requeue(unit)
                return None
            log.warning(
                "%s is not finite on sample %d of %s: it is out",
                unit.vector_id,
                unit.sample,
                unit.needle_set,
            )
            nll_sum = None  # PENALIZE: no number, no place among the survivors
        elif doubter in self._slots:
            log.warning("%s gave no number where %s gave one: it is replaced", doubter, slot.name)
            self._drop(self._slots[str(doubter)])
        self._attempts.pop(unit.key, None)
        return Score(
            *unit.key,
            nll_sum,
            num_tokens,
            correct,
            round(seconds, 4),
            slot.name,
            round(slot.handed_out, 3),
        )

    def _failed(
        self,
        slot: _Slot,
        unit: Unit | None,
        kind: Literal["died", "raised"],
        message: str,
        blameless: bool = False,
    ) -> None:
        """Requeue the unit, or stop. ``blameless`` is a death that says nothing about the unit or the start.

        Raises:
            StoppedError: if the failure will not mend.
        """
        if unit is None:
            self._failed_starts += not blameless
            attempts = self._failed_starts
            self._next_start = (
                time.monotonic() + min(2.0 ** (attempts - 1), 300) if attempts else -math.inf
            )
        else:
            attempts = self._attempts[unit.key] = self._attempts.get(unit.key, 0) + (not blameless)
        decision, hint = decide(
            kind, message, attempts, self._settings.max_attempts, fitted=slot.num_scored > 0
        )
        # An exception's own words come last; Ray gives its reason of a death somewhere inside.
        lines = message.strip().splitlines() or [""]
        reasons = [line for line in lines if "because" in line or _MEMORY.search(line)]
        message = textwrap.shorten(
            lines[-1] if kind == "raised" else " ".join(reasons or lines[:1]), 240
        )
        others_work = unit is None and any(
            s.stage in ("idle", "busy") for s in self._slots.values()
        )
        doing = f"scoring sample {unit.sample} of {unit.needle_set}" if unit else "starting"
        if decision is Decision.STOP and not others_work:
            raise StoppedError(f"{slot.name} failed {doing}: {message} ({hint})")
        log.warning("%s %s while %s: %s; %s", slot.name, kind, doing, message, hint)
        if unit is not None:
            self._requeue(unit)
        self._drop(
            slot
        )  # gone, or of no use: one that raised would fail the next unit as fast, and take all of them

    def _requeue(self, unit: Unit) -> None:
        self._queue.appendleft(unit)
        self._losses["requeued"] += 1

    def _drop(self, slot: _Slot) -> None:
        """Forget an actor, requeue what it was busy with; the next resize makes up for it."""
        ray.kill(slot.actor)
        self._slots.pop(slot.name, None)
        self._idle.pop(slot.name, None)
        for answer in [answer for answer, owner in self._asked.items() if owner is slot]:
            del self._asked[answer]
        if slot.unit is not None:
            self._requeue(slot.unit)
        self._resized = -math.inf

    def _resize(self) -> None:
        """Start scorers up to the wanted number, which follows the cluster unless the recipe fixes it."""
        now = time.monotonic()
        if now - self._resized < RESIZE_SECONDS or now < self._next_start:
            return
        wanted = self._num_scorers or capacity(node_resources(self._draining), self._resources)
        waiting = [s for s in self._slots.values() if s.stage == "placing"]
        for slot in waiting[: max(len(self._slots) - wanted, 0)]:
            self._drop(slot)  # the cluster shrank while it waited for a place
        while len(self._slots) < wanted:
            name = f"scorer-{self._made:02d}"
            self._made += 1
            slot = _Slot(name, self._make_actor(name))
            self._slots[name] = slot
            self._enter(slot, "placing", slot.actor.place.remote())
        self._resized = now

    def _leave(self, slot: _Slot) -> None:
        """Give up a scorer whose node will be taken away, so that its notice costs no unit."""
        log.warning("%s leaves a node that is being drained", slot.name)
        self._losses["deaths"] += 1
        self._losses["preemptions"] += 1
        self._drop(slot)

    def _look_after(self) -> None:
        """Replace scorers that are busy, or loading, for longer than they may be, and those on draining nodes once they
        are free."""
        limits = {
            "busy": (self._settings.stall_seconds, "scorer.stall_seconds"),
            "loading": (self._settings.load_seconds, "scorer.load_seconds"),
        }
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        self._looked = now
        self._draining = draining_nodes()
        for slot in list(self._slots.values()):
            if slot.node in self._draining and slot.stage != "busy":
                self._leave(slot)
                continue
            limit, field = limits.get(slot.stage, (math.inf, ""))
            if now - slot.since > limit:
                unit, slot.unit = slot.unit, None
                self._losses["stalls"] += 1
                self._failed(slot, unit, "died", f"{slot.stage} for {limit:g} s ({field})")

    def _check_starting(self) -> None:
        if any(slot.stage in ("idle", "busy") for slot in self._slots.values()):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._settings.start_seconds:
            raise StoppedError(
                f"no scorer came up within {self._settings.start_seconds:g} s (scorer.start_seconds): one takes "
                f"{dict(self._resources)}, the cluster has {_brief(ray.cluster_resources())}"
            )


def scorer_factory(
    model: ModelSection, settings: ScorerSection, needle_sets: Any, resources: Mapping[str, float]
) -> Callable[[str], ActorHandle]:
    """Makes scorer actors; ``needle_sets`` is a reference in Ray's object store, so it is sent to a node once."""
    actor_class: Any = ray.remote(Scorer)

    def make(name: str) -> ActorHandle:
        # The driver owns retries: Ray's own run a killed call twice.
        options: dict[str, Any] = {"name": name, "max_restarts": 0, "max_task_retries": 0}
        return actor_class.options(
            **options, num_cpus=resources["CPU"], num_gpus=resources["GPU"]
        ).remote(model, settings, needle_sets)

    return make
