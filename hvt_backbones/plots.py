"""How plots of runs and models look. matplotlib is imported when one is drawn: the library does without."""

from __future__ import annotations

from typing import Any

from .errors import InputError

INK, MUTED, GRID = "#222222", "#777777", "#e4e4e4"
BLUE, ORANGE, GREEN = "#2f6fb2", "#d9722e", "#3a8f5c"


def check_matplotlib() -> None:
    """
    Raises:
        InputError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(f"a picture needs matplotlib ({error}): run `pip install matplotlib`") from None


def new_figure(width: float, height: float, title: str) -> Any:
    """A matplotlib figure of so many inches, which needs no display; its title stands at the left."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold", color=INK, x=0.01, ha="left")
    return figure


def style(axes: Any, xlabel: str) -> None:
    """Grid, spines and colours of one panel, over whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel, color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, which="both")
    axes.title.set_color(INK)
