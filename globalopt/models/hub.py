"""Find out quickly whether the hub can be reached.

The hub's own client tries for half a minute where there is no network, once for every file it asks for.
"""

from __future__ import annotations

import functools

from huggingface_hub import constants
from huggingface_hub.utils import get_session

PATIENCE = 5.0
"""Seconds in which the hub has to answer."""


@functools.cache
def offline_without_hub() -> bool:
    """Ask the hub once for an answer, and set the client's offline mode where none comes; return whether it is set.

    In offline mode models are loaded from the client's own cache, and what is not there is refused at once.

    >>> offline_without_hub() == constants.HF_HUB_OFFLINE
    True
    """
    if not constants.HF_HUB_OFFLINE:
        try:
            get_session().head(constants.ENDPOINT, timeout=PATIENCE)
        # The client's library for HTTP has errors of its own, and differs between versions of the client.
        except Exception:
            constants.HF_HUB_OFFLINE = True
    return bool(constants.HF_HUB_OFFLINE)
