"""The look of every figure."""

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

DARK, GREY, ACCENT = "#22303c", "#8a949e", "#d1490c"
RANK_COLOURS = LinearSegmentedColormap.from_list("ranks", ["#9ccbee", "#3b7dbd", "#12305c"])


def dress(axes: Axes, title: str, xlabel: str) -> None:
    """The look of every figure's axes."""
    axes.set_title(title, loc="left", fontsize=11, color=DARK)
    axes.set_xlabel(xlabel, color=DARK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=DARK, labelsize=9)
    axes.grid(axis="y", color=GREY, alpha=0.25, lw=0.7)
    axes.set_axisbelow(True)
