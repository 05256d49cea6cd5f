"""Tests here look at samples of text."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import shortened


@pytest.fixture(scope="package", autouse=True)
def whole() -> Iterator[None]:
    with shortened.unabridged():
        yield
