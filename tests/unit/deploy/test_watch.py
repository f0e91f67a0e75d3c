"""What is said of workers that come and go."""

from deploy.watch import WorkerWatch
from segue.v1.worker_pb2 import WorkerRecord


def record(worker_id: str, epoch: int, *, pid: int = 7, draining: bool = False) -> WorkerRecord:
    return WorkerRecord(worker_id=worker_id, epoch=epoch, pid=pid, draining=draining)


def test_nothing_new_is_not_news() -> None:
    watch = WorkerWatch([record("decode-0", 1)])
    assert watch.look([record("decode-0", 1)]) == []


def test_a_restart_within_the_lease() -> None:
    watch = WorkerWatch([record("decode-0", 1, pid=7)])
    assert watch.look([record("decode-0", 3, pid=8)]) == ["decode-0 was restarted, pid 8, epoch 3 (before: pid 7)"]
    assert watch.look([record("decode-0", 3, pid=8)]) == []


def test_a_restart_after_the_lease() -> None:
    watch = WorkerWatch([record("decode-0", 1, pid=7)])
    assert watch.look([]) == ["decode-0 is gone, pid 7"]
    assert watch.look([]) == []
    assert watch.look([record("decode-0", 3, pid=8)]) == ["decode-0 was restarted, pid 8, epoch 3 (before: pid 7)"]


def test_a_lapse_is_no_restart() -> None:
    watch = WorkerWatch([record("decode-0", 1, pid=7)])
    watch.look([])
    assert watch.look([record("decode-0", 1, pid=7)]) == ["decode-0 is back, pid 7, epoch 1"]


def test_drain_and_arrival() -> None:
    watch = WorkerWatch([record("decode-0", 1)])
    draining = record("decode-0", 1, draining=True)
    assert watch.look([draining, record("decode-1", 2)]) == ["decode-0 is draining", "decode-1 joined, pid 7, epoch 2"]
    assert watch.look([draining, record("decode-1", 2)]) == []
