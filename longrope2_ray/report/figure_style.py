"""The look that all figures share: colors, lines, axes.

matplotlib is imported when the first figure is drawn, and only its object API is used: figures are
also drawn in a thread beside the search.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class MethodStyle(NamedTuple):
    """How a method is named and drawn; ``line`` is a line style of matplotlib."""

    label: str
    color: str
    line: str | tuple[int, tuple[int, ...]]


# The palette of Okabe and Ito is told apart by color-blind readers, the lines also in gray.
STYLES = {
    "longrope2": MethodStyle("LongRoPE2", "#D55E00", "-"),
    "unscaled": MethodStyle("unscaled", "#777777", ":"),
    "pi": MethodStyle("PI", "#0072B2", "--"),
    "ntk": MethodStyle("NTK", "#009E73", "-."),
    "yarn": MethodStyle("YaRN", "#CC79A7", (0, (5, 1))),
    "ntk-aware": MethodStyle("NTK-aware", "#56B4E9", "-."),
    "llama3": MethodStyle("Llama 3", "#E69F00", (0, (3, 1, 1, 1))),
    "abf": MethodStyle("ABF", "#56B4E9", (0, (1, 1))),
    "cope": MethodStyle("CoPE", "#000000", "--"),
    "cope-hard": MethodStyle("CoPE, hard", "#000000", (0, (1, 1))),
    "ntk-rcd": MethodStyle("NTK-rcd", "#009E73", (0, (1, 1))),
    "yarn-rcd": MethodStyle("YaRN-rcd", "#CC79A7", (0, (1, 1))),
}
# Colors of what has no color of its own, such as operators; the found vector's is not among them.
PALETTE = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#777777")
FOUND = "#D55E00"
MEDIAN = "#0072B2"
SPREAD = "#9CC3DD"
ELIMINATED = "#F0C27B"
INK = "#222222"
GRAY = "#888888"
DPI = 220


def name_of_result(critical_dim: int) -> str:
    """Return the name of the method that found a vector.

    Without a critical dimension (0) every dimension was searched, as the first LongRoPE did.
    """
    return STYLES["longrope2"].label if critical_dim else "LongRoPE"


def new_figure(width: float, height: float, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """Return a figure of ``width`` times ``height`` inches with empty axes beside each other.

    The style is set on the axes: matplotlib's rcParams are shared between threads.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1))
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRAY)
        style_ticks(ax)
        ax.set_axisbelow(True)
        ax.grid(axis="y", color="#E6E6E6", linewidth=0.6)
    return figure, axes


def draw_message(text: str) -> "Figure":
    """Draw a line of text in place of a figure that cannot be drawn yet."""
    figure, (ax,) = new_figure(6.4, 0.8)
    ax.set_axis_off()
    ax.text(
        0.5,
        0.5,
        text,
        transform=ax.transAxes,
        ha="center",
        va="center",
        fontsize=10,
        color="#666666",
    )
    return figure


def style_ticks(ax: "Axes") -> None:
    """Set size and color of an axis' ticks and their labels."""
    ax.tick_params(which="both", labelsize=8, color=GRAY, labelcolor=INK)


def label_axes(ax: "Axes", x: str, y: str) -> None:
    """Label both axes; generations have ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    if x == "generation":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def use_log_axis(ax: "Axes", values: Sequence[float]) -> None:
    """Make the y axis logarithmic for these values, with plain numbers as a few labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    wide = max(values) > 2000 * min(values)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1,) if wide else (1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
