"""[ours] Descent: a factor vector follows the gradient of its score on skipped documents.

LongRoPE2 draws new factors at random and keeps what scores better. The NLL of an answer has a
gradient in the factors, which costs four passes and says for every dimension where to go; on
documents of which most tokens are skipped, at their true positions, such a step costs less than one
full pass. ``jobs/LOG.md`` compares both at equal cost. What a descent ends in is only proposed: the
full-length race decides.
"""

import math
from collections.abc import Sequence

import numpy as np

from longrope2_ray.errors import StoppedError

# Adam's decay rates and its guard against division by zero.
BETAS = (0.9, 0.95)
EPSILON = 1e-8


class Descent:
    """Adam on the logarithms of a factor vector, as ask and tell.

    After each step the vector is made non-decreasing and brought inside its bounds. The step size
    falls from ``rate`` to zero as half a cosine. The first dimensions may be kept as they are:
    where a period is short, the score is rough and its gradient mostly noise.

    Args:
        start: (d/2,) factors to start from.
        low: lowest factor.
        high: highest factor.
        num_steps: steps until it is finished.
        rate: size of the first step, in units of a factor's logarithm.
        num_kept: first dimensions that keep their factors.
    """

    def __init__(
        self,
        start: np.ndarray,
        *,
        low: float,
        high: float,
        num_steps: int,
        rate: float,
        num_kept: int = 0,
    ):
        self._bounds = math.log(low), math.log(high)
        self._num_steps = num_steps
        self._rate = rate
        self._num_kept = num_kept
        self._logs = self._inside(np.log(start))
        self._mean = np.zeros_like(self._logs)
        self._square = np.zeros_like(self._logs)
        self.step = 0

    @property
    def finished(self) -> bool:
        """Whether every step has been told."""
        return self.step >= self._num_steps

    def ask(self) -> np.ndarray:
        """Return the factors whose gradient is wanted; the result once it is finished."""
        factors: np.ndarray = np.exp(self._logs)
        return factors

    def tell(self, gradients: Sequence[Sequence[float]], num_tokens: int) -> None:
        """Take one step.

        Args:
            gradients: the gradient of each sample's summed NLL in the logarithms of the factors,
                always in the same order; a sample whose score was not finite has an empty one.
            num_tokens: answer tokens of the samples with a gradient.

        Raises:
            RuntimeError: if it is finished.
            StoppedError: if no sample has a gradient.
        """
        if self.finished:
            raise RuntimeError("tell: the descent is finished")
        finite = [np.array(gradient) for gradient in gradients if len(gradient)]
        if not finite:
            raise StoppedError(
                "no needle has a finite gradient: the model returns NaN or infinity; "
                "try model.dtype = 'float32'"
            )
        gradient = np.sum(finite, axis=0) / num_tokens
        gradient[: self._num_kept] = 0.0
        rate = self._rate * 0.5 * (1 + math.cos(math.pi * self.step / self._num_steps))
        self.step += 1
        first, second = BETAS
        self._mean = first * self._mean + (1 - first) * gradient
        self._square = second * self._square + (1 - second) * gradient**2
        mean = self._mean / (1 - first**self.step)
        square = self._square / (1 - second**self.step)
        self._logs = self._inside(self._logs - rate * mean / (np.sqrt(square) + EPSILON))

    def _inside(self, logs: np.ndarray) -> np.ndarray:
        inside: np.ndarray = np.maximum.accumulate(np.clip(logs, *self._bounds))
        return inside
