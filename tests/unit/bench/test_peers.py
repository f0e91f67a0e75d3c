from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.peers import Peer, PeerError, PeerSpec, find_peers
from bench.peers.catalog import GGUF_FORMATS, all_peers, peers_dir, venv_stamp
from bench.peers.client import PeerCannot

# A driver without a peer: it answers with what it was asked. Prompts of 13 tokens kill it, 14 silence it.
FAKE = """
import os, signal

print("noise that is no answer")

class Fake:
    def facts(self):
        return {"version": "fake 1", "format": "none", "pid": str(os.getpid()), "cores": str(os.sched_getaffinity(0))}
    def prefill_s(self, num_tokens):
        print("more noise")
        if num_tokens == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        if num_tokens == 14:
            signal.pause()
        return num_tokens / 1000
    def decode_steps_s(self, batch_size, context, num_steps):
        if batch_size > 4:
            raise ValueError("at most 4")
        return [100.0] + [batch_size + context / 1000] * (num_steps - 1)

def load(options):
    if options["broken"]:
        raise OSError("no such model: " + options["model"])
    return Fake()
"""


@pytest.fixture(autouse=True)
def segue_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SEGUE_PEERS", raising=False)


def fake(tmp_path: Path, *, broken: bool = False) -> PeerSpec:
    (tmp_path / "fake_driver.py").write_text(FAKE)
    env = {"PYTHONPATH": str(tmp_path)}
    return PeerSpec("fake", Path(sys.executable), "fake_driver", tmp_path / "weights", {"broken": broken}, env)


@pytest.fixture
def core() -> int:
    return max(os.sched_getaffinity(0))


@pytest.fixture
def peer(tmp_path: Path, core: int) -> Iterator[Peer]:
    with Peer(fake(tmp_path), core) as peer:
        yield peer


def test_a_peer_runs_on_its_core_and_answers_while_what_it_prints_goes_to_its_log(peer: Peer, core: int) -> None:
    assert peer.facts["version"] == "fake 1"
    assert peer.facts["cores"] == str({core})
    assert [peer.prefill_s(1), peer.prefill_s(2000)] == [0.001, 2.0]
    assert peer.log.read_text().split("\n")[:2] == ["noise that is no answer", "more noise"]


def test_a_decode_step_is_the_median_of_the_steps(peer: Peer) -> None:
    assert peer.decode_step_s(4, 256, steps=3) == 4.256


def test_a_peer_that_cannot_says_why_and_goes_on(peer: Peer) -> None:
    with pytest.raises(PeerCannot, match="fake: at most 4"):
        peer.decode_step_s(5, 64)
    assert peer.prefill_s(1) == 0.001


def test_a_peer_that_died_is_an_error_with_its_log(peer: Peer) -> None:
    for _ in range(2):
        with pytest.raises(PeerError, match=r"fake ended(.|\n)*more noise"):
            peer.prefill_s(13)


def test_a_peer_that_does_not_load_is_an_error_with_its_log(tmp_path: Path, core: int) -> None:
    with pytest.raises(PeerError, match=r"fake ended(.|\n)*no such model: .*weights"):
        Peer(fake(tmp_path, broken=True), core).__enter__()


def test_a_peer_that_says_nothing_is_an_error_and_killed(tmp_path: Path, core: int) -> None:
    with Peer(fake(tmp_path), core) as peer:
        peer._limit_s = 0.1  # enough for an answer that never comes, not for a start
        with pytest.raises(PeerError, match="said nothing"):
            peer.prefill_s(14)
    assert not is_alive(int(peer.facts["pid"]))


def test_a_peer_ends_with_its_block(tmp_path: Path, core: int) -> None:
    with Peer(fake(tmp_path), core) as peer:
        pid = int(peer.facts["pid"])
        assert is_alive(pid)
    assert not is_alive(pid)
    with pytest.raises(RuntimeError, match="not entered"):
        peer.prefill_s(1)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_only_complete_peers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGUE_PEERS", str(tmp_path))
    assert find_peers() == []
    q4_0 = next(spec for spec in all_peers(peers_dir()) if spec.name == "llama_cpp_q4_0")
    q4_0.model.parent.mkdir()
    q4_0.model.touch()
    assert find_peers() == []
    venv_stamp(tmp_path / "llama_cpp").parent.mkdir()
    venv_stamp(tmp_path / "llama_cpp").touch()
    assert find_peers() == [q4_0]


def test_peers_have_names_of_their_own_below_the_cache() -> None:
    names = [spec.name for spec in all_peers(peers_dir())]
    assert names == ["vllm_f32", "vllm_w8a8", *(f"llama_cpp_{name}" for name in GGUF_FORMATS)]
    assert peers_dir() == Path(os.environ["SEGUE_HOME"]) / "peers"
