from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.outgoing import OutgoingKV
from prefill_worker.scheduling import plan_chunks

SOURCE_BLOCKS = [7, 3, 5]


class RecordingSink:
    def __init__(self, first_block: int, block_size: int) -> None:
        self.first_block = first_block
        self.block_size = block_size
        self.sent: list[tuple[int, int]] = []

    def send(self, layer: int, source_blocks: Sequence[int], blocks: range) -> None:
        assert source_blocks == SOURCE_BLOCKS
        self.sent += [(layer, block) for block in blocks]


@given(
    num_tokens=st.integers(1, 40),
    block_size=st.integers(1, 8),
    chunk=st.integers(1, 16),
    cached_tokens=st.integers(0, 39),
    first_block=st.integers(0, 12),
    attach_after=st.integers(0, 12),
)
def test_every_missing_block_goes_out_once_whenever_the_ticket_comes(
    num_tokens: int, block_size: int, chunk: int, cached_tokens: int, first_block: int, attach_after: int
) -> None:
    num_blocks = -(-num_tokens // block_size)
    cached_tokens = min(cached_tokens, num_tokens - 1)
    outgoing, sink = OutgoingKV(2, num_tokens), RecordingSink(min(first_block, num_blocks), block_size)
    events = 0

    def tick() -> None:
        nonlocal events
        if events == attach_after:
            outgoing.attach(sink)
        events += 1

    tick()
    outgoing.begin(SOURCE_BLOCKS, cached_tokens)
    done = cached_tokens
    while done < num_tokens:
        done = min(done + chunk, num_tokens)
        for layer in range(2):
            tick()
            outgoing.layer_done(layer, done)
            whole = num_blocks if done == num_tokens else done // block_size
            assert all(block < whole for at, block in sink.sent if at == layer)
    if events <= attach_after:
        outgoing.attach(sink)
    assert sorted(sink.sent) == [(layer, block) for layer in range(2) for block in range(sink.first_block, num_blocks)]


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(1, 40))
def test_chunks_keep_to_the_budget_and_to_the_order(remaining: list[int], budget: int) -> None:
    chunks = plan_chunks(remaining, budget)
    assert sum(chunks) == min(sum(remaining), budget)
    assert all(chunk == need for chunk, need in zip(chunks[:-1], remaining, strict=False))
