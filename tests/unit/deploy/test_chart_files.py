"""What the Helm chart says of the code, without Helm: settings, metrics, errors. make test-deploy renders it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy.chart_schema import SCHEMA, with_settings
from deploy.metrics_reference import REFERENCE, reference
from router.metric_families import FAMILIES
from segue.errors import RateLimited, RequestCancelled, RequestError

FILES = SCHEMA.parent / "files"
ALERTS = yaml.safe_load((FILES / "alerts.yaml").read_text())
DASHBOARD = json.loads((FILES / "dashboard.json").read_text())
SELECTOR = re.compile(r"\b(segue_\w+)(?:\{([^}]*)\})?")
# What Prometheus adds when it scrapes.
TARGET_LABELS = {"namespace", "service", "pod", "job", "instance", "le"}


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Names of all series that a router has, as Prometheus stores them, and their labels."""
    return {
        name: set(family.labels)
        for family in FAMILIES
        for name in (
            [f"{family.name}_{part}" for part in ("bucket", "sum", "count")] if family.kind == "histogram" else [family.name]
        )
    }


def expressions() -> Iterator[tuple[str, str]]:
    """Every PromQL expression, and where it is."""
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for template in sorted((SCHEMA.parent / "templates").glob("*.yaml")):
        for line in template.read_text().splitlines():
            if "query:" in line:
                yield template.name, line.partition("query:")[2]


def unknown(expression: str, series: dict[str, set[str]]) -> list[str]:
    """Series and labels in it that no router has."""
    problems, known = [], set(TARGET_LABELS)
    for name, matchers in SELECTOR.findall(expression):
        if name not in series:
            problems.append(name)
            continue
        known |= series[name]
        problems += [
            f"{name}{{{label}}}" for label in re.findall(r"(\w+)\s*[=!]", matchers) if label not in series[name] | TARGET_LABELS
        ]
    grouped = re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", expression)
    return problems + [label for group in grouped for label in re.split(r",\s*", group) if label not in known]


def test_alerts_and_panels_refer_to_what_routers_export(series: dict[str, set[str]]) -> None:
    # A selector in a template is a format string.
    found = [
        (place, "".join(expression.split("%s")) if "printf" in expression else expression)
        for place, expression in expressions()
    ]
    assert len(found) > 20
    assert [(place, problems) for place, expression in found if (problems := unknown(expression, series))] == []


def test_an_expression_of_something_else_would_be_seen(series: dict[str, set[str]]) -> None:
    assert unknown('sum by (role) (segue_worker_state{state="ready"})', series) == []
    assert unknown('segue_worker_states{state="ready"}', series) == ["segue_worker_states"]
    assert unknown("segue_requests", series) == ["segue_requests"]
    assert unknown('segue_worker_state{sort="ready"}', series) == ["segue_worker_state{sort}"]
    assert unknown("sum by (sort) (segue_worker_state)", series) == ["sort"]
    assert unknown("sum by (cause) (segue_worker_state)", series) == ["cause"]


def test_the_alert_of_failures_leaves_out_what_clients_do(series: dict[str, set[str]]) -> None:
    (expression,) = [alert["expr"] for alert in ALERTS if alert["alert"] == "SegueRequestsFail"]
    (outcomes,) = re.findall(r'outcome!~"([^"]*)"', expression)
    theirs = {error.code for error in (RequestError, *RequestError.__subclasses__())}
    assert set(outcomes.split("|")) == {"ok", RequestCancelled.code, RateLimited.code} | theirs


def test_alerts_say_what_to_do() -> None:
    assert len({alert["alert"] for alert in ALERTS}) == len(ALERTS)
    for alert in ALERTS:
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert alert["annotations"].keys() == {"summary", "description"}


def test_panels_do_not_overlap() -> None:
    cells = [cell for panel in DASHBOARD["panels"] for cell in cells_of(panel["gridPos"])]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def cells_of(place: dict[str, Any]) -> list[tuple[int, int]]:
    return [(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])]


def test_the_chart_knows_every_setting() -> None:
    assert with_settings(SCHEMA.read_text()) == SCHEMA.read_text(), "run: make manifests"


def test_the_reference_of_metrics_is_up_to_date() -> None:
    assert reference() == REFERENCE.read_text(), "run: make manifests"


def test_the_docs_name_metrics_and_alerts_that_there_are(series: dict[str, set[str]]) -> None:
    text = (REFERENCE.parent / "observability.md").read_text()
    names = set(re.findall(r"\bsegue_\w+", text))
    assert len(names) > 10
    assert names <= series.keys() | {family.name for family in FAMILIES}
    assert set(re.findall(r"`(Segue\w+)`", text)) == {alert["alert"] for alert in ALERTS}
