"""Where a search stands."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

log = logging.getLogger("longrope2")


STATUS_SECONDS = 2.0


@dataclass
class Status:
    """Where a run stands; what the progress bar, the log, ``status.json`` and the metrics show.

    Perplexities are of the survivors, ``critical_dims`` counts them; ``units_ahead`` were scored for candidates that no
    generation has asked for yet; ``committed_at`` is the Unix time of the last commit to the ledger.
    """

    name: str
    state: str = "starting"
    generation: int = 0
    iterations: int = 0
    best_ppl: float | None = None
    median_ppl: float | None = None
    best_critical_dim: int | None = None
    units_done: int = 0
    units_raced_out: int = 0
    units_left: int = 0
    unit_seconds: float | None = None
    elapsed_seconds: float = 0.0
    eta_seconds: float | None = None
    scorers: dict[str, int] = field(default_factory=dict)
    losses: dict[str, int] = field(default_factory=dict)
    worst_ppl: float | None = None
    critical_dims: dict[str, int] = field(default_factory=dict)
    units_ahead: int = 0
    committed_at: float | None = None


Observer = Callable[[Status, str], None]  # (status, "units" | "generation" | "end")
