"""Which journal a file system gets, and who holds the lock."""

from pathlib import Path

import pytest

from dynascope.record import RecordWriter, locking, open_record

MOUNTS = [
    "/dev/sda / ext4 rw 0 0",
    "server:/home /home nfs4 rw 0 0",
    "/dev/sdb /home/local xfs rw 0 0",
    "tank /data\\040set fuse.sshfs rw 0 0",
    "broken",
]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/run", "ext4"),
        ("/home/me/run", "nfs4"),
        ("/home/local/run", "xfs"),
        ("/homework", "ext4"),
        ("/data set/run", "fuse.sshfs"),
    ],
)
def test_longest_mount_point_decides(path, kind):
    assert locking.file_system_of(Path(path), MOUNTS) == kind


def test_later_mount_on_the_same_point_hides_the_earlier():
    assert locking.file_system_of(Path("/x"), ["a / rootfs rw 0 0", "b / ext4 rw 0 0"]) == "ext4"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "9p", "fuse.sshfs"])
def test_network_file_systems_get_no_write_ahead_log(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"x / {kind} rw 0 0\n")
    assert not locking.allows_wal(tmp_path)


def test_record_is_live_while_its_writer_is_open(tmp_path):
    with RecordWriter(tmp_path) as writer:
        writer.add(0, {"x": 1.0})
        assert open_record(tmp_path).is_live()
    assert not open_record(tmp_path).is_live()
