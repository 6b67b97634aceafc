"""The figures of a report, in its order."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope2_ray.report.cascade_figure import draw_cascade
from longrope2_ray.report.depth_figure import draw_depths
from longrope2_ray.report.factors_figure import draw_factors
from longrope2_ray.report.figure_style import draw_message
from longrope2_ray.report.genealogy_figure import draw_descent, draw_genealogy
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
        belongs: tells whether a run has this figure.
    """

    file: str
    draw: Callable[[RunData], "Figure"]
    caption: str
    needs_generations: bool = True
    belongs: Callable[[RunData], bool] = lambda run: True

    def of(self, run: RunData) -> "Figure":
        """Draw the figure, or the message that there is nothing to draw yet."""
        if self.needs_generations and not run.generations:
            return draw_message(NOT_YET)
        return self.draw(run)


def _has_offspring(run: RunData) -> bool:
    """Tell whether generations follow one another: a descent alone has a single one."""
    return not run.descent or len(run.generations) > 1


SEARCH_FIGURES = (
    ReportFigure(
        "factors.png",
        draw_factors,
        "Rescale factor per RoPE dimension, found and every published method, on a log axis. "
        "Vertical lines: the critical dimension that the search found and the theoretical one.",
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
        "descent.png",
        draw_descent,
        "Left: the vector of each step of the descent on the step's own skipped documents; they "
        "are drawn anew for every step, so single steps scatter. Right: the race at full length "
        "that follows, the result under several attention factors and the start (diamond).",
        needs_generations=False,
        belongs=lambda run: bool(run.descent),
    ),
    ReportFigure(
        "genealogy.png",
        draw_genealogy,
        "Every candidate that ever survived, where it was bred, joined with its parent; the color "
        "of a point is the operator that made it. A line ends where its candidate was bred: until "
        "the last generation it survives as it is.",
        belongs=_has_offspring,
    ),
    ReportFigure(
        "cascade.png",
        draw_cascade,
        "Candidates that were scored both on skipped documents and at full length. A score is the "
        "NLL as a ratio to the best candidate's, over the needles that both have: racing leaves "
        "an eliminated candidate with some of them only.",
        needs_generations=False,
        belongs=lambda run: bool(run.cascade.points),
    ),
    ReportFigure(
        "progress.png",
        draw_progress,
        "Needle perplexity on the search's needles. Candidates that racing eliminated have no "
        "perplexity and are not shown.",
        belongs=_has_offspring,
    ),
    ReportFigure(
        "dimensions.png",
        draw_dimensions,
        "Survivors per critical dimension after each generation. Points: the best candidate; "
        "dashed: the theoretical one.",
        belongs=_has_offspring,
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
    belongs=lambda run: bool(run.trainings),
)


def figures_of(run: RunData) -> tuple[ReportFigure, ...]:
    """Return the figures that a report of the run has."""
    return tuple(figure for figure in (*SEARCH_FIGURES, TRAINING_FIGURE) if figure.belongs(run))
