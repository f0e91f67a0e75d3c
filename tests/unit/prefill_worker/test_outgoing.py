from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from prefill_worker.outgoing import OutgoingKV
from prefill_worker.scheduling import plan_chunks, plan_pull

SOURCE_BLOCKS = [7, 3, 5]


class RecordingSink:
    def __init__(self, wanted: range, block_size: int) -> None:
        self.wanted = wanted
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
    outgoing, sink = OutgoingKV(2, num_tokens), RecordingSink(range(min(first_block, num_blocks), num_blocks), block_size)
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
    assert sorted(sink.sent) == [(layer, block) for layer in range(2) for block in sink.wanted]


@given(st.lists(st.integers(1, 50), max_size=8), st.integers(1, 40))
def test_chunks_keep_to_the_budget_and_to_the_order(remaining: list[int], budget: int) -> None:
    chunks = plan_chunks(remaining, budget)
    assert sum(chunks) == min(sum(remaining), budget)
    assert all(chunk == need for chunk, need in zip(chunks[:-1], remaining, strict=False))


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 300), st.integers(1, 32))
def test_a_pull_spares_tokens_and_leaves_the_last_one(
    num_computed: int, num_prompt: int, num_decode: int, block_size: int
) -> None:
    num_computed = min(num_computed, num_prompt - 1)
    blocks = plan_pull(num_computed, num_prompt, num_decode, block_size)
    whole = min(num_decode, num_prompt - 1) // block_size * block_size
    if whole - num_computed < 16:
        assert not blocks
    else:
        assert blocks.start * block_size <= num_computed < (blocks.start + 1) * block_size
        assert blocks.stop * block_size == whole
