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
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from longrope2_ray.needles import NeedleSample
from longrope2_ray.recipe import ModelSection, ScorerSection, StoppedError
from longrope2_ray.rundir import Score
from longrope2_ray.search import Unit

log = logging.getLogger("longrope2")
RESIZE_SECONDS = 5.0


class Scorer:
    """An actor that loads the model once and scores units until it is told to stop.

    Args:
        model: the recipe's model section.
        settings: the recipe's scorer section.
        needle_sets: name -> samples, the same objects for every scorer.
    """

    def __init__(self, model: ModelSection, settings: ScorerSection, needle_sets: Mapping[str, Sequence[NeedleSample]]):
        from longrope2_ray.model import load_model, read_spec
        from longrope2_ray.scoring import NeedleScorer

        where = {"gguf_file": model.gguf_file, "revision": model.revision}
        spec = read_spec(model.path, original_length=model.original_length, **where)
        loaded = load_model(
            model.path,
            **where,
            dtype=model.dtype,
            device=model.device,
            attention=model.attention,
            num_gpus=max(1, math.ceil(settings.gpus_per_scorer)),
            threads=settings.threads,
        )
        self._scorer = NeedleScorer(loaded, spec, mlp_chunk_tokens=settings.mlp_chunk_tokens)
        self._needle_sets = needle_sets

    def ready(self) -> int:
        """Process id, once the model is resident."""
        return os.getpid()

    def score(
        self, needle_set: str, sample: int, values: Sequence[float], attention_factor: float
    ) -> tuple[float, int, bool, float]:
        """(nll_sum, num_tokens, correct, seconds) of one sample under one vector."""
        result = self._scorer.score(self._needle_sets[needle_set][sample], np.array(values), attention_factor)
        return result.nll_sum, result.num_tokens, result.correct, result.seconds


class Decision(Enum):
    """What to do about a failed unit or start."""

    RETRY = "retry"
    STOP = "stop"


def decide(kind: Literal["died", "raised"], message: str, attempts: int, max_attempts: int) -> tuple[Decision, str]:
    """What to do about a failure, and why (which recipe field mends it).

    Args:
        kind: the process died, or the scorer raised.
        message: of the error.
        attempts: how often this unit (or start) has been tried.
        max_attempts: how often it may be.
    """
    lowered = message.lower()
    if "out of memory" in lowered or "outofmemory" in lowered:
        hint = "the model at this length does not fit: set scorer.gpus_per_scorer or lower scorer.mlp_chunk_tokens, " \
               "model.dtype = 'bfloat16', or fewer scorers (scorer.num_scorers)"  # fmt: skip
        return (Decision.STOP if kind == "raised" or attempts >= max_attempts else Decision.RETRY), hint
    if attempts >= max_attempts:
        return Decision.STOP, f"{attempts} attempts failed (scorer.max_attempts)"
    return Decision.RETRY, "another scorer takes it"


@dataclass
class _Slot:
    """One actor as the driver sees it."""

    name: str
    actor: ActorHandle
    ref: Any
    since: float
    ready: bool = False
    unit: Unit | None = None


