"""LongRoPE2's search for the critical dimension and the factors beyond it (Alg. 1 and 2), as ask and tell.

A candidate is a critical dimension and the tail of factors from there on, non-decreasing inside the bounds; the head is
derived (NTK, Eq. 9). Nothing here knows how candidates are scored.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from longrope2_ray.baselines import PLAIN, baseline, su_attention_factor, yarn_attention_factor
from longrope2_ray.factors import RescaleFactors, assemble
from longrope2_ray.recipe import AttentionFactor, SearchSection, StoppedError
from longrope2_ray.rope import RopeGeometry

LONGROPE_STARTS = ("pi", "ntk", "yarn")
MAX_TRIES = 200  # for a child that nobody saw before; a search space that gives none has been exhausted


@dataclass(frozen=True)
class Candidate:
    """One point of the search space.

    Attributes:
        critical_dim: ``d_rcd``, the cosine index where the tail starts; 0 if every dimension is searched.
        tail: factors from there on, non-decreasing.
        attention_factor: temperature that it is scored with.
        parent_id: the candidate that it was bred from.
        start_tokens: how many positions at the start keep the original RoPE (LongRoPE's ``n_hat``).
    """

    critical_dim: int
    tail: tuple[float, ...]
    attention_factor: float = 1.0
    parent_id: str | None = None
    start_tokens: int = 0

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the content: equal candidates have equal ids, whoever bred them."""
        start = [self.start_tokens] if self.start_tokens else []
        content = json.dumps([self.critical_dim, self.tail, self.attention_factor, *start])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    @cached_property
    def factors(self) -> RescaleFactors:
        """The whole vector, head derived."""
        values = assemble(self.critical_dim, self.tail)
        source = f"candidate {self.id}"
        return RescaleFactors(values, self.attention_factor, self.critical_dim, source, self.start_tokens)


@dataclass(frozen=True)
class SearchSpace:
    """Where candidates may lie.

    Attributes:
        num_cosines: length of a factor vector.
        critical_dims: allowed ``d_rcd``, ascending; ``(0,)`` if every dimension is searched.
        tail_bounds: lowest and highest factor of a tail.
        attention_bounds: lowest and highest attention factor; equal if it is not searched.
        starts: whole vectors that the search starts from, where every dimension is searched (LongRoPE).
        start_tokens: numbers of positions at the start that may keep the original RoPE.
    """

    num_cosines: int
    critical_dims: tuple[int, ...]
    tail_bounds: tuple[float, float]
    attention_bounds: tuple[float, float]
    starts: tuple[tuple[float, ...], ...] = ()
    start_tokens: tuple[int, ...] = (0,)

    @property
    def fixed_attention(self) -> float | None:
        """The attention factor of every candidate; None if it is searched."""
        low, high = self.attention_bounds
        return low if low == high else None

    @classmethod
    def from_recipe(cls, geometry: RopeGeometry, search: SearchSection) -> "SearchSpace":
        """The paper's space: ``d_10 ... d_tcd`` and ``[ratio, 2 ratio]``, unless the recipe says otherwise.

        Raises:
            ValueError: if the target is not above the original length, or critical dimensions, starting vectors or start
                tokens do not fit the model.
        """
        extended = any(not isinstance(start, str) for start in search.starts)
        if search.target_length <= geometry.original_length and not extended:
            raise ValueError(
                f"search.target_length: expected more than the original length {geometry.original_length}, "
                f"got {search.target_length}; to search an extended model's short window, search.starts takes the "
                f"vector that it was trained with"
            )
        if max(search.start_tokens) > geometry.original_length:
            raise ValueError(
                f"search.start_tokens: expected at most the original length {geometry.original_length}, "
                f"got {max(search.start_tokens)}"
            )
        ratio = max(search.target_length / geometry.original_length, 1.0)
        first, last = search.critical_dims or (max(geometry.ten_period_dim, 1), geometry.theoretical_critical_dim)
        if not 0 < first <= last < geometry.num_cosines:
            raise ValueError(
                f"search.critical_dims: expected cosine indices in 1 ... {geometry.num_cosines - 1}, got {first}, {last}"
            )
        low, high = (bound * ratio for bound in search.tail_bounds)
        dims = tuple(range(first, last + 1))
        starts: tuple[tuple[float, ...], ...] = ()
        if search.dimensions == "all":
            dims, low = (0,), 1.0
            length = max(search.target_length, geometry.original_length)
            vectors = [_start(start, geometry, length) for start in search.starts or LONGROPE_STARTS]
            clipped = (tuple(np.clip(np.maximum.accumulate(v), low, high).tolist()) for v in vectors)
            starts = tuple(dict.fromkeys(clipped))
        if low < 1 or high < low:
            raise ValueError(
                f"search.tail_bounds: expected factors of at least 1 in units of the ratio {ratio:g}, "
                f"got {search.tail_bounds[0]:g}, {search.tail_bounds[1]:g}"
            )
        top = max(su_attention_factor(ratio, geometry.original_length), yarn_attention_factor(ratio))
        fixed = attention_factor(search.attention_factor, ratio, geometry.original_length)
        # [ours] a searched temperature may go twice as far from one as the strongest published rule
        attention = search.attention_bounds or (1.0, 1 + 2 * (top - 1)) if fixed is None else (fixed, fixed)
        return cls(geometry.num_cosines, dims, (low, high), attention, starts, tuple(search.start_tokens))


def _start(start: str | Sequence[float], geometry: RopeGeometry, target_length: int) -> np.ndarray:
    if isinstance(start, str) and start not in PLAIN:
        raise ValueError(f"search.starts: expected {', '.join(PLAIN)} or a list of factors, got {start!r}")
    vector = baseline(start, geometry, target_length) if isinstance(start, str) else RescaleFactors(np.array(start))
    if len(vector.values) != geometry.num_cosines:
        raise ValueError(
            f"search.starts: expected {geometry.num_cosines} numbers, one per cosine dimension of this model, got "
            f"{len(vector.values)}"
        )
    return vector.values


def attention_factor(setting: AttentionFactor, ratio: float, original_length: int) -> float | None:
    """The number behind a recipe's ``attention_factor``; None if it is searched."""
    if setting == "search":
        return None
    if setting == "su":
        return su_attention_factor(ratio, original_length)
    return yarn_attention_factor(ratio) if setting == "yarn" else float(setting)


# --- Mutation of a tail: (T,) factors to (T,) factors, non-decreasing, inside [low, high]. The paper says only "with
# --- probability p, inside the space, non-decreasing" (Alg. 2, line 5); jobs/LOG.md compares these readings.


@dataclass(frozen=True)
class MutationContext:
    low: float
    high: float
    probability: float
    step: float
    rng: np.random.Generator

    def chosen(self, size: int) -> np.ndarray:
        """Indices that mutate, in random order; at least one."""
        picked = np.flatnonzero(self.rng.random(size) < self.probability)
        return self.rng.permutation(picked) if len(picked) else self.rng.integers(size, size=1)


def mutate_push(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry anew from the whole interval; it pushes neighbours that stand in the way along."""
    tail = tail.copy()
    for i in at.chosen(len(tail)):
        value = at.rng.uniform(at.low, at.high)
        tail[:i] = np.minimum(tail[:i], value)
        tail[i:] = np.maximum(tail[i:], value)
        tail[i] = value
    return tail


def mutate_sort(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Draw each chosen entry anew from the whole interval, then sort."""
    tail, chosen = tail.copy(), at.chosen(len(tail))
    tail[chosen] = at.rng.uniform(at.low, at.high, len(chosen))
    return np.sort(tail)


def mutate_local(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """Move each chosen entry by a Gaussian step, pushing neighbours along; steps shrink and grow at random."""
    tail = tail.copy()
    scale = at.step * (at.high - at.low) * 10 ** at.rng.uniform(-1.5, 0)
    for i in at.chosen(len(tail)):
        value = float(np.clip(tail[i] + at.rng.normal(0, scale), at.low, at.high))
        tail[:i] = np.minimum(tail[:i], value)
        tail[i:] = np.maximum(tail[i:], value)
        tail[i] = value
    return tail


def mutate_block(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """From each chosen entry on, or up to it, move the whole block by one Gaussian step, as far as its neighbour.

    Factors of neighbouring dimensions act alike, so blocks reach a good slope in far fewer steps than single entries.
    """
    tail = tail.copy()
    for i in at.chosen(len(tail)):
        delta = at.rng.normal(0, at.step * (at.high - at.low))
        if at.rng.random() < 0.5:
            tail[i:] = np.clip(tail[i:] + delta, tail[i - 1] if i > 0 else at.low, at.high)
        else:
            tail[: i + 1] = np.clip(tail[: i + 1] + delta, at.low, tail[i + 1] if i + 1 < len(tail) else at.high)
    return tail


def mutate_neighbours(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """The literal reading: draw each chosen entry between its neighbours, from left to right."""
    tail = tail.copy()
    for i in sorted(at.chosen(len(tail))):
        low = tail[i - 1] if i > 0 else at.low
        high = tail[i + 1] if i + 1 < len(tail) else at.high
        tail[i] = at.rng.uniform(low, high)
    return tail


def mutate_authors(tail: np.ndarray, at: MutationContext) -> np.ndarray:
    """What the authors' tool does: passes of the literal reading on a 0.01 grid until the tail strictly rises."""
    grid = 0.01
    for _ in range(MAX_TRIES):
        tail = tail.copy()
        for i in range(len(tail)):
            if at.rng.random() >= at.probability:
                continue
            low = tail[i - 1] if i > 0 else at.low
            high = tail[i + 1] if i + 1 < len(tail) else min(low + 4, at.high)
            first, last = math.ceil(low / grid - 1e-9), math.floor(high / grid + 1e-9)
            if last >= first:
                tail[i] = grid * int(at.rng.integers(first, last + 1))
        if np.all(np.diff(tail) > 0):
            break
    return np.clip(np.maximum.accumulate(tail), at.low, at.high)


MUTATIONS: dict[str, Callable[[np.ndarray, MutationContext], np.ndarray]] = {
    "push": mutate_push,
    "sort": mutate_sort,
    "local": mutate_local,
    "block": mutate_block,
    "neighbours": mutate_neighbours,
    "authors": mutate_authors,
}


def shift_tail(tail: np.ndarray, dim: int, moved: int, low: float, high: float) -> np.ndarray:
    """[ours] The tail from critical dimension ``moved`` on instead of ``dim``, under the same NTK head if bounds allow.

    The head follows from the tail's first entry alone, and a model feels it more than any entry beyond.
    """
    if moved == dim:
        return tail
    head = float(np.clip(tail[0] ** (moved / dim), low, high))  # where the present head is, or would be, at ``moved``
    kept = tail[max(moved - dim, 0) :]
    shifted = np.concatenate([np.full(max(dim - moved, 0), head), np.maximum(kept, head)])
    shifted[0] = head
    return shifted


def cross_blend(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random point between two tails; non-decreasing, since both are."""
    weight = rng.uniform()
    mixed = weight * tail + (1 - weight) * other
    return np.clip(mixed, np.minimum(tail, other), np.maximum(tail, other))  # a sum of shares may round out


def cross_authors(tail: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What the authors' tool does: entries of the other parent taken one by one, the first rising mix that differs."""
    for _ in range(20):
        mixed = tail.copy()
        for i in range(len(tail)):
            if rng.random() < 0.3:
                if rng.random() < 0.5:
                    mixed[i] = other[i]
                if not np.array_equal(mixed, tail) and np.all(np.diff(mixed) > 0):
                    return mixed
    return tail


CROSSOVERS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "blend": cross_blend,
    "authors": cross_authors,
}


def select(totals: Mapping[str, float], critical_dims: Mapping[str, int], top_k: int, niche_size: int) -> list[str]:
    """Ids of the survivors, best first: the best ``niche_size`` of each critical dimension, then the best of all.

    ``totals`` are summed NLLs of completely scored candidates. Ties are broken by id, so that order is total.
    """
    ranked = sorted(totals, key=lambda id: (totals[id], id))
    taken: dict[int, int] = {}
    niches = []
    for id in ranked:
        dim = critical_dims[id]
        if taken.get(dim, 0) < niche_size:
            taken[dim] = taken.get(dim, 0) + 1
            niches.append(id)
    kept = set(niches[:top_k])
    for id in ranked:
        if len(kept) >= top_k:
            break
        kept.add(id)
    return [id for id in ranked if id in kept]


@dataclass(frozen=True)
class Generation:
    """The whole state of a search: who survived so far, with their totals, and who has to be scored now."""

    index: int
    survivors: tuple[Candidate, ...]
    totals: Mapping[str, float]
    candidates: tuple[Candidate, ...]


class Evolution:
    """LongRoPE2's evolutionary search.

    ``ask()`` returns the candidates of the open generation, again and again until ``tell()`` closes it. The random
    stream of a generation depends on the seed and its index alone, so that a search told the same totals takes the
    same way, however often it was interrupted.
    """

    def __init__(self, space: SearchSpace, settings: SearchSection):
        """
        Raises:
            ValueError: if the population cannot hold one candidate for each critical dimension.
        """
        dims = space.critical_dims
        needed = len(space.starts or dims)
        if settings.population_size < needed:
            each = f"critical dimension {dims[0]} ... {dims[-1]} (search.critical_dims)"
            raise ValueError(
                f"search.population_size: expected at least {needed}, one candidate for each "
                f"{'vector it starts from (search.starts)' if space.starts else each}, got {settings.population_size}"
            )
        self.space, self.settings = space, settings
        self.generation = Generation(0, (), {}, tuple(self._initial_population()))
        self._seen = {c.id for c in self.generation.candidates}

    @property
    def finished(self) -> bool:
        """Whether every iteration of the recipe has been told."""
        return self.generation.index > self.settings.iterations

    def ask(self) -> tuple[Candidate, ...]:
        """Candidates of the open generation that have to be scored; the same ones until it is told."""
        return () if self.finished else self.generation.candidates

    def tell(self, totals: Mapping[str, float]) -> None:
        """Close the generation with the summed NLL of every asked candidate that was scored completely.

        Candidates missing from ``totals`` were raced out: they are worse than every survivor.

        Raises:
            RuntimeError: if the search is finished.
            StoppedError: if no candidate at all has a finite score.
        """
        if self.finished:
            raise RuntimeError("tell: the search is finished")
        standing = self.preview(self.generation, totals)
        children = self.children(standing)
        self._seen.update(child.id for child in children)
        self.generation = replace(standing, candidates=children)

    def preview(self, generation: Generation, totals: Mapping[str, float]) -> Generation:
        """What follows a generation if its candidates have these totals, not bred yet; nothing changes.

        Raises:
            StoppedError: if no candidate at all has a finite score.
        """
        known = {**generation.totals, **totals}
        everyone = (*generation.survivors, *generation.candidates)
        pool = {c.id: c for c in everyone if c.id in known and math.isfinite(known[c.id])}
        if not pool:
            raise StoppedError(
                "no candidate has a finite score: the model returns NaN or infinity; try model.dtype = 'float32'"
            )
        kept = select(
            {id: known[id] for id in pool},
            {id: c.critical_dim for id, c in pool.items()},
            self.settings.top_k,
            self.settings.niche_size,
        )  # Alg. 2, line 11
        return Generation(generation.index + 1, tuple(pool[id] for id in kept), {id: known[id] for id in kept}, ())

    def children(self, standing: Generation, also_seen: Set[str] = frozenset()) -> tuple[Candidate, ...]:
        """What a previewed generation asks for: children of its survivors, none after the last one; nothing changes.

        The random stream is the one that ``tell`` will use, so children of a guess are right as far as the ranks of
        their parents are. Ids in ``also_seen`` are avoided like those of former generations.
        """
        if standing.index > self.settings.iterations:
            return ()
        return tuple(self._breed(standing.survivors, self._rng(standing.index), self._seen | also_seen))

    @property
    def best(self) -> Candidate:
        """The best candidate told so far."""
        if not self.generation.survivors:
            raise RuntimeError("best: no generation has been told yet")
        return self.generation.survivors[0]

    def _rng(self, generation: int) -> np.random.Generator:
        return np.random.default_rng((self.settings.seed, generation))

    def _initial_population(self) -> Iterator[Candidate]:
        """Alg. 1: a constant random tail for every critical dimension, then others (``search.initial``) until there are P."""
        rng = self._rng(0)
        seeds = [
            Candidate(dim, tail, float(rng.uniform(*self.space.attention_bounds)), None, self.space.start_tokens[0])
            for dim, tail in self._starts(rng)
        ]
        yield from seeds

        def fill(seed: Candidate, rng: np.random.Generator) -> Candidate:
            mutants = self.settings.initial == "mutants"
            return self._mutate(seed, rng) if mutants else self._draw(seed.critical_dim, rng)

        seen = {seed.id for seed in seeds}
        yield from self._fresh(seeds, self.settings.population_size - len(seeds), rng, fill, seen)

    def _starts(self, rng: np.random.Generator) -> Iterator[tuple[int, tuple[float, ...]]]:
        """Critical dimensions and tails that the population grows from."""
        if self.space.starts:
            yield from ((0, start) for start in self.space.starts)
            return
        for dim in self.space.critical_dims:  # Alg. 1, line 3
            factor = float(rng.uniform(*self.space.tail_bounds))  # Alg. 1, line 4
            yield dim, (factor,) * (self.space.num_cosines - dim)

    def _breed(self, survivors: Sequence[Candidate], rng: np.random.Generator, seen: Set[str]) -> Iterator[Candidate]:
        """Alg. 2, lines 3-10: one child after the other from the survivors, best first."""

        def child(parent: Candidate, rng: np.random.Generator) -> Candidate:
            if rng.random() < self.settings.immigrants:
                return self._draw(int(rng.choice(self.space.critical_dims)), rng)
            if self.settings.crossover != "none" and rng.random() < self.settings.crossover_share:
                mates = [c for c in survivors if c.critical_dim == parent.critical_dim and c.id != parent.id]
                if mates:
                    return self._cross(parent, mates[rng.integers(len(mates))], rng)
            return self._mutate(parent, rng)

        yield from self._fresh(survivors, self.settings.num_children, rng, child, seen)

    def _fresh(
        self,
        parents: Sequence[Candidate],
        count: int,
        rng: np.random.Generator,
        make: Callable[[Candidate, np.random.Generator], Candidate],
        seen: Set[str],
    ) -> Iterator[Candidate]:
        """``count`` children that nobody saw before, parents taking turns; fewer if the space is exhausted."""
        here: set[str] = set()
        made = tries = 0
        while made < count and tries < MAX_TRIES * count:
            child = make(parents[tries % len(parents)], rng)
            tries += 1
            if child.id not in seen and child.id not in here:
                here.add(child.id)
                made += 1
                yield child

    def _mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """Alg. 2, lines 4-8: mutate the tail; the head follows from it."""
        (low, high), settings = self.space.tail_bounds, self.settings
        tail, dim = np.array(parent.tail), parent.critical_dim
        if settings.mutation == "random":
            return self._draw(int(rng.choice(self.space.critical_dims)), rng)
        if rng.random() < settings.shift_probability:
            moved = int(np.clip(dim + rng.choice((-1, 1)), self.space.critical_dims[0], self.space.critical_dims[-1]))
            dim, tail = moved, shift_tail(tail, dim, moved, low, high)
        context = MutationContext(low, high, settings.mutation_probability, settings.mutation_step, rng)
        tail = MUTATIONS[settings.mutation](tail, context)
        attention, start = self._attention(parent.attention_factor, rng), self._start_tokens(parent.start_tokens, rng)
        return Candidate(dim, tuple(map(float, tail)), attention, parent.id, start)

    def _draw(self, dim: int, rng: np.random.Generator) -> Candidate:
        """[ours] A tail of the monotone box: uniform, or in one to four steps. Uniform ones all rise alike, near a
        straight line; steps also reach the tails that stay low and then jump."""
        size = self.space.num_cosines - dim
        if self.settings.initial == "steps":
            levels = np.sort(rng.uniform(*self.space.tail_bounds, rng.integers(1, 5)))
            cuts = np.sort(rng.integers(0, size + 1, len(levels) - 1))
            tail = np.repeat(levels, np.diff([0, *cuts, size]))
        else:
            tail = np.sort(rng.uniform(*self.space.tail_bounds, size))
        attention = float(rng.uniform(*self.space.attention_bounds))
        return Candidate(dim, tuple(map(float, tail)), attention, None, self._start_tokens(None, rng))

    def _cross(self, parent: Candidate, mate: Candidate, rng: np.random.Generator) -> Candidate:
        tail = CROSSOVERS[self.settings.crossover](np.array(parent.tail), np.array(mate.tail), rng)
        attention = parent.attention_factor if rng.random() < 0.5 else mate.attention_factor
        start = parent.start_tokens
        if start != mate.start_tokens and rng.random() < 0.5:
            start = mate.start_tokens
        return Candidate(parent.critical_dim, tuple(map(float, tail)), attention, parent.id, start)

    def _attention(self, value: float, rng: np.random.Generator) -> float:
        """The temperature as one more gene, where it is searched."""
        low, high = self.space.attention_bounds
        if low == high or rng.random() >= self.settings.mutation_probability:
            return value
        return float(np.clip(value + rng.normal(0, self.settings.mutation_step * (high - low)), low, high))

    def _start_tokens(self, value: int | None, rng: np.random.Generator) -> int:
        """LongRoPE's ``n_hat`` as one more gene, where there is a choice; drawn anew if the parent has none to give."""
        choices = self.space.start_tokens
        if len(choices) == 1:
            return choices[0]
        if value is not None and rng.random() >= self.settings.mutation_probability:
            return value
        return int(rng.choice(choices))
