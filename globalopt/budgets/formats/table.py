"""Format csv: one row per layer, for spreadsheets and scripts; it expresses every target exactly."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from globalopt.budgets.budget_file import BudgetFile, LayerEntry
from globalopt.budgets.formats.checks import check_names, whole_number
from globalopt.errors import ArtefactError, GlobalOptError
from globalopt.values.budget import Target
from globalopt.values.layer import NM
from globalopt.values.storage import PLAIN, Storage

NEEDED = ("name", "rank", "nnz")
SHAPE = ("block", "kind", "d_out", "d_in")
# They follow from the others and are written for readers alone.
DERIVED = ("cost", "kept", "density")
STORAGE = "storage"
COLUMNS = ("name", *SHAPE, "rank", "nnz", "pattern", STORAGE, *DERIVED)


@dataclass(frozen=True)
class Csv:
    """Convert targets to and from a table with the columns `COLUMNS`.

    Of a table that is read the columns `NEEDED` must be there; `pattern` and `storage` are used and shapes are checked
    where they are there, other known columns are ignored. Without `storage` all layers have 16 bits; it is written only
    where some have fewer.

    >>> from globalopt.budgets.example import example_budget
    >>> text, notes = Csv().write(example_budget())
    >>> text.splitlines()[1]
    'model.layers.0.mlp.up_proj,0,up_proj,8,4,1,4,,16,0.500000,0.125000'
    >>> targets, notes = Csv().read(text, like=example_budget())
    >>> targets["model.layers.0.mlp.up_proj"].rank
    1
    """

    def write(self, file: BudgetFile) -> tuple[str, tuple[str, ...]]:
        """Write a header and a row per layer, in model order."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        few = any(not entry.target.storage.plain for entry in file.layers)
        rows.writerow([name for name in COLUMNS if few or name != STORAGE])
        for plan in file.plans:
            derived = (plan.cost, f"{plan.kept:.6f}", f"{plan.density:.6f}")
            shape = (plan.block, plan.kind, plan.d_out, plan.d_in)
            stored = (plan.storage,) if few else ()
            rows.writerow((plan.name, *shape, plan.rank, plan.nnz, plan.pattern or "", *stored, *derived))
        return text.getvalue(), ()

    def read(self, text: str, like: BudgetFile) -> tuple[Mapping[str, Target], tuple[str, ...]]:
        """Parse rows in any order."""
        rows = csv.DictReader(io.StringIO(text), skipinitialspace=True, strict=True)
        try:
            self._check_header(rows.fieldnames or ())
            entries = {entry.name: entry for entry in like.layers}
            targets: dict[str, Target] = {}
            for row in rows:
                where = f"line {rows.line_num}"
                # Too few cells are None, too many are under the key None.
                if None in row or any(value is None for value in row.values()):
                    raise ArtefactError(f"{where} has another number of cells than the header.")
                entry = entries.get(row["name"])
                if entry is None:
                    raise ArtefactError(f"{where} names '{row['name']}', which is no layer of the model.")
                if entry.name in targets:
                    raise ArtefactError(f"{where} lists layer {entry.name} a second time.")
                targets[entry.name] = self._target(row, entry, where)
        except csv.Error as cause:
            raise ArtefactError(f"line {rows.line_num} is no CSV ({cause}).") from None
        check_names(targets, like)
        return targets, ()

    @staticmethod
    def _check_header(names: Sequence[str]) -> None:
        """Check the names of the columns."""
        if missing := [name for name in NEEDED if name not in names]:
            raise ArtefactError(
                f"the first line lacks {', '.join(missing)}; columns are separated by commas and named "
                f"{', '.join(COLUMNS)}."
            )
        if unknown := [name for name in names if name not in COLUMNS]:
            raise ArtefactError(f"column '{unknown[0]}' is unknown; columns are {', '.join(COLUMNS)}.")

    @staticmethod
    def _target(row: Mapping[str, str], entry: LayerEntry, where: str) -> Target:
        """Parse the target of a row, after checking the row against the shape of its layer."""
        for name in SHAPE:
            if name in row and row[name] != str(getattr(entry, name)):
                raise ArtefactError(
                    f"{where}: layer {entry.name} has {name} {getattr(entry, name)}, not '{row[name]}'; the table "
                    "belongs to another model."
                )
        pattern = row.get("pattern") or "unstructured"
        rank, nnz = (whole_number(row[name], f"{where}, {name}") for name in ("rank", "nnz"))
        try:
            storage = Storage.parse(row.get(STORAGE) or str(PLAIN))
            return Target(rank, nnz, NM.parse(pattern), storage=storage)
        except GlobalOptError as cause:
            raise ArtefactError(f"{where}: {cause}") from None
