from __future__ import annotations

import asyncio
import os
import sys

import pytest

from kv_transfer.identity import host_identity, process_start_time, same_host
from kv_transfer.process_watch import ProcessWatch
from segue.v1 import transfer_pb2 as pb


def test_one_host_is_one_kernel_and_one_view_of_its_processes():
    here = host_identity()
    assert here.pid == os.getpid()
    other_process, elsewhere, container, unknown = (pb.HostIdentity.FromString(here.SerializeToString()) for _ in range(4))
    other_process.pid += 1
    elsewhere.boot_id = "another"
    container.pid_namespace = "pid:[1]"
    unknown.boot_id = ""
    assert same_host(here, other_process)
    assert not same_host(here, elsewhere)
    assert not same_host(here, container)
    assert not same_host(unknown, unknown)


async def test_death_is_noticed():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    died = asyncio.Event()
    ProcessWatch(process.pid, process_start_time(process.pid), died.set)
    assert not died.is_set()
    process.kill()
    await asyncio.wait_for(died.wait(), 30)
    await process.wait()


async def test_a_pid_used_again_is_another_process():
    with pytest.raises(ProcessLookupError):
        ProcessWatch(os.getpid(), process_start_time(os.getpid()) + 1, lambda: None)


async def test_a_dead_process_cannot_be_watched():
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=asyncio.subprocess.PIPE)
    start_time = process_start_time(process.pid)
    process.kill()
    await process.wait()
    with pytest.raises(ProcessLookupError):
        ProcessWatch(process.pid, start_time, lambda: None)
