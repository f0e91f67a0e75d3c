"""What changed among the workers, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from segue.v1.worker_pb2 import WorkerRecord


def describe_changes(before: Mapping[str, WorkerRecord], after: Mapping[str, WorkerRecord]) -> list[str]:
    """One line for each worker that is new, gone, started anew or draining; keys are worker ids."""
    lines = []
    for worker_id in sorted(before.keys() | after.keys()):
        old, new = before.get(worker_id), after.get(worker_id)
        if new is None:
            lines.append(f"{worker_id} is gone")
        elif old is None:
            lines.append(f"{worker_id} serves, {_process(new)}")
        elif new.epoch != old.epoch:
            lines.append(f"{worker_id} was restarted: pid {old.pid} → {_process(new)}")
        elif new.draining and not old.draining:
            lines.append(f"{worker_id} is draining")
    return lines


def by_id(records: Sequence[WorkerRecord]) -> dict[str, WorkerRecord]:
    return {record.worker_id: record for record in records}


def _process(record: WorkerRecord) -> str:
    return f"pid {record.pid}, epoch {record.epoch}"
