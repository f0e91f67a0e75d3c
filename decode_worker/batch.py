"""Which sequences decode next, and who gives way when memory runs out.

A sequence is in `running` from its first token until it ends, or in `preempted` while its blocks were taken away; its KV is
then computed anew, from its tokens, when there is room again. The oldest sequence is never preempted for a younger one, so
something always makes progress.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress

from decode_worker.job import DecodeJob
from engine.block_pool import BlockPool
from engine.step import Chunk
from segue.kv_layout import KVLayout
from segue.prefix import block_hashes


class DecodeBatch:
    def __init__(self, pool: BlockPool, layout: KVLayout, *, max_sequences: int, max_step_tokens: int) -> None:
        self._pool = pool
        self._layout = layout
        self._max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens
        # Oldest first; every one has a lease.
        self.running: list[DecodeJob] = []
        # Oldest first; none has a lease.
        self.preempted: deque[DecodeJob] = deque()
        self.num_preemptions = 0

    def add(self, job: DecodeJob) -> None:
        self.running.append(job)

    def remove(self, job: DecodeJob) -> None:
        """Forgets `job` if it is here."""
        for queue in (self.running, self.preempted):
            with suppress(ValueError):
                queue.remove(job)

    def plan(self) -> list[tuple[DecodeJob, Chunk]]:
        """The next step: one token for each sequence whose KV is complete, a chunk for those that are computed anew."""
        self._resume()
        step = []
        budget = self._max_step_tokens
        for job in self.running[: self._max_sequences]:
            if job not in self.running or not self._has_room(job):  # preempted for an older one just now
                continue
            if (num_tokens := min(job.sequence.num_uncomputed, max(budget, 1))) > 1:
                budget -= num_tokens
            step.append((job, Chunk(job.sequence, num_tokens)))
        return step

    def publish(self, job: DecodeJob) -> None:
        """Makes the blocks of `job` that became full available to later prompts with the same beginning."""
        sequence, block_size = job.sequence, self._layout.block_size
        assert sequence.lease is not None
        num_full = sequence.num_computed // block_size
        if num_full > (known := len(job.block_hashes)):
            tokens = sequence.token_ids[known * block_size : num_full * block_size]
            parent = job.block_hashes[-1] if known else b""
            job.block_hashes += block_hashes(tokens, block_size, job.cache_salt, parent)
        for index in range(job.num_published_blocks, num_full):
            self._pool.publish(sequence.lease, index, job.block_hashes[index])
        job.num_published_blocks = max(job.num_published_blocks, num_full)

    def _has_room(self, job: DecodeJob) -> bool:
        """Leases the block that the next token needs, preempting the youngest while there is none. False: `job` itself had to
        give way."""
        lease = job.sequence.lease
        assert lease is not None
        missing = self._layout.num_blocks_for(len(job.sequence.token_ids)) - len(lease.block_ids)
        while missing > 0 and not self._pool.extend(lease, missing):
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is job:
                return False
        return True

    def _preempt(self, job: DecodeJob) -> None:
        assert job.sequence.lease is not None
        self._pool.release(job.sequence.lease)
        job.sequence.lease = None
        job.sequence.num_computed = 0
        self.running.remove(job)
        self.preempted.appendleft(job)
        self.num_preemptions += 1

    def _resume(self) -> None:
        while self.preempted and len(self.running) < self._max_sequences:
            job = self.preempted[0]
            num_tokens = len(job.sequence.token_ids)
            reusable = job.block_hashes[: (num_tokens - 1) // self._layout.block_size]
            # One block more than it needs: else it would be the first to give way again.
            lease = self._pool.lease(self._layout.num_blocks_for(num_tokens + 1), reusable)
            if lease is None:
                return
            self.preempted.popleft()
            job.sequence.lease = lease
            job.sequence.num_computed = lease.num_cached * self._layout.block_size
            job.num_published_blocks = lease.num_cached
            self.running.append(job)
