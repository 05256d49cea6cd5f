"""One of several processes of a job, which `tests.machine.test_several` starts: do the same steps as the others.

    python -m tests.ranks_worker FOLDER STEPS

STEPS is a JSON file: a list of command lines, by name, each with the number of the artefact at whose writing the last
process kills itself (0: never). Words in them may hold `{rank}`. What a step left behind is written as
FOLDER/NAME.RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from globalopt.machine import ranks
from globalopt.machine.launch import joined
from globalopt.machine.team import Team
from globalopt.runs.workspace import Workspace
from tests.command import run
from tests.shortened import shortened


def exchanges() -> dict[str, Any]:
    """Use every way in which processes talk, with values that tell them apart."""
    me = ranks.number()
    parts = [torch.full((3,), float(me + 1)), torch.full((2, 2), 10.0 * (me + 1))]
    ranks.total_of_all(parts)
    team = Team({"sum": lambda x: float(ranks.total(torch.tensor([x * (me + 1.0)]))[0])})
    before = dict(ranks.traffic.bytes)
    row = torch.arange(5.0).view(1, 5).expand(2, 5).mT
    total = ranks.total(row.contiguous().mT)
    return {
        "count": ranks.count(),
        "local": ranks.local_count(),
        "total": total.tolist(),
        "summed": ranks.traffic.bytes["summed"] - before["summed"],
        "of_all": [part.tolist() for part in parts],
        "gathered": ranks.gathered({"rank": me, "long": "x" * (1 + 100 * me)}),
        "told": [ranks.told(me, by=by) for by in range(ranks.count())],
        "merged": ranks.merged({me: me}),
        "shared": ranks.share([5.0, 4.0, 3.0, 3.0], cost=lambda item: item),
        "team": team.run(lambda: team.ask("sum", 1.0) + team.ask("sum", 2.0)),
        "by_writer": ranks.by_writer(lambda: me),
    }


def die_at(writing: int) -> None:
    """Kill this process when it writes the artefact of that number."""
    put, left = Workspace.put, writing

    def dying(self: Workspace, *arguments: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, *arguments)

    Workspace.put = dying  # pyright: ignore[reportAttributeAccessIssue]


def main(folder: Path, steps: list[dict[str, Any]]) -> None:
    """Do all steps, and write down how each ended."""
    torch.set_num_threads(1)
    rank, last = os.environ["RANK"], int(os.environ["WORLD_SIZE"]) - 1
    with joined():
        found = exchanges()
    (folder / f"exchanges.{rank}.json").write_text(json.dumps(found))
    for step in steps:
        if step["dies_at"] and int(rank) == last:
            die_at(step["dies_at"])
        with shortened():
            result = run(*(word.format(rank=rank) for word in step["words"]))
        found = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        (folder / f"{step['name']}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
    sys.stdout.flush()
    # A process whose peer was killed has nothing left to take apart.
    os._exit(0)
