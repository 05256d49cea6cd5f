"""Leave out of runs what only few tests look at: layout and pixels of pictures, and all but a few tokens of samples.

They are more than half of the time of a short run with a report. Every figure is made and written all the same, as a
single point. The tests of `tests/reports` and `tests/evaluation` have whole ones, and so has what is run in
`unabridged`.
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.layout_engine import ConstrainedLayoutEngine

from globalopt.evaluation import samples

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt" viewBox="0 0 1 1"/>\n'

_SHORT: dict[tuple[Any, str], Any] = {
    (samples, "NEW_TOKENS"): 4,
    (ConstrainedLayoutEngine, "execute"): lambda layout, figure: None,
    (FigureCanvasAgg, "print_png"): lambda canvas, path, **options: Path(path).write_bytes(PNG),
    (FigureCanvasSVG, "print_svg"): lambda canvas, path, **options: Path(path).write_text(SVG),
}

_WHOLE = {(owner, name): getattr(owner, name) for owner, name in _SHORT}


@contextlib.contextmanager
def shortened() -> Iterator[None]:
    """Make pictures of a point and samples of a few tokens."""
    with _patched(_SHORT):
        yield


@contextlib.contextmanager
def unabridged() -> Iterator[None]:
    """Make both as users get them, again."""
    with _patched(_WHOLE):
        yield


@contextlib.contextmanager
def _patched(values: dict[tuple[Any, str], Any]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), value in values.items():
            patch.setattr(owner, name, value)
        yield
