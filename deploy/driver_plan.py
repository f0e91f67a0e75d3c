"""What the launcher tells the Ray driver to run, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace

from segue.config import WorkerSettings


@dataclass(frozen=True, slots=True)
class DriverPlan:
    """What to run. `ray_address` empty: a local Ray with its files in `temp_dir`."""

    cluster_id: str
    ray_address: str
    # "module:coroutine function", given WorkerSettings.
    entry: str
    # WorkerSettings as JSON, one for each replica.
    workers: tuple[str, ...]
    # Over the nodes of a Ray cluster: a worker is then reached at the address of the node that it lands on.
    spread: bool
    temp_dir: str = ""
    # Custom resources of the nodes that each role's actors are for, and how much one takes.
    prefill_resources: dict[str, float] = field(default_factory=dict)
    decode_resources: dict[str, float] = field(default_factory=dict)

    def with_temp_dir(self, temp_dir: str) -> DriverPlan:
        return replace(self, temp_dir=temp_dir)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DriverPlan:
        values = json.loads(text)
        return cls(**{**values, "workers": tuple(values["workers"])})

    def worker_settings(self) -> list[WorkerSettings]:
        return [WorkerSettings.model_validate_json(text) for text in self.workers]
