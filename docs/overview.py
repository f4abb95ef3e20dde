"""Draw docs/overview.png, one round of federated sketching: python docs/overview.py"""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

RANK = 8
# (name, colour, sketch): the indices, of 0..7, that the client holds this round.
CLIENTS = (
    ("client 1", "#d1490c", (1, 5)),
    ("client 2", "#1f8a70", (0, 3, 5, 6)),
    ("client 3", "#3b6fc4", tuple(range(RANK))),
)
DARK, GREY, EDGE = "#22303c", "#5d6871", "#aab3ba"
NOT_SENT, NO_CHANGE = "#dfe4e8", "#ffffff"
CELL, LENGTH, GAP = 0.105, 1.3, 0.16  # width of one index; the dimensions in and out; between B and A
WIDTH = RANK * CELL + GAP + LENGTH  # of a pair of rank 8
COLUMNS = (0.3, 3.5, 6.75, 10.1)  # left edges of the four columns
LANES = (4.0, 2.4, 0.8)  # lower edges of the clients' lanes
HEADINGS = (
    ("1  Server draws sketches", "for each client, k random indices\nof the global pair's r = 8"),
    ("2  Clients train", "each an ordinary LoRA of rank k,\non data that stay with it"),
    ("3  Changes return", "k (in + out) numbers a module,\nto the places they came from"),
    ("4  Server averages", "the changes and adds their\nmean to the global pair"),
)


def draw_pair(
    axes: Axes, x: float, y: float, colours: list[tuple[str, ...]], names: tuple[str, str] | None, cell: float = CELL
) -> None:
    """B `[out, k]` and A `[k, in]` with their left lower corner at (x, y).

    `colours` has an entry an index: the colours that its column of B and its row of A are made of.
    """
    k = len(colours)
    a_left, a_top = x + k * cell + GAP, y + LENGTH / 2 + k * cell / 2  # A at half the height of B
    for j, parts in enumerate(colours):
        size = cell / len(parts)
        for i, colour in enumerate(parts):
            fill(axes, x + j * cell + i * size, y, size, LENGTH, colour)
            fill(axes, a_left, a_top - j * cell - (i + 1) * size, LENGTH, size, colour)
        for corner, width, height in (
            ((x + j * cell, y), cell, LENGTH),
            ((a_left, a_top - (j + 1) * cell), LENGTH, cell),
        ):
            axes.add_patch(Rectangle(corner, width, height, facecolor="none", edgecolor=EDGE, linewidth=0.6))
    if names:
        axes.text(x + k * cell / 2, y + LENGTH + 0.06, names[0], ha="center", fontsize=13, color=DARK, style="italic")
        axes.text(a_left + LENGTH / 2, a_top + 0.06, names[1], ha="center", fontsize=13, color=DARK, style="italic")


def fill(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, linewidth=0))


def draw_lane(axes: Axes, y: float, name: str, colour: str, sketch: tuple[int, ...]) -> None:
    """What one client receives, trains and sends back."""
    k, first, middle = len(sketch), y == LANES[0], y + LENGTH / 2
    held = [(colour,) if j in sketch else (NOT_SENT,) for j in range(RANK)]
    changed = [(colour,) if j in sketch else (NO_CHANGE,) for j in range(RANK)]
    x = COLUMNS[1] + (RANK - k) * CELL / 2
    right_of_b = x + k * CELL + GAP
    draw_pair(axes, COLUMNS[0], y, held, ("B", "A") if first else None)
    draw_pair(axes, x, y, [(colour,)] * k, None)
    draw_pair(axes, COLUMNS[2], y, changed, ("ΔB", "ΔA") if first else None)
    axes.text(right_of_b, y + LENGTH, f"{name}: k = {k}", color=colour, fontweight="bold", va="top", fontsize=12.5)
    axes.text(right_of_b, y - 0.02, f"scaled by r/k = {RANK // k}", color=GREY, va="bottom", fontsize=11.5)
    arrow(axes, (COLUMNS[0] + WIDTH + 0.12, middle), (x - 0.12, middle), colour)
    arrow(axes, (right_of_b + LENGTH + 0.12, middle), (COLUMNS[2] - 0.12, middle), colour)
    offset = 0.16 * (y - LANES[1]) / (LANES[0] - LANES[1])  # keeps the three heads apart
    arrow(axes, (COLUMNS[2] + WIDTH + 0.12, middle), (COLUMNS[3] - 0.12, LANES[1] + LENGTH / 2 + offset), colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    look = {"arrowstyle": "-|>", "mutation_scale": 13, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **look))


def draw(path: Path) -> None:
    figure = Figure(figsize=(13.0, 6.4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 13.0), ylim=(0, 6.85))
    axes.set_axis_off()
    for x, (heading, words) in zip(COLUMNS, HEADINGS, strict=True):
        axes.text(x, 6.5, heading, fontsize=14.5, fontweight="bold", color=DARK, va="center")
        axes.text(x, 6.28, words, fontsize=11.5, color=GREY, va="top", linespacing=1.3)
    for y, (name, colour, sketch) in zip(LANES, CLIENTS, strict=True):
        draw_lane(axes, y, name, colour, sketch)
    together = [tuple(colour for _, colour, sketch in CLIENTS if j in sketch) for j in range(RANK)]
    draw_pair(axes, COLUMNS[3], LANES[1], together, ("B", "A"), cell=0.15)
    axes.text(COLUMNS[0] + WIDTH, LANES[2] - 0.08, "grey: not sent", ha="right", fontsize=11.5, color=GREY, va="top")
    axes.text(COLUMNS[2] + WIDTH, LANES[2] - 0.08, "white: no change", ha="right", fontsize=11.5, color=GREY, va="top")
    words = "colours: whose changes\neach index receives"
    axes.text(COLUMNS[3] + 1.3, LANES[1] - 0.12, words, ha="center", va="top", fontsize=11.5, color=GREY)
    right, left, low = COLUMNS[3] + 1.3, COLUMNS[0] + RANK * CELL / 2, 0.3
    axes.plot([right, right, left, left], [LANES[1] - 0.62, low, low, low + 0.1], color=DARK, lw=1.6)
    arrow(axes, (left, low), (left, LANES[2] - 0.05), DARK)
    words = {"ha": "center", "va": "center", "backgroundcolor": "white"}
    axes.text(6.4, low, "next round: other clients, new sketches", fontsize=12.5, color=DARK, **words)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    draw(Path(__file__).with_name("overview.png"))
