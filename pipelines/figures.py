"""Pictures without a screen: figures that look alike on every machine, as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.head import caravan_home

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def own_style() -> Iterator[None]:
    """Inside the block matplotlib's defaults hold, whatever its settings on this machine say."""
    # Matplotlib keeps a font cache in the home folder unless told otherwise; a run writes nothing there.
    os.environ.setdefault("MPLCONFIGDIR", str(caravan_home() / "matplotlib"))
    import matplotlib.style

    with matplotlib.style.context("default"):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; to be drawn and saved inside `own_style`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Figure) -> bytes:
    """The figure as PNG: equal bytes for equal figures."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def drawable(text: str, family: str = "DejaVu Sans") -> str:
    """`text` with a box for each character that the font has not, for which matplotlib would warn."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(family))
    return "".join(character if font.get_char_index(ord(character)) else "□" for character in text)
