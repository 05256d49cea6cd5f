"""Devices that are not here are refused."""

from __future__ import annotations

import pytest
import torch

from globalopt.errors import UsageError
from globalopt.models.device import resolve_device


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(UsageError, match="no torch device"):
        resolve_device("gpu please")
    with pytest.raises(UsageError, match="not available"):
        resolve_device("cuda:99")
    assert resolve_device("cpu") == torch.device("cpu")
