"""What to do about a failure, as a pure decision."""

import re
from enum import Enum
from typing import Literal

# torch's words, those of Ray's memory monitor, and its name for what that one did
_MEMORY = re.compile(r"out[ _]?of[ _]?memory|low on memory", re.IGNORECASE)


class Decision(Enum):
    """What to do about a failed unit or start."""

    RETRY = "retry"
    STOP = "stop"


def decide(
    kind: Literal["died", "raised"],
    message: str,
    attempts: int,
    max_attempts: int,
    fitted: bool = False,
) -> tuple[Decision, str]:
    """What to do about a failure, and why (which recipe field mends it).

    Args:
        kind: the process died, or the scorer raised.
        message: of the error.
        attempts: how often this unit (or start) has been tried.
        max_attempts: how often it may be.
        fitted: whether this scorer has scored units before, so that memory was enough.
    """
    if _MEMORY.search(message):
        hint = "the model at this length does not fit: set scorer.gpus_per_scorer or fewer scorers (scorer.num_scorers), or " \
               "lower scorer.mlp_chunk_tokens or set model.dtype = 'bfloat16', with another --run-dir"  # fmt: skip
        again = (kind == "died" or fitted) and attempts < max_attempts
        return (Decision.RETRY if again else Decision.STOP), hint
    if attempts >= max_attempts:
        return Decision.STOP, f"{attempts} attempts failed (scorer.max_attempts)"
    return Decision.RETRY, "another scorer takes it"
