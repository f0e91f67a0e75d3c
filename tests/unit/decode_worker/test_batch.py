import asyncio

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from decode_worker.batch import DecodeBatch
from decode_worker.job import DecodeJob
from engine.block_pool import BlockPool
from engine.sequence import Sequence
from segue.kv_layout import KVLayout
from segue.prefix import block_hashes
from segue.sampling import GeneratedToken, SamplingParams
from segue.v1 import worker_pb2 as pb
from segue.worker_link import RouterLink

NUM_BLOCKS, BLOCK_SIZE = 12, 2
LAYOUT = KVLayout(1, 1, 4, BLOCK_SIZE, "float32", "r")


class DecodeBatchMachine(RuleBasedStateMachine):
    """Sequences come, decode and go in a pool that is too small for them: none is lost, the oldest always advances."""

    @initialize()
    def start(self) -> None:
        self.pool = BlockPool(NUM_BLOCKS)
        self.batch = DecodeBatch(self.pool, LAYOUT, max_sequences=4, max_step_tokens=5)
        self.jobs: list[DecodeJob] = []
        self.loop = asyncio.new_event_loop()

    def teardown(self) -> None:
        self.loop.close()

    @rule(num_prompt=st.integers(1, 6), max_tokens=st.integers(2, 10))
    def arrive(self, num_prompt: int, max_tokens: int) -> None:
        tokens = list(range(num_prompt))
        lease = self.pool.lease(LAYOUT.num_blocks_for(num_prompt), block_hashes(tokens, BLOCK_SIZE))
        if lease is None:
            return
        sequence = Sequence(len(self.jobs), tokens, SamplingParams(max_tokens=max_tokens), lease=lease)
        sequence.num_computed = num_prompt
        sequence.append(GeneratedToken(7))
        hashes = block_hashes(tokens[:num_prompt], BLOCK_SIZE)
        job = DecodeJob(
            key=pb.SequenceKey(),
            link=RouterLink("r"),
            sequence=sequence,
            is_local=False,
            num_prefill_ranks=1,
            block_hashes=hashes,
            num_published_blocks=lease.num_cached,
            admitted=self.loop.create_future(),
            finished=self.loop.create_future(),
        )
        self.batch.publish(job)
        self.batch.add(job)
        self.jobs.append(job)

    @precondition(lambda self: self.jobs)
    @rule()
    def step(self) -> None:
        # Only a sequence that fits alone is ever admitted: 6 + 10 tokens need 8 of 12 blocks.
        oldest = self.batch.running[0] if self.batch.running and not self.batch.preempted else None
        before = oldest.sequence.num_uncomputed if oldest else 0
        plan = self.batch.plan()
        assert plan, "something always makes progress"
        assert len(plan) <= 4
        if oldest:
            assert plan[0][0] is oldest
            assert before >= 1
        for job, chunk in plan:
            lease = job.sequence.lease
            assert lease is not None
            assert chunk.num_tokens >= 1
            assert len(lease.block_ids) * BLOCK_SIZE >= job.sequence.num_computed + chunk.num_tokens
        for job, chunk in plan:
            job.sequence.num_computed += chunk.num_tokens
            self.batch.publish(job)
            if job.sequence.num_uncomputed == 0 and job.sequence.append(GeneratedToken(9)) is not None:
                self.leave(job)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(self.jobs)))

    def leave(self, job: DecodeJob) -> None:
        self.batch.remove(job)
        if job.sequence.lease is not None:
            self.pool.release(job.sequence.lease)
        self.jobs.remove(job)

    @invariant()
    def nothing_is_lost_or_leaked(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        assert sorted(map(id, self.jobs)) == sorted(map(id, [*self.batch.running, *self.batch.preempted]))
        assert all(job.sequence.lease is not None for job in self.batch.running)
        assert all(job.sequence.lease is None for job in self.batch.preempted)
        if not self.jobs:
            assert self.pool.num_leased == 0


TestDecodeBatch = DecodeBatchMachine.TestCase
TestDecodeBatch.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
