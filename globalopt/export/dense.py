"""Format dense: an ordinary checkpoint with the sum `S + U V` of every layer, as large as the uncompressed model."""

from __future__ import annotations

import shutil
from pathlib import Path

from globalopt.export.source import check_out, read_source
from globalopt.runs.files import replacing


def export_dense(run: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Export the model of a finished run as an ordinary checkpoint to `folder`.

    Raises:
        ArtefactError: the run is missing, unfinished or broken, its layers do not make up the weights of its model, or
            `folder` holds something.

    >>> from globalopt.export.example import example_run
    >>> export_dense(example_run(), Path("exported"))
    >>> Path("exported/model.safetensors").is_file()
    True
    """
    check_out(folder)
    source = read_source(run, trust_remote_code)
    for _ in source.values():
        pass
    with replacing(folder) as staging:
        shutil.copytree(source.run.saved_model, staging, copy_function=shutil.copyfile)
        source.write_card(staging, "dense")
