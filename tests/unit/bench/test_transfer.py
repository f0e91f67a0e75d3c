from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from bench.asked import AskedProcess
from bench.overhead import Timing, Timings
from bench.peers.catalog import find_nixl, venv_stamp
from bench.transfer import JUDGED_SIZE, measure, rows, verdicts
from bench.transfer_cases import SIZES, Case
from bench.transfer_hidden import extra_ms, hidden_rows
from bench.transfer_pair import TransferPair
from segue.client import RequestPath
from segue.errors import InternalError

ECHO = """
import sys
for line in sys.stdin:
    if "die" in line:
        sys.exit("as it was told")
    print(line, end="", flush=True)
"""


@pytest.fixture(autouse=True)
def segue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SEGUE_PEERS", raising=False)


async def test_a_pair_moves_bytes_every_way() -> None:
    case = Case.of_size(num_layers=2, num_blocks=3)
    async with TransferPair(case) as pair:
        for transport in ("shm", "tcp", "shm"):
            assert await pair.transfer_s(transport) > 0
        for measure_s in (pair.raw_tcp_s, pair.memcpy_s, pair.checksum_s):
            assert await measure_s() > 0


async def test_a_process_answers_until_it_dies() -> None:
    async with AskedProcess("echo", [sys.executable, "-c", ECHO]) as process:
        assert await process.ask({"a": 1}) == {"a": 1}
        with pytest.raises(InternalError, match="as it was told"):
            await process.ask({"a": "die"})


async def test_a_process_that_rests_is_stopped_between_two_questions() -> None:
    async with AskedProcess("echo", [sys.executable, "-c", ECHO], rests=True) as process:
        for question in ({"a": 1}, {"a": 2}):
            assert await process.ask(question) == question
            # Returns once it is stopped.
            assert await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)


def test_sizes_are_what_their_names_say() -> None:
    kib = {"KiB": 2**10, "MiB": 2**20}
    for name, case in SIZES.items():
        assert case.num_bytes == int(name[:-3]) * kib[name[-3:]]
        assert Case.from_json(case.to_json()) == case


async def test_systems_take_turns_and_a_run_is_its_best_try() -> None:
    turns: list[str] = []

    def system(name: str, seconds: list[float]):
        async def measure_s() -> float:
            turns.append(name)
            return seconds.pop(0)

        return measure_s

    runs = await measure({"a": system("a", [5, 4, 3, 4, 5, 9, 9, 8, 9, 9]), "b": system("b", [1.0] * 10)}, repeats=2)
    assert runs == {"a": [3, 8], "b": [1, 1]}
    assert turns == ["a", "b"] * 10


def test_rows_give_rates_with_ratios_and_the_best_of_the_pieces() -> None:
    runs = {"memcpy": [0.01], "checksum": [0.005], "raw_tcp": [0.04], "shm": [0.02], "tcp": [0.08]}
    runs |= {"nixl/1": [0.04], "nixl/2": [0.03], "nixl_tcp/1": [0.1]}
    found = {row.metric: row for row in rows(JUDGED_SIZE, 10**8, runs)}
    assert found[f"shm_{JUDGED_SIZE}_gb_s"].value == 5
    assert found[f"shm_{JUDGED_SIZE}_gb_s"].ratio_to == {"memcpy": 0.5, "nixl": pytest.approx(1.5)}
    assert found[f"tcp_{JUDGED_SIZE}_gb_s"].ratio_to == {"raw_tcp": 0.5, "nixl_tcp": 1.25}
    assert found[f"checksum_{JUDGED_SIZE}_gb_s"].ratio_to == {"memcpy": 2}
    assert found[f"tcp_{JUDGED_SIZE}_ms"].value == 80
    assert [line.rpartition(" ")[2] for line in verdicts(list(found.values()))] == ["missed", "met", "missed", "missed"]


def timing(handover_s: float, *gaps_s: float) -> Timing:
    return Timing(0.5, gaps_s, RequestPath("p", "d", "shm", 0, 0, 0, 0, 0.1, handover_s, 0.5, 1))


def test_what_is_hidden_is_what_is_left_of_a_transfer_without_computation() -> None:
    requests = Timings([timing(0.001, 0.012, 0.010, 0.009, 0.010), timing(0.003, 0.012, 0.010, 0.010, 0.010)])
    assert extra_ms(requests.timings[0]) == pytest.approx(2)
    found = {row.metric: row for row in hidden_rows(requests, [0.02, 0.02, 0.03])}
    assert found["transfer_hidden_share_1000"].runs == pytest.approx((0.95, 0.85))
    assert found["transfer_exposed_ms_1000"].value == pytest.approx(2)
    assert found["handover_extra_ms"].value == pytest.approx(2)


def test_nixl_is_found_where_its_environment_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_PEERS", str(tmp_path))
    assert find_nixl() is None
    stamp = venv_stamp(tmp_path / "nixl")
    stamp.parent.mkdir()
    stamp.write_text("")
    command = find_nixl()
    assert command is not None
    assert command[0].startswith(str(tmp_path))
    assert Path(command[1]).exists()