class ScorerPool:
    """Keeps ``num_scorers`` actors (or as many as the cluster has room for) and hands units to free ones.

    Args:
        make_actor: name -> a new actor with methods ``ready()`` and ``score(needle_set, sample, values, factor)``.
        num_scorers: how many; 0 follows the size of the cluster.
        resources: what one actor takes, e.g. ``{"CPU": 1, "GPU": 1}``.
        settings: attempts, stall and start limits.
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
        self._queue: deque[Unit] = deque()
        self._attempts: dict[tuple[str, str, int], int] = {}
        self._losses = dict.fromkeys(("requeued", "deaths", "preemptions", "stalls", "disputed"), 0)
        self._made = self._failed_starts = 0
        self._resized, self._last_ready = -math.inf, time.monotonic()
        self._resize()

    # --- the Scorers protocol

    def free(self) -> int:
        """Idle scorers that no queued unit waits for."""
        self._dispatch()
        return sum(slot.ready and slot.unit is None for slot in self._slots.values()) - len(self._queue)

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
        self._replace_stalled()
        busy = {slot.ref: slot for slot in self._slots.values() if slot.ref is not None}
        if not busy:
            self._check_starting()
            time.sleep(0.2)
            return []
        refs = list(busy)
        done, _ = ray.wait(refs, num_returns=1, timeout=1.0)
        if done:
            done, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        scores = [score for ref in done if (score := self._collect(busy[ref]))]
        self._check_starting()
        self._dispatch()
        return scores

    def counts(self) -> dict[str, int]:
        """Scorers by state."""
        slots = self._slots.values()
        ready = sum(s.ready for s in slots)
        busy = sum(s.unit is not None for s in slots)
        return {"starting": len(slots) - ready, "idle": ready - busy, "busy": busy}

    def losses(self) -> dict[str, int]:
        """What went wrong and was mended, by kind."""
        return dict(self._losses)

    def process_ids(self) -> dict[str, int]:
        """Name -> process id of the scorers that are up; for tests and people."""
        up = {s.name: s.actor.ready.remote() for s in self._slots.values() if s.ready}
        return dict(zip(up, ray.get(list(up.values()), timeout=60), strict=True))

    def close(self) -> None:
        """Stop every scorer."""
        for slot in self._slots.values():
            ray.kill(slot.actor)
        self._slots.clear()

    # --- one actor's life

    def _dispatch(self) -> None:
        for slot in self._slots.values():
            if not self._queue:
                return
            if slot.ready and slot.unit is None:
                unit = self._queue.popleft()
                slot.unit, slot.since = unit, time.time()
                slot.ref = slot.actor.score.remote(
                    unit.needle_set, unit.sample, unit.factors.values.tolist(), unit.factors.attention_factor
                )

    def _collect(self, slot: _Slot) -> Score | None:
        """The score that an actor came back with; None if it only became ready, or failed and its unit was requeued."""
        ref, unit, slot.ref, slot.unit = slot.ref, slot.unit, None, None
        try:
            answer = ray.get(ref)
        except RayTaskError as error:  # the scorer raised; its process lives
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._failed(slot.name, unit, "raised", f"{type(cause).__name__}: {cause}")
            return None
        except RayError as error:  # its process or node is gone, or it never came up
            self._drop(slot)
            self._failed(slot.name, unit, "raised" if "creation task" in str(error) else "died", str(error))
            return None
        if unit is None:
            slot.ready, self._failed_starts, self._last_ready = True, 0, time.monotonic()
            log.info("%s is ready", slot.name)
            return None
        self._attempts.pop(unit.key, None)
        nll_sum, num_tokens, correct, seconds = answer
        if not math.isfinite(nll_sum):
            log.warning(
                "%s gave %s on sample %d of %s: it is out", unit.vector_id, nll_sum, unit.sample, unit.needle_set
            )
            nll_sum = None  # PENALIZE: no number, no place among the survivors
        return Score(*unit.key, nll_sum, num_tokens, correct, round(seconds, 4), slot.name, round(slot.since, 3))

    def _failed(self, name: str, unit: Unit | None, kind: Literal["died", "raised"], message: str) -> None:
        """Requeue the unit, or stop.

        Raises:
            StoppedError: if the failure will not mend.
        """
        message = textwrap.shorten(message.strip().splitlines()[-1], 240)
        if unit is None:
            self._failed_starts += kind == "raised"  # a node that went away while starting is no failed start
            attempts = self._failed_starts
        else:
            attempts = self._attempts[unit.key] = self._attempts.get(unit.key, 0) + 1
        decision, hint = decide(kind, message, attempts, self._settings.max_attempts)
        doing = f"scoring sample {unit.sample} of {unit.needle_set}" if unit else "starting"
        if decision is Decision.STOP:
            raise StoppedError(f"{name} failed {doing}: {message} ({hint})")
        log.warning("%s %s while %s: %s; %s", name, kind, doing, message, hint)
        if unit is not None:
            self._queue.appendleft(unit)
            self._losses["requeued"] += 1

    def _drop(self, slot: _Slot) -> None:
        """Forget an actor; the next resize makes up for it."""
        ray.kill(slot.actor)
        self._slots.pop(slot.name, None)
        self._resized = -math.inf

    def _resize(self) -> None:
        """Start scorers up to the wanted number, which follows the cluster unless the recipe fixes it."""
        if time.monotonic() - self._resized < RESIZE_SECONDS:
            return
        self._resized = time.monotonic()
        wanted = self._num_scorers or capacity(ray.cluster_resources(), self._resources)
        for slot in [s for s in self._slots.values() if not s.ready][: max(len(self._slots) - wanted, 0)]:
            self._drop(slot)  # the cluster shrank while it waited for a place
        while len(self._slots) < wanted:
            name = f"scorer-{self._made:02d}"
            self._made += 1
            actor = self._make_actor(name)
            self._slots[name] = _Slot(name, actor, actor.ready.remote(), time.time())

    def _replace_stalled(self) -> None:
        for slot in list(self._slots.values()):
            if slot.unit is not None and time.time() - slot.since > self._settings.stall_seconds:
                unit = slot.unit
                self._drop(slot)
                self._failed(
                    slot.name, unit, "died", f"busy for {self._settings.stall_seconds:g} s (scorer.stall_seconds)"
                )

    def _check_starting(self) -> None:
        if any(slot.ready for slot in self._slots.values()):
            self._last_ready = time.monotonic()
        elif time.monotonic() - self._last_ready > self._settings.start_seconds:
            raise StoppedError(
                f"no scorer came up within {self._settings.start_seconds:g} s (scorer.start_seconds): one takes "
                f"{dict(self._resources)}, the cluster has {_brief(ray.cluster_resources())}"
            )


def capacity(cluster: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many actors of ``resources`` each a cluster has room for."""
    return int(min(cluster.get(name, 0) / amount + 1e-9 for name, amount in resources.items() if amount))


def _brief(cluster: Mapping[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in cluster.items() if name in ("CPU", "GPU")}


def scorer_resources(settings: ScorerSection, device: str, cluster: Mapping[str, float]) -> dict[str, float]:
    """What one scorer takes: CPUs, and GPUs where the cluster has any and the recipe does not say cpu."""
    with_gpu = device == "cuda" or (device == "auto" and cluster.get("GPU", 0) > 0)
    return {"CPU": settings.cpus_per_scorer, "GPU": settings.gpus_per_scorer if with_gpu else 0}


def scorer_factory(
    model: ModelSection, settings: ScorerSection, needle_sets: Any, resources: Mapping[str, float]
) -> Callable[[str], ActorHandle]:
    """Makes scorer actors; ``needle_sets`` is a reference in Ray's object store, so it is sent to a node once."""
    actor_class: Any = ray.remote(Scorer)

    def make(name: str) -> ActorHandle:
        # The driver owns retries: Ray's own run a killed call twice.
        options: dict[str, Any] = {"name": name, "max_restarts": 0, "max_task_retries": 0}
        return actor_class.options(**options, num_cpus=resources["CPU"], num_gpus=resources["GPU"]).remote(
            model, settings, needle_sets
        )

    return make
