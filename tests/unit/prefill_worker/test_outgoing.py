from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.outgoing import OutgoingKV
from prefill_worker.scheduling import plan_chunks
from segue.kv_layout import KVLayout


class RecordingSink:
    def __init__(self) -> None:
        self.sent: list[tuple[int, int, int]] = []

    def send(self, layer: int, blocks: Sequence[tuple[int, int]]) -> None:
        self.sent += [(layer, source, index) for source, index in blocks]


@given(
    num_tokens=st.integers(1, 40),
    block_size=st.integers(1, 8),
    chunk=st.integers(1, 16),
    cached_blocks=st.integers(0, 3),
    first_block=st.integers(0, 12),
    attach_after=st.integers(0, 12),
)
def test_every_missing_block_goes_out_once_whenever_the_ticket_comes(
    num_tokens: int, block_size: int, chunk: int, cached_blocks: int, first_block: int, attach_after: int
) -> None:
    layout = KVLayout(2, 1, 4, block_size, "float32", "r")
    num_blocks = layout.num_blocks_for(num_tokens)
    first_block = min(first_block, num_blocks)
    cached_tokens = min(cached_blocks, (num_tokens - 1) // block_size) * block_size
    block_ids = [100 + i for i in range(num_blocks)]
    outgoing, sink = OutgoingKV(layout, num_tokens), RecordingSink()
    events = 0

    def tick() -> None:
        nonlocal events
        if events == attach_after:
            outgoing.attach(sink, first_block)
        events += 1

    tick()
    outgoing.begin(block_ids, cached_tokens)
    done = cached_tokens
    while done < num_tokens:
        done = min(done + chunk, num_tokens)
        for layer in range(2):
            tick()
            outgoing.layer_done(layer, done)
            whole = num_blocks if done == num_tokens else done // block_size
            assert all(index + first_block < whole for at, _, index in sink.sent if at == layer)
    if events <= attach_after:
        outgoing.attach(sink, first_block)
    expected = [(layer, block_ids[i], i - first_block) for layer in range(2) for i in range(first_block, num_blocks)]
    assert sorted(sink.sent) == sorted(expected)


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(1, 40))
def test_chunks_keep_to_the_budget_and_to_the_order(remaining: list[int], budget: int) -> None:
    chunks = plan_chunks(remaining, budget)
    assert sum(chunks) == min(sum(remaining), budget)
    assert all(chunk == need for chunk, need in zip(chunks[:-1], remaining, strict=False))
