"""What happens to the workers, in words."""

from __future__ import annotations

from collections.abc import Sequence

from segue.v1.worker_pb2 import WorkerRecord


class WorkerWatch:
    """Compares each look at the membership with the one before."""

    def __init__(self, records: Sequence[WorkerRecord]) -> None:
        self._present = _by_id(records)
        # Also of workers that are gone, by worker id.
        self._last_seen = dict(self._present)

    def look(self, records: Sequence[WorkerRecord]) -> list[str]:
        """One line for each worker that came, went, was started anew or drains."""
        before, after = self._present, _by_id(records)
        lines = []
        for worker_id in sorted(before.keys() | after.keys()):
            old, new = before.get(worker_id), after.get(worker_id)
            if new is None:
                lines.append(f"{worker_id} is gone, pid {self._last_seen[worker_id].pid}")
            elif worker_id not in self._last_seen:
                lines.append(f"{worker_id} joined, {_process(new)}")
            elif new.epoch != self._last_seen[worker_id].epoch:
                lines.append(f"{worker_id} was restarted, {_process(new)} (before: pid {self._last_seen[worker_id].pid})")
            elif old is None:
                lines.append(f"{worker_id} is back, {_process(new)}")  # its lease had lapsed, it had not died
            elif new.draining and not old.draining:
                lines.append(f"{worker_id} is draining")
            elif old.draining and not new.draining:
                lines.append(f"{worker_id} takes requests again")
            elif old.roles != new.roles:
                lines.append(f"{worker_id} is a {' and '.join(new.roles)} worker now")
        self._present = after
        self._last_seen |= after
        return lines


def _by_id(records: Sequence[WorkerRecord]) -> dict[str, WorkerRecord]:
    return {record.worker_id: record for record in records}


def _process(record: WorkerRecord) -> str:
    return f"pid {record.pid}, epoch {record.epoch}"
