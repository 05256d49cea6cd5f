"""What benchmarks take from the tests: synthetic layers, and the slow transcriptions of published algorithms."""

from __future__ import annotations

import sys
from pathlib import Path

# The tests are no installed package, and a script's own folder is all that is on its path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.reference import alps, hassle_free, oats, rpca, sparsegpt, three_basil
from tests.reference.low_rank import randomized
from tests.synthetic import layer

__all__ = ["alps", "hassle_free", "layer", "oats", "randomized", "rpca", "sparsegpt", "three_basil"]
