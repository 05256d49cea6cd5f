"""Find the bundled reference model and its four texts, with which a first run needs no download.

`model/` is a Hugging Face folder (its README.md is the model card); `text/` holds WikiText-2 slices that share no
article (licence and attribution in text/LICENSE.md). `benchmarks/reference_model.py` remakes both.
"""

from __future__ import annotations

from pathlib import Path

from globalopt.errors import ArtefactError

NAME = "reference"
"""Name of the bundled model, for users and in reports."""

SPLITS = ("calibration", "selection", "validation", "test")


def reference_folder() -> Path:
    """Return the folder of the bundled reference model.

    Raises:
        ArtefactError: it was not installed.

    >>> (reference_folder() / "config.json").is_file()
    True
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"The bundled reference model is not at {folder}; install the package again.")
    return folder


def text_file(split: str) -> Path:
    """Return the path of the bundled text of one of `SPLITS`.

    Raises:
        ArtefactError: the text was not installed.

    >>> text_file("test").name
    'test.txt'
    >>> text_file("test").read_text(encoding="utf-8").split("=")[1].strip()
    'Robert unk'
    """
    path = Path(__file__).parent / "text" / f"{split}.txt"
    if not path.is_file():
        raise ArtefactError(f"The bundled text is not at {path}; install the package again.")
    return path
