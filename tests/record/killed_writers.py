"""Forks writers that are killed at random moments: `python killed_writers.py FOLDER COUNT`.

Prints one line for each writer: the last step that it knew to be on disk when it was killed, -1 for none,
and "unborn" when it was killed before its record existed.
"""

import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np

from dynascope.record import RecordWriter


def write_until_killed(folder: Path, progress: mmap.mmap, dice: random.Random) -> None:
    writer = RecordWriter(folder, rank=1, flush_interval=0.002)
    struct.pack_into("q", progress, 0, -1)
    step = 0
    while True:
        for _ in range(dice.randrange(1, 200)):
            writer.add(step, {"loss": step / 7, "grid": np.full((2, 3), step, np.float32)})
            step += 1
        writer.flush()
        struct.pack_into("q", progress, 0, step - 1)


def main(root: Path, count: int) -> None:
    dice = random.Random(0)
    for number in range(count):
        progress = mmap.mmap(-1, 8)
        struct.pack_into("q", progress, 0, -2)
        delay = dice.uniform(0.0, 0.06)
        child = os.fork()
        if child == 0:
            write_until_killed(root / str(number), progress, random.Random(number))
        # Every second one may begin in peace, however busy the machine is.
        while number % 2 and struct.unpack("q", progress[:8])[0] < 0:
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (known,) = struct.unpack("q", progress[:8])
        print("unborn" if known == -2 else known)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
