"""The bundled reference model and its four texts, so that a first run needs no download.

`model/` is a Hugging Face folder (its README.md is the model card); `text/` holds WikiText-2 slices that share no
article (licence and attribution in text/LICENSE.md). `benchmarks/reference_model.py` remakes both.
"""

from __future__ import annotations

from pathlib import Path

from globalopt.errors import ArtefactError

NAME = "reference"
"""How the bundled model is named where a model is asked for or reported."""

SPLITS = ("calibration", "selection", "validation", "test")


def text_file(split: str) -> Path:
    """The text of one of `SPLITS`; `ArtefactError` if it was not installed."""
    path = Path(__file__).parent / "text" / f"{split}.txt"
    if not path.is_file():
        raise ArtefactError(f"The bundled text is not at {path}; install the package again.")
    return path
