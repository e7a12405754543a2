"""The folder through which an engine's states pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from capture.engines import folder
from capture.engines.folder import MAX_BYTES, states_folder
from pipeline.errors import TargetError
from pipeline.process import place

MIB = 2**20


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """Folders in place of /dev/shm and of temporary files, and the bytes free in each."""
    free = {}
    for name, size in (("memory", 1000 * MIB), ("disk", 10**12)):
        (tmp_path / name).mkdir()
        free[tmp_path / name] = size
    monkeypatch.setattr(folder, "_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(folder.tempfile, "gettempdir", lambda: str(tmp_path / "disk"))
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    return free


def test_memory_comes_first(tmp_path, rooms):
    found, bound = states_folder(MIB)
    assert found.parent == tmp_path / "memory"
    assert list(found.iterdir()) == []
    assert found.stat().st_mode & 0o077 == 0, "states are not for other users"
    assert bound == 250 * MIB
    assert states_folder(MIB)[0] != found


@pytest.mark.parametrize(
    ("free", "largest", "bound"),
    [
        (1000 * MIB, 500 * MIB, 500 * MIB),  # one sample fits, and room for the next
        (1000 * MIB, 300 * MIB, 300 * MIB),
        (10**12, MIB, MAX_BYTES),
        (10**12, 2 * MAX_BYTES, 2 * MAX_BYTES),
    ],
)
def test_the_bound(tmp_path, rooms, free, largest, bound):
    rooms[tmp_path / "memory"] = free
    found, got = states_folder(largest)
    assert (found.parent, got) == (tmp_path / "memory", bound)


def test_temporary_files_where_memory_has_no_room(tmp_path, rooms):
    found, bound = states_folder(501 * MIB)
    assert found.parent == tmp_path / "disk"
    assert bound == MAX_BYTES


def test_temporary_files_where_there_is_no_such_memory(tmp_path, rooms):
    (tmp_path / "memory").rmdir()
    assert states_folder(MIB)[0].parent == tmp_path / "disk"


def test_no_room_anywhere_is_said_with_the_sizes(tmp_path, rooms):
    rooms[tmp_path / "disk"] = 900 * 10**6
    with pytest.raises(TargetError) as caught:
        states_folder(501 * MIB)
    message = str(caught.value)
    for part in ("1.1 GB", f"{tmp_path / 'memory'} has 1.0 GB", f"{tmp_path / 'disk'} has 900.0 MB"):
        assert part in message, message
    for part in ("TMPDIR", "--max-length"):
        assert part in message
    assert "\n" not in message
    assert not any(list(path.iterdir()) for path in rooms)


def test_folders_of_dead_processes_alone_are_removed(tmp_path, rooms):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        dead = ended.pid
    names = {
        "dead": f"dspark-states-{place()}-{dead}-abc",
        "alive": f"dspark-states-{place()}-{os.getppid()}-abc",
        "elsewhere": f"dspark-states-{'0' * 12}-{dead}-abc",
        "no number": f"dspark-states-{place()}-x-abc",
        "another's": f"other-states-{place()}-{dead}-abc",
    }
    for parent in rooms:
        for name in names.values():
            (parent / name).mkdir()
            (parent / name / "7.safetensors").write_bytes(b"states")
    found, _ = states_folder(MIB)

    def left(parent: Path) -> set[str]:
        return {path.name for path in parent.iterdir() if path != found}

    everything = set(names.values())
    assert left(tmp_path / "memory") == everything - {names["dead"]}
    assert left(tmp_path / "disk") == everything, "it is not looked at where memory has room"
    assert (tmp_path / "memory" / names["alive"] / "7.safetensors").exists()
    rooms[tmp_path / "memory"] = 0
    states_folder(MIB)
    assert names["dead"] not in left(tmp_path / "disk")
