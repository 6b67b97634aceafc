"""The figures of a report, in its order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope2_ray.report.depth_figure import draw_depths
from longrope2_ray.report.factors_figure import draw_factors
from longrope2_ray.report.figure_style import draw_message
from longrope2_ray.report.rundata import RunData
from longrope2_ray.report.search_figures import draw_dimensions, draw_progress, draw_units
from longrope2_ray.report.training_figures import draw_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOT_YET = "no generation has been closed yet"


@dataclass(frozen=True)
class ReportFigure:
    """One figure of the report.

    Attributes:
        file: name of its PNG.
        draw: draws it from a run.
        caption: what the page says below it.
        needs_generations: whether it can only be drawn once a generation is closed.
    """

    file: str
    draw: Callable[[RunData], "Figure"]
    caption: str
    needs_generations: bool = True

    def of(self, run: RunData) -> "Figure":
        """Draw the figure, or the message that there is nothing to draw yet."""
        if self.needs_generations and not run.generations:
            return draw_message(NOT_YET)
        return self.draw(run)


SEARCH_FIGURES = (
    ReportFigure(
        "factors.png",
        draw_factors,
        "Rescale factor per RoPE dimension, found and baselines, on a log axis. Vertical lines: "
        "the critical dimension that the search found and the theoretical one.",
        needs_generations=False,
    ),
    ReportFigure(
        "depth.png",
        draw_depths,
        "Needle perplexity by the needle's depth, held out, each method at its own best attention "
        "factor of those reported (the number beside its name).",
        needs_generations=False,
    ),
    ReportFigure(
        "progress.png",
        draw_progress,
        "Needle perplexity on the search's needles. Candidates that racing eliminated have no "
        "perplexity and are not shown.",
    ),
    ReportFigure(
        "dimensions.png",
        draw_dimensions,
        "Survivors per critical dimension after each generation. Points: the best candidate; "
        "dashed: the theoretical one.",
    ),
    ReportFigure(
        "units.png",
        draw_units,
        "Units of work, (candidate, sample): scored, or never scored because racing eliminated "
        "the candidate; time per unit by scorer; the share of the scorers' time that went into "
        "units.",
    ),
)
TRAINING_FIGURE = ReportFigure(
    "training.png",
    draw_training,
    "Loss in nats per token by the window of the segments: each logged step, and the mean over a "
    "tenth of them.",
    needs_generations=False,
)


def figures_of(run: RunData) -> tuple[ReportFigure, ...]:
    """Return the figures that a report of the run has."""
    return (*SEARCH_FIGURES, TRAINING_FIGURE) if run.trainings else SEARCH_FIGURES
