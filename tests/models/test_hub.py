"""A hub that does not answer is asked once, and then no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from huggingface_hub import constants

from globalopt.models import hub


class Session:
    """A session of the hub's client that counts what it is asked, and fails if there is an error to raise."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked = 0

    def head(self, url: str, timeout: float) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.offline_without_hub.cache_clear()
    yield
    hub.offline_without_hub.cache_clear()


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("some error of the client")])
def test_without_an_answer_the_client_goes_offline(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    session = Session(error)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    assert hub.offline_without_hub()
    assert constants.HF_HUB_OFFLINE
    assert hub.offline_without_hub()
    assert session.asked == 1


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(None)
    monkeypatch.setattr(hub, "get_session", lambda: session)
    assert not hub.offline_without_hub()
    assert not constants.HF_HUB_OFFLINE
    assert not hub.offline_without_hub()
    assert session.asked == 1
