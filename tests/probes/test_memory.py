"""Memory of the process."""

import numpy as np

from dynascope.probes.memory import resident_bytes


def test_memory_that_is_touched_is_seen() -> None:
    before = resident_bytes()
    block = np.ones(50_000_000 // 8)
    assert resident_bytes() - before > 40_000_000
    assert block[0] == 1.0
