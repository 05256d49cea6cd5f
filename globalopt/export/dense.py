"""Format dense: an ordinary checkpoint, every layer the sum of its parts. Loads everywhere; as large as before."""

from __future__ import annotations

import shutil
from pathlib import Path

from globalopt.export.source import check_out, read_source
from globalopt.runs.files import replacing


def export_dense(run: Path, folder: Path, trust_remote_code: bool = False) -> None:
    """Write the run's model to `folder`; the artefacts of its layers are checked against it first."""
    check_out(folder)
    source = read_source(run, trust_remote_code)
    for _ in source.values():
        pass
    with replacing(folder) as staging:
        shutil.copytree(source.run.saved_model, staging, copy_function=shutil.copyfile)
