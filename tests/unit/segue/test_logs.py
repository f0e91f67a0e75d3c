"""What a process logs as JSON, and whose work each line says it is about."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest

from segue.logs import JsonFormatter, log_context, request_of

logger = logging.getLogger("test.logs")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter({"worker_id": "decode-0"}))
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts]


@pytest.fixture
def lines() -> Any:
    handler = Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)


def test_a_line_is_one_object(lines: Lines) -> None:
    logger.warning("café %s\nnext", 3)
    (line,) = lines.read()
    assert "\n" not in lines.texts[0]
    when = datetime.fromisoformat(line.pop("time"))
    assert when.tzinfo == UTC
    assert line == {"level": "WARNING", "logger": "test.logs", "message": "café 3\nnext", "worker_id": "decode-0"}


def test_an_exception_is_one_field(lines: Lines) -> None:
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("failed")
    (line,) = lines.read()
    assert line["message"] == "failed"
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: broken")


async def test_tasks_begun_in_a_context_belong_to_it(lines: Lines) -> None:
    async def work(name: str, is_begun: asyncio.Event, go_on: asyncio.Event) -> None:
        is_begun.set()
        await go_on.wait()
        logger.info(name)

    go_on, tasks = asyncio.Event(), []
    for number in range(2):
        begun = asyncio.Event()
        with log_context(request_id=f"req_{number}", trace_id=""):
            tasks.append(asyncio.create_task(work("task", begun, go_on)))
        await begun.wait()
    with log_context(request_id="req_9"):
        with log_context(sequence_id="req_9-0"):
            logger.info("inner")
        logger.info("outer")
    logger.info("outside")
    go_on.set()
    await asyncio.gather(*tasks)
    whose = [(line["message"], line.get("request_id"), line.get("sequence_id")) for line in lines.read()]
    assert whose == [
        ("inner", "req_9", "req_9-0"),
        ("outer", "req_9", None),
        ("outside", None, None),
        ("task", "req_0", None),
        ("task", "req_1", None),
    ]
    assert all("trace_id" not in line for line in lines.read())


def test_a_call_may_say_whose_line_it_is(lines: Lines) -> None:
    logger.info("x", extra={"sequence_id": "s", "prompt": "never shown"})
    (line,) = lines.read()
    assert line["sequence_id"] == "s"
    assert "never shown" not in lines.texts[0]


def test_a_sequence_names_its_request() -> None:
    assert request_of("req_ab12-p3-1") == request_of("req_ab12-0") == "req_ab12"


def test_all_that_a_process_writes_to_stderr_is_json() -> None:
    script = """
import logging, warnings
from segue.logs import set_up_logging
set_up_logging("json", worker_id="prefill-0")
logging.getLogger("a").info("one")
warnings.warn("two")
raise RuntimeError("three")
"""
    result = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=False)
    found = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["level"] for line in found] == ["INFO", "WARNING", "CRITICAL"]
    assert found[2]["exception"].endswith("RuntimeError: three")
    assert {line["worker_id"] for line in found} == {"prefill-0"}
