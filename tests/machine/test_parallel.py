"""Items are worked on in threads, in order, and what a thread sets for itself stays with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from globalopt.machine import parallel
from globalopt.machine.parallel import in_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_as_many_threads_as_there_are():
    at_once = threading.Barrier(3, timeout=20)

    def work(item: int) -> tuple[int, int, bool]:
        if item < 3:
            at_once.wait()
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    with torch.no_grad():
        found = list(in_threads(work, range(7), lambda item: 1, CPU))
    assert found == [(item, 1, False) for item in range(7)]
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("entries", "device"), [(3, CPU), (1, torch.device("meta"))])
def test_large_items_and_other_devices_are_worked_on_one_after_the_other(monkeypatch, entries, device):
    monkeypatch.setattr(parallel, "ENTRIES_AT_ONCE", 5)
    here = threading.get_ident()
    for item in in_threads(lambda item: threading.get_ident(), range(3), lambda item: entries, device):
        assert item == here


def test_no_more_entries_are_worked_on_at_once_than_fit(monkeypatch):
    monkeypatch.setattr(parallel, "ENTRIES_AT_ONCE", 5)
    lock, here, most = threading.Lock(), 0, 0

    def work(item: int) -> None:
        nonlocal here, most
        with lock:
            here += 1
            most = max(most, here)
        torch.ones(300, 300) @ torch.ones(300, 300)
        with lock:
            here -= 1

    list(in_threads(work, range(20), lambda item: 2, CPU))
    assert most <= 2


def test_the_first_error_ends_it_and_threads_are_as_before():
    done: list[int] = []

    def work(item: int) -> int:
        if item == 2:
            raise ValueError(f"item {item}")
        done.append(item)
        return item

    found = in_threads(work, range(100), lambda item: 1, CPU)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(found)
    assert len(done) < 20
    assert torch.get_num_threads() == 3
