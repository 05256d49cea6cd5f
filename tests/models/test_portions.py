"""Windows shared out to processes: each window once, the same batches and labels for any number of processes."""

from __future__ import annotations

import pytest

from globalopt.errors import UsageError
from globalopt.machine import ranks
from globalopt.models.portions import Portion


def portions(monkeypatch, processes: int, **options) -> list[Portion]:
    found = []
    for number in range(processes):
        monkeypatch.setattr(ranks, "_world", ranks.World(number, processes, processes, None))
        found.append(Portion.own(**options))
    return found


@pytest.mark.parametrize("processes", [2, 3, 4, 5])
@pytest.mark.parametrize("together", [True, False])
def test_every_window_is_run_once_and_as_many_of_either_kind(monkeypatch, processes, together):
    parts = portions(monkeypatch, processes, count=21, size=4, every=2, together=together)
    assert sorted(i for part in parts for batch in part.windows for i in batch) == list(range(21))
    labelled = [sum(len(part.windows[place]) for place in part.every(2)) for part in parts]
    assert max(labelled) - min(labelled) <= 1
    for part in parts:
        assert all(len({i // 4 % 2 for i in batch}) == 1 and len(batch) <= 4 for batch in part.windows)


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_weights_of_a_batch_add_up_to_one(monkeypatch, processes):
    parts = portions(monkeypatch, processes, count=11, size=2)
    assert {part.whole for part in parts} == {6}
    for number in range(6):
        assert sum(part.weight(number) for part in parts) == pytest.approx(1.0)
        for part in parts:
            place = part.place(number)
            assert place is None or all(i // 2 == number for i in part.windows[place])


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_labelled_windows_are_numbered_as_in_one_process(monkeypatch, processes):
    whole = Portion.own(count=20, size=4, every=2, together=True)
    order = [i for place in whole.every(2) for i in whole.windows[place]]
    for part in portions(monkeypatch, processes, count=20, size=4, every=2, together=True):
        some = part.some(2)
        for place, numbers in zip(part.every(2), some.windows, strict=True):
            assert [order[number] for number in numbers] == list(part.windows[place])


def test_more_processes_than_labelled_windows_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="5 processes, and 4 calibration windows"):
        portions(monkeypatch, 5, count=8, size=4, every=2)
