"""One writer a file: a lock that ends with its process, and the journal that a file system allows."""

import fcntl
import os
import time
from collections.abc import Sequence
from pathlib import Path

from dynascope.record.model import RecordError

# SQLite's WAL keeps its index in shared memory, which processes on two machines do not share.
NETWORK_FILE_SYSTEMS = ("nfs", "lustre", "gpfs", "cifs", "smb", "9p", "fuse.", "beegfs", "ceph", "afs")


def acquire(path: Path) -> int:
    """Take the writer's lock and return its file descriptor; RecordError when another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt < 9:
                time.sleep(0.02)  # a reader that asks `is_held` holds the lock for an instant
                continue
            owner = os.read(descriptor, 32).decode(errors="replace").strip() or "?"
            os.close(descriptor)
            raise RecordError(
                f"{path.parent} is being written by process {owner}; choose another run directory, or end that process"
            ) from None
        except OSError:
            break  # a file system without locks: creating the record file still refuses a second writer
        else:
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a living process holds the writer's lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def file_system_of(path: Path, mounts: Sequence[str]) -> str:
    """Type of the file system that `path` lies on, from the lines of /proc/self/mounts; empty when not found.

    >>> file_system_of(Path("/data/run"), ["server:/x /data nfs4 rw 0 0", "/dev/a / ext4 rw 0 0"])
    'nfs4'
    """
    best, kind = -1, ""
    for line in mounts:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " "))
        # >=: of two mounts on one point the later one hides the earlier
        if path.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[2]
    return kind


def allows_wal(folder: Path) -> bool:
    """Whether SQLite's write-ahead log can be trusted in this folder (not on network file systems)."""
    try:
        mounts = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:  # not Linux: SQLite's own answer decides
        return True
    return not file_system_of(folder.resolve(), mounts).startswith(NETWORK_FILE_SYSTEMS)
