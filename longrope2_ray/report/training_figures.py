"""The figure of the trainings: their loss by step."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from longrope2_ray.report.figure_style import STYLES, label_axes, new_figure
from longrope2_ray.report.rundata import RunData
from longrope2_ray.training.records import LoggedStep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_training(run: RunData) -> "Figure":
    """Draw the loss of each training by step, short and long segments apart."""
    figure, axes = new_figure(6.4, 2.8, columns=2)
    colors = [style.color for style in STYLES.values()]
    for ax, window in zip(axes, ("short", "long"), strict=True):
        trainings = zip(itertools.cycle(colors), run.trainings.items(), strict=False)
        for color, (name, steps) in trainings:
            _draw_losses(ax, steps, window, name, color)
        label_axes(ax, "optimizer step", f"loss, {window} segments")
    handles, labels = axes[-1].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(len(labels), 4),
            fontsize=7,
            frameon=False,
        )
    return figure


def _draw_losses(
    ax: "Axes", logged: Sequence[LoggedStep], window: str, name: str, color: str
) -> None:
    """Draw one training: each logged step, and the running mean over a tenth of them."""
    points = [
        (row.step, row.window_losses[window]) for row in logged if window in row.window_losses
    ]
    if not points:
        return
    steps, losses = np.array(points).T
    ax.plot(steps, losses, color=color, linewidth=0.7, alpha=0.35)
    width = max(len(losses) // 10, 1)
    smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    ax.plot(steps[width - 1 :], smooth, color=color, linewidth=1.6, label=name)
