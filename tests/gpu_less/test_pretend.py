"""The pretend device itself: it shows the faults that it is there to show."""

from __future__ import annotations

import pytest

from tests.gpu_less.session import Outcome, Session

pytestmark = pytest.mark.gpu_less


def tried(gpu: Session, name: str) -> Outcome:
    outcome = gpu.run("call", f"tests.gpu_less.mistakes:{name}")
    assert outcome.code == 0, outcome.err
    return outcome


def whats(notes: dict) -> list[str]:
    return [note.what for note in notes]


def test_a_late_copy_is_poison_until_it_is_waited_for(gpu: Session) -> None:
    outcome = tried(gpu, "read_too_early")
    poison = ["nan", "nan"]
    assert outcome.value == {"early": poison, "event asked once": poison, "waited": [1.0, 2.0]}


def test_a_copy_of_memory_that_is_not_page_locked_is_a_wait(gpu: Session) -> None:
    outcome = tried(gpu, "copy_unpinned")
    assert whats(outcome.syncs) == ["copy to the GPU", "copy to memory that is not page-locked"]


@pytest.mark.parametrize("name", ["mix_cpu", "mix_gpus", "index_cpu_by_gpu", "gather_by_cpu", "to_numpy"])
def test_devices_do_not_mix(gpu: Session, name: str) -> None:
    outcome = gpu.run("call", f"tests.gpu_less.mistakes:{name}")
    assert outcome.code == -1
    assert "same device" in outcome.err or "host memory first" in outcome.err


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("read_on_another_stream", "a race"),
        ("overwrite_what_another_stream_reads", "a race"),
        ("free_under_another_stream", "no record_stream"),
        ("change_pinned_memory_too_early", "page-locked memory changed"),
    ],
)
def test_a_race_is_a_fault(gpu: Session, name: str, fault: str) -> None:
    found = whats(tried(gpu, name).faults)
    assert any(fault in what for what in found), found


@pytest.mark.parametrize("name", ["wait_for_the_stream", "wait_for_the_event", "recorded_stream"])
def test_ordered_work_is_none(gpu: Session, name: str) -> None:
    assert not tried(gpu, name).faults


def test_what_waits_is_counted_by_its_line(gpu: Session) -> None:
    outcome = tried(gpu, "waits_of_many_kinds")
    found = {(note.what, note.lines[0].rpartition(" ")[2]): n for note, n in outcome.syncs.items()}
    kinds = ("item", "tolist", "nonzero", "boolean index", "unique", "copy to the host")
    for kind in (*kinds, "torch.cuda.synchronize"):
        assert found.get((kind, "waits_of_many_kinds")), (kind, found)
    assert len({note.lines[0] for note in outcome.syncs}) > len(kinds)


def test_what_does_not_wait_is_not_counted(gpu: Session) -> None:
    assert not tried(gpu, "waits_of_no_kind").syncs


def test_a_new_thread_begins_on_gpu_0(gpu: Session) -> None:
    outcome = tried(gpu, "pin_in_a_thread")
    pinned = {note.thread: note.device for note in outcome.contexts if "page-locked" in note.what}
    assert pinned == {"": 1, "new": 0}


def test_its_random_numbers_and_gradients_are_the_cpus(gpu: Session) -> None:
    assert tried(gpu, "same_numbers").value == [True, True, True]


def test_memory_is_counted(gpu: Session) -> None:
    outcome = tried(gpu, "allocate")
    assert outcome.value == {"held": 4096, "peak": 8192, "after": 0, "peak after": 0}


def test_times_need_events_that_have_come(gpu: Session) -> None:
    assert tried(gpu, "time_events").value == ["device not ready", True]
