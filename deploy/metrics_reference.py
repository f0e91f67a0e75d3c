"""`python -m deploy.metrics_reference`: writes docs/metrics.md from the metrics that the code has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from router.metric_families import LABELS, OF_ROUTER, OF_WORKERS, Family

REFERENCE = Path(__file__).parent.parent / "docs/metrics.md"
_BEGINNING = """# Metrics

Written by `make manifests` from [router/metric_families.py](../router/metric_families.py).

Routers export all metrics, at `/metrics` of the HTTP port; those of workers come from what each worker tells its routers twice
a second. [observability.md](observability.md) says how to read them.
"""
_OF_WORKERS_TEXT = """
Every router tells of every worker: take the `max by (worker)` over routers, never their sum. Counters begin at 0 when a worker
starts again, as `rate` expects. Buckets of histograms are the worker's.
"""


def reference() -> str:
    """The text of docs/metrics.md."""
    return "".join(
        (
            _BEGINNING,
            "\n## Of a router\n\n",
            _table(OF_ROUTER),
            "\n## Of its workers\n",
            _OF_WORKERS_TEXT,
            "\n",
            _table(OF_WORKERS),
            "\n## Labels\n\n| label | values |\n|---|---|\n",
            *(f"| `{name}` | {values} |\n" for name, values in LABELS.items()),
        )
    )


def _table(families: Iterable[Family]) -> str:
    rows = ((f"`{one.name}`", one.kind, ", ".join(f"`{label}`" for label in one.labels), one.help) for one in families)
    return "".join(f"| {' | '.join(row)} |\n" for row in [("metric", "type", "labels", "what"), ("---",) * 4, *rows])


def main() -> None:
    REFERENCE.write_text(reference())


if __name__ == "__main__":
    main()
