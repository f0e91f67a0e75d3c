"""The prefill service: computes prompts, samples their first token, pushes their KV cache to a decode worker.

The life of a job, one task each (`_serve`):

    waiting for memory → computing, in chunks shared with others → first token out → push committed → released

Where the decode worker has more of the prompt than this one, from an earlier turn of a conversation, that is fetched before or
between chunks (`_pull`) instead of being computed.

Beside the jobs runs one loop (`run`): admit, compute a step, settle. Layers are pushed from within the step, as they are done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from contextlib import suppress

from engine.engine import Engine
from engine.sequence import Sequence
from engine.step import Chunk
from kv_transfer.account import TransferAccount
from kv_transfer.handover import HandOver, Receiver, Reservation, Sender
from prefill_worker.job import PrefillJob
from prefill_worker.outgoing import OutgoingKV
from prefill_worker.scheduling import plan_chunks, plan_pull
from segue.errors import InternalError, InvalidRequest, SegueError, TransferError
from segue.histogram import Histogram
from segue.jobs import JobTable
from segue.prefix import block_hashes
from segue.runtime import Wakeups
from segue.sampling import GeneratedToken
from segue.tracing import Spans
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import WorkerLoad
from segue.v1.transfer_pb2 import Ticket
from segue.wire import finish_reason_to_pb, sampling_from_pb, token_to_pb
from segue.worker_link import RouterLink

logger = logging.getLogger(__name__)

# A decode worker that has room grants tickets within a few milliseconds; one that has none is not waited for.
_TICKET_PATIENCE_S = 0.2
_STEP_TOKENS_BOUNDS = tuple(float(2**power) for power in range(15))


class PrefillService:
    """One leg of a worker. `wakeups` is shared with whatever else takes memory from the same engine."""

    def __init__(
        self,
        engine: Engine,
        sender: Sender,
        receiver: Receiver,
        wakeups: Wakeups,
        transfers: TransferAccount,
        spans: Spans,
        *,
        max_step_tokens: int,
        pulls: bool,
    ) -> None:
        self._engine = engine
        self._sender = sender
        self._receiver = receiver
        self._wakeups = wakeups
        self._transfers = transfers
        self._spans = spans
        self._wake = wakeups.listener()
        self._max_step_tokens = max_step_tokens
        self._pulls = pulls
        self._jobs: JobTable[PrefillJob] = JobTable()
        # A job is in one of the three until its prompt is computed or it ends. Oldest first, but for what was pulled meanwhile.
        self._waiting: deque[PrefillJob] = deque()
        self._pulling: list[PrefillJob] = []
        self._computing: list[PrefillJob] = []
        self._num_prefilled_tokens = 0
        self._num_hit_tokens = 0
        self._num_pulled_tokens = 0
        self._step_tokens = Histogram(_STEP_TOKENS_BOUNDS)

    # Leg

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        match message.WhichOneof("message"):
            case "start_prefill":
                self._start(link, message.start_prefill)
            case "attach_tickets":
                self._attach(message.attach_tickets.key, message.attach_tickets.tickets)
            case "cancel":
                self._jobs.cancel(message.cancel.key)

    def drop(self, link: RouterLink) -> None:
        self._jobs.drop(link)

    def add_load(self, load: WorkerLoad) -> None:
        load.waiting_requests += len(self._waiting)
        load.running_requests += len(self._jobs) - len(self._waiting)
        load.queued_tokens += sum(job.sequence.num_uncomputed for job in (*self._pulling, *self._computing))
        load.queued_tokens += sum(self._num_to_compute(job) for job in self._waiting)
        load.prefilled_tokens += self._num_prefilled_tokens
        load.prefix_hit_tokens += self._num_hit_tokens
        load.prefix_hits["prefill"] = self._num_hit_tokens
        load.prefix_hits["prefill_from_decode"] = self._num_pulled_tokens
        load.prefill_step_tokens.CopyFrom(self._step_tokens.to_pb())

    def _num_to_compute(self, job: PrefillJob) -> int:
        """Of a prompt that waits: what its lease would not find in the cache, were it granted now."""
        num_cached = self._engine.pool.num_leading(self._reusable_hashes(job)) * self._engine.layout.block_size
        return job.sequence.num_initial_tokens - num_cached

    def _reusable_hashes(self, job: PrefillJob) -> SequenceOf[bytes]:
        """At least the last token is computed anew: its logits are what the prompt is computed for."""
        return job.block_hashes[: (job.sequence.num_initial_tokens - 1) // self._engine.layout.block_size]

    @property
    def num_sequences(self) -> int:
        return len(self._jobs)

    async def wait_empty(self) -> None:
        await self._jobs.wait_empty()

    def give_up(self, error: SegueError) -> None:
        self._jobs.give_up(error)

    # A job's life

    def _start(self, link: RouterLink, message: pb.StartPrefill) -> None:
        layout = self._engine.layout
        token_ids = list(message.token_ids)
        try:
            sampling = sampling_from_pb(message.sampling)
            self._engine.check_fits(token_ids, max_tokens=0)
        except InvalidRequest as error:
            link.send_failed(message.key, error)
            return
        job = PrefillJob(
            key=message.key,
            link=link,
            traceparent=message.traceparent,
            sequence=Sequence(
                message.key.sequence_id, token_ids, sampling, num_prompt_tokens=len(token_ids) - message.num_output_tokens
            ),
            hands_over=message.hand_over,
            block_hashes=block_hashes(token_ids, layout.block_size, message.cache_salt),
            outgoing=OutgoingKV(layout.num_layers, len(token_ids)),
            num_decode_ranks=message.num_decode_ranks,
        )
        if self._jobs.start(job, self._serve(job), self._release):
            self._waiting.append(job)
        self._wake.set()

    async def _serve(self, job: PrefillJob) -> None:
        try:
            token = await job.first_token
            self._tell_computed(job)
            finish_reason = job.sequence.append(token)
            job.link.send(
                pb.LinkResponse(
                    first_token=pb.FirstToken(
                        key=job.key,
                        token=token_to_pb(token),
                        finish_reason=finish_reason_to_pb(finish_reason),
                        cached_tokens=job.cached_tokens,
                        pulled_tokens=job.pulled_tokens,
                        queue_s=job.queue_s,
                        sending_s=job.sending_s,
                    )
                )
            )
            if finish_reason is None and job.hands_over:
                await self._hand_over(job, token)
                job.link.send(pb.LinkResponse(prefill_released=pb.PrefillReleased(key=job.key)))
        except SegueError as error:
            if isinstance(error, TransferError):
                self._transfers.failed(error)
            job.link.send_failed(job.key, error)

    def _tell_computed(self, job: PrefillJob) -> None:
        if job.computed_s is not None:
            num_tokens = job.sequence.num_initial_tokens - job.cached_tokens - job.pulled_tokens
            self._spans.add_below(job.traceparent, "compute prompt", job.computed_s, {"segue.tokens": num_tokens})

    async def _hand_over(self, job: PrefillJob, token: GeneratedToken) -> None:
        hand_over = await job.hand_over
        assert job.sequence.lease is not None
        num_bytes = await hand_over.commit(token.token_id, job.sequence.lease.block_ids)
        if num_bytes and job.outgoing.first_sent_s is not None:  # else nothing travelled: one worker, or decode had it all
            self._transfers.sent(num_bytes, job.sending_s)
            self._spans.add_below(job.traceparent, "send KV", job.outgoing.first_sent_s, {"segue.bytes": num_bytes})

    async def _release(self, job: PrefillJob) -> None:
        """Takes the job out of every queue, waits until nothing writes or reads its blocks, and gives them back."""
        for queue in (self._waiting, self._pulling):
            with suppress(ValueError):
                queue.remove(job)
        tasks = [task for task in (job.opening, job.pulling) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._stop_computing(job)
        await job.idle.wait()
        if job.opened is not None:
            await job.opened.abandon("the prefill leg ended")
        if job.pulled is not None:
            await job.pulled.fence()
        if job.sequence.lease is not None:
            self._engine.pool.release(job.sequence.lease)
        self._wakeups.notify()

    def _attach(self, key: pb.SequenceKey, tickets: SequenceOf[Ticket]) -> None:
        job = self._jobs.get(key)
        if job is not None and job.opening is None:
            job.opening = asyncio.create_task(self._open(job, tickets), name="attaching the tickets")
            job.opening.add_done_callback(job.on_task_end)

    async def _open(self, job: PrefillJob, tickets: SequenceOf[Ticket]) -> None:
        try:
            hand_over = await HandOver.open(self._sender, tickets)
        except SegueError as error:
            job.fail(error)
        else:
            job.opened = hand_over
            job.outgoing.attach(hand_over)
            if not job.hand_over.done():  # it is, when the job was cancelled while it waited
                job.hand_over.set_result(hand_over)

    # The loop

    async def run(self) -> None:
        """Computes until cancelled."""
        while True:
            self._admit()
            sizes = plan_chunks([job.sequence.num_uncomputed for job in self._computing], self._max_step_tokens)
            if not sizes:
                await self._wake.wait()
                self._wake.clear()
                continue
            jobs = self._computing[: len(sizes)]
            self._step_tokens.observe(sum(sizes))
            tokens = await self._compute(jobs, sizes)
            self._settle(jobs, tokens)

    def _admit(self) -> None:
        """Leases memory for waiting jobs, in their order: none overtakes one that waits for more memory."""
        pool, layout = self._engine.pool, self._engine.layout
        while self._waiting:
            job = self._waiting[0]
            num_blocks = layout.num_blocks_for(job.sequence.num_initial_tokens)
            lease = pool.lease(num_blocks, self._reusable_hashes(job))
            if lease is None:
                return
            self._waiting.popleft()
            job.sequence.lease = lease
            job.sequence.num_computed = job.cached_tokens = lease.num_cached * layout.block_size
            self._num_hit_tokens += job.cached_tokens
            job.num_published_blocks = lease.num_cached
            job.outgoing.begin(lease.block_ids, job.cached_tokens)
            if job.cached_tokens and job.hands_over and self._pulls:
                self._begin_pull(job)
            else:
                self._computing.append(job)

    # What decode has of a prompt

    def _pullable(self, job: PrefillJob) -> range:
        """Blocks that decode, as its tickets tell, has and this worker has not."""
        if not self._pulls or job.opened is None or job.pulled is not None:
            return range(0)
        num_decode_tokens = job.opened.wanted.start * job.opened.block_size
        sequence = job.sequence
        return plan_pull(sequence.num_computed, sequence.num_initial_tokens, num_decode_tokens, self._engine.layout.block_size)

    def _begin_pull(self, job: PrefillJob) -> None:
        self._pulling.append(job)
        job.pulling = asyncio.create_task(self._pull_then_compute(job), name="pulling KV")
        job.pulling.add_done_callback(job.on_task_end)

    async def _pull_then_compute(self, job: PrefillJob) -> None:
        # A prompt whose beginning is known here is likely a conversation of which decode knows more.
        await asyncio.wait({job.hand_over}, timeout=_TICKET_PATIENCE_S)
        if blocks := self._pullable(job):
            await self._pull(job, blocks)
        self._pulling.remove(job)
        self._computing.append(job)
        self._wake.set()

    async def _pull(self, job: PrefillJob, blocks: range) -> None:
        """Lets decode write `blocks`. Should that fail, they are computed here."""
        sequence, layout = job.sequence, self._engine.layout
        assert sequence.lease is not None
        block_ids = sequence.lease.block_ids[blocks.start : blocks.stop]
        try:
            job.pulled = await Reservation.of(self._receiver, blocks.start, block_ids, job.num_decode_ranks)
            job.link.send(pb.LinkResponse(pull_kv=pb.PullKV(key=job.key, tickets=job.pulled.tickets)))
            await job.pulled.arrival()
            job.pulled.accept()
        except TransferError as error:
            self._transfers.failed(error)
            logger.warning("computing anew what decode could not send of %s: %s", sequence.key, error.message)
        else:
            num_tokens = blocks.stop * layout.block_size
            job.pulled_tokens, sequence.num_computed = num_tokens - sequence.num_computed, num_tokens
            self._num_pulled_tokens += job.pulled_tokens
            self._publish(job)
            job.outgoing.begin(sequence.lease.block_ids, num_tokens)
        if job.pulled is not None:
            await job.pulled.fence()

    async def _compute(self, jobs: SequenceOf[PrefillJob], sizes: SequenceOf[int]) -> list[GeneratedToken | None]:
        loop = asyncio.get_running_loop()
        chunks = [Chunk(job.sequence, size) for job, size in zip(jobs, sizes, strict=True)]
        ends = [(job, job.sequence.num_computed + size) for job, size in zip(jobs, sizes, strict=True)]

        def layer_done(layer: int) -> None:
            for job, num_tokens in ends:
                job.outgoing.layer_done(layer, num_tokens)

        def on_layer(layer: int) -> None:  # on the engine's thread
            loop.call_soon_threadsafe(layer_done, layer)

        for job in jobs:
            job.idle.clear()
            job.computed_s = job.computed_s or time.monotonic()
        try:
            return await self._engine.run(chunks, on_layer)
        except RuntimeError as error:  # what torch raises
            for job in jobs:
                self._stop_computing(job)
                job.fail(InternalError(f"prefill step failed: {error}"))
            return [None] * len(jobs)
        finally:
            for job in jobs:
                job.idle.set()

    def _settle(self, jobs: SequenceOf[PrefillJob], tokens: SequenceOf[GeneratedToken | None]) -> None:
        for job, token in zip(jobs, tokens, strict=True):
            self._publish(job)
            if token is not None:
                self._num_prefilled_tokens += job.sequence.num_initial_tokens - job.cached_tokens - job.pulled_tokens
                self._stop_computing(job)
                if not job.first_token.done():  # it is, when the job was cancelled during the step
                    job.first_token.set_result(token)
            elif job in self._computing and self._pullable(job):
                self._stop_computing(job)
                self._begin_pull(job)

    def _publish(self, job: PrefillJob) -> None:
        """Makes the blocks that became full available to later prompts with the same beginning."""
        num_full = job.sequence.num_computed // self._engine.layout.block_size
        assert job.sequence.lease is not None
        for index in range(job.num_published_blocks, num_full):
            self._engine.pool.publish(job.sequence.lease, index, job.block_hashes[index])
        job.num_published_blocks = num_full

    def _stop_computing(self, job: PrefillJob) -> None:
        with suppress(ValueError):
            self._computing.remove(job)
