"""The decode service: reserves KV blocks, receives a prompt's KV cache into them, and decodes in one continuous batch.

The life of a job, one task each (`_serve`):

    waiting for memory → ticket out → KV arriving → decoding, in the batch → released

Beside the jobs runs one loop (`run`): plan, compute a step, settle. A step's tokens go to each router in one message.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from contextlib import suppress

from decode_worker.batch import DecodeBatch
from decode_worker.job import DecodeJob
from engine.engine import Engine
from engine.sequence import Sequence
from engine.step import Chunk
from kv_transfer.account import TransferAccount
from kv_transfer.handover import HandOver, Receiver, Reservation, Sender
from kv_transfer.incoming import Arrival
from segue.errors import InternalError, InvalidRequest, SegueError, TransferError, TransferRefused
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

_STEP_SEQUENCES_BOUNDS = tuple(float(2**power) for power in range(11))


class DecodeService:
    """One leg of a worker. `wakeups` is shared with whatever else takes memory from the same engine."""

    def __init__(
        self,
        engine: Engine,
        receiver: Receiver,
        sender: Sender,
        wakeups: Wakeups,
        transfers: TransferAccount,
        spans: Spans,
        *,
        worker_id: str,
        max_sequences: int,
        max_step_tokens: int,
    ) -> None:
        self._engine = engine
        self._receiver = receiver
        self._sender = sender
        self._wakeups = wakeups
        self._transfers = transfers
        self._spans = spans
        self._wake = wakeups.listener()
        self._worker_id = worker_id
        self._jobs: JobTable[DecodeJob] = JobTable()
        # Oldest first: jobs whose blocks are not leased yet.
        self._waiting: deque[DecodeJob] = deque()
        self._batch = DecodeBatch(engine.pool, engine.layout, max_sequences=max_sequences, max_step_tokens=max_step_tokens)
        self._num_decoded_tokens = 0
        self._num_hit_tokens = 0
        self._step_sequences = Histogram(_STEP_SEQUENCES_BOUNDS)

    # Leg

    def handle(self, link: RouterLink, message: pb.LinkRequest) -> None:
        match message.WhichOneof("message"):
            case "reserve_decode":
                self._start(link, message.reserve_decode)
            case "send_kv":
                self._send(message.send_kv.key, message.send_kv.tickets)
            case "cancel":
                self._jobs.cancel(message.cancel.key)

    def drop(self, link: RouterLink) -> None:
        self._jobs.drop(link)

    def add_load(self, load: WorkerLoad) -> None:
        load.waiting_requests += len(self._waiting)
        load.running_requests += len(self._jobs) - len(self._waiting)
        load.decode_sequences += len(self._jobs)
        load.decoded_tokens += self._num_decoded_tokens
        load.prefix_hit_tokens += self._num_hit_tokens
        load.prefix_hits["decode"] = self._num_hit_tokens
        load.decode_step_sequences.CopyFrom(self._step_sequences.to_pb())
        load.preemptions += self._batch.num_preemptions

    @property
    def num_sequences(self) -> int:
        return len(self._jobs)

    async def wait_empty(self) -> None:
        await self._jobs.wait_empty()

    def give_up(self, error: SegueError) -> None:
        self._jobs.give_up(error)

    # A job's life

    def _start(self, link: RouterLink, message: pb.ReserveDecode) -> None:
        token_ids = list(message.token_ids)
        try:
            sampling = sampling_from_pb(message.sampling)
            self._engine.check_fits(token_ids, sampling.max_tokens - message.num_output_tokens)
        except InvalidRequest as error:
            link.send_failed(message.key, error)
            return
        job = DecodeJob(
            key=message.key,
            link=link,
            traceparent=message.traceparent,
            sequence=Sequence(
                message.key.sequence_id, token_ids, sampling, num_prompt_tokens=len(token_ids) - message.num_output_tokens
            ),
            is_local=message.prefill_worker_id == self._worker_id,
            num_prefill_ranks=message.num_prefill_ranks,
            block_hashes=block_hashes(token_ids, self._engine.layout.block_size, message.cache_salt),
            cache_salt=message.cache_salt,
        )
        if self._jobs.start(job, self._serve(job), self._release):
            self._waiting.append(job)
        self._admit()

    async def _serve(self, job: DecodeJob) -> None:
        try:
            await job.admitted
            reservation = job.reservation = await self._reserve(job)
            job.link.send(pb.LinkResponse(decode_reserved=pb.DecodeReserved(key=job.key, tickets=reservation.tickets)))
            with self._spans.below(job.traceparent, "receive KV"):
                arrival = await reservation.arrival()
            cached_tokens = self._take_over(job, arrival)
            reservation.accept()
            job.link.send(
                pb.LinkResponse(
                    decode_started=pb.DecodeStarted(
                        key=job.key,
                        cached_tokens=cached_tokens,
                        transferred_bytes=arrival.num_bytes,
                        transport=arrival.transport,
                    )
                )
            )
            with self._spans.below(job.traceparent, "decode steps"):
                await job.finished
        except SegueError as error:
            if isinstance(error, TransferError):
                self._transfers.failed(error)
            job.link.send_failed(job.key, error)

    async def _reserve(self, job: DecodeJob) -> Reservation:
        if job.is_local:
            return Reservation.local(self._receiver)
        lease = job.sequence.lease
        assert lease is not None
        blocks = lease.block_ids[lease.num_cached :]
        return await Reservation.of(self._receiver, lease.num_cached, blocks, job.num_prefill_ranks)

    def _send(self, key: pb.SequenceKey, tickets: SequenceOf[Ticket]) -> None:
        job = self._jobs.get(key)
        if job is not None and job.reservation is not None and job.returning is None:
            job.returning = asyncio.create_task(self._return(job, tickets))
            job.returning.add_done_callback(job.on_return_end)

    async def _return(self, job: DecodeJob, tickets: SequenceOf[Ticket]) -> None:
        """Sends prefill blocks that came out of the prefix cache here. Should that fail, prefill computes them."""
        lease, layout = job.sequence.lease, self._engine.layout
        assert lease is not None
        cached = lease.block_ids[: lease.num_cached]
        begun_s = time.monotonic()
        try:
            job.returned = await HandOver.open(self._sender, tickets)
            wanted = job.returned.wanted
            if wanted.stop * job.returned.block_size > len(cached) * layout.block_size:
                raise TransferRefused(f"prefill wants blocks {wanted}, of which decode has fewer")
            for layer in range(layout.num_layers):
                job.returned.send(layer, cached, wanted)
            self._transfers.sent(await job.returned.commit(0, ()), time.monotonic() - begun_s)
        except TransferError as error:
            self._transfers.failed(error)
            logger.warning("cannot send prefill what it lacks of %s: %s", job.sequence.key, error.message)
        finally:
            if job.returned is not None:
                # Whatever went wrong, prefill must not wait for the rest. Nothing happens to what was committed.
                await job.returned.abandon("not all that was asked for could be sent")

    def _take_over(self, job: DecodeJob, arrival: Arrival) -> int:
        """The prompt's KV is here: the sequence joins the batch. Gives the number of prompt tokens that were cached here."""
        sequence = job.sequence
        if arrival.source_blocks is not None:
            sequence.lease = self._engine.pool.share(arrival.source_blocks)
        assert sequence.lease is not None
        cached_tokens = sequence.lease.num_cached * self._engine.layout.block_size
        self._num_hit_tokens += cached_tokens
        sequence.num_computed = sequence.num_initial_tokens
        job.num_published_blocks = sequence.lease.num_cached
        self._batch.publish(job)
        if sequence.append(GeneratedToken(arrival.first_token)) is not None:
            raise InternalError("a sequence whose first token ends it was handed over")
        self._batch.add(job)
        self._wake.set()
        return cached_tokens

    async def _release(self, job: DecodeJob) -> None:
        """Takes the job out of every queue, waits until nothing can write its blocks, and gives them back."""
        with suppress(ValueError):
            self._waiting.remove(job)
        self._batch.remove(job)
        await job.idle.wait()
        if job.returning is not None:
            job.returning.cancel()
            await asyncio.gather(job.returning, return_exceptions=True)
        if job.returned is not None:
            await job.returned.abandon("the decode leg ended")
        if job.reservation is not None:
            await job.reservation.fence()
        if job.sequence.lease is not None:
            self._engine.pool.release(job.sequence.lease)
        self._wakeups.notify()
        self._admit()

    def _admit(self) -> None:
        """Leases memory for waiting jobs, in their order: none overtakes one that waits for more memory."""
        pool, layout = self._engine.pool, self._engine.layout
        while self._waiting and not self._batch.preempted:
            job = self._waiting[0]
            if not job.is_local:
                # What runs will grow soon: leave each sequence a block, or it would be preempted at once.
                headroom = min(len(self._batch.running), pool.num_total // 16)
                num_blocks = layout.num_blocks_for(job.sequence.num_initial_tokens)
                if pool.num_leased and pool.num_available < num_blocks + headroom:
                    return
                job.sequence.lease = pool.lease(num_blocks, job.block_hashes)
                if job.sequence.lease is None:
                    return
            self._waiting.popleft()
            if not job.admitted.done():
                job.admitted.set_result(None)

    # The loop

    async def run(self) -> None:
        """Decodes until cancelled."""
        while True:
            self._admit()
            step = self._batch.plan()
            if not step:
                await self._wake.wait()
                self._wake.clear()
                continue
            self._step_sequences.observe(len(step))
            tokens = await self._compute(step)
            self._settle([job for job, _ in step], tokens)

    async def _compute(self, step: SequenceOf[tuple[DecodeJob, Chunk]]) -> list[GeneratedToken | None]:
        for job, _ in step:
            job.idle.clear()
        try:
            return await self._engine.run([chunk for _, chunk in step])
        except RuntimeError as error:  # what torch raises
            for job, _ in step:
                self._batch.remove(job)
                job.fail(InternalError(f"decode step failed: {error}"))
            return [None] * len(step)
        finally:
            for job, _ in step:
                job.idle.set()

    def _settle(self, jobs: SequenceOf[DecodeJob], tokens: SequenceOf[GeneratedToken | None]) -> None:
        messages: dict[RouterLink, pb.StepTokens] = {}
        for job, token in zip(jobs, tokens, strict=True):
            self._batch.publish(job)
            if token is None:
                continue
            self._num_decoded_tokens += 1
            finish_reason = job.sequence.append(token)
            messages.setdefault(job.link, pb.StepTokens()).sequences.add(
                key=job.key, tokens=[token_to_pb(token)], finish_reason=finish_reason_to_pb(finish_reason)
            )
            if finish_reason is not None:
                self._batch.remove(job)
                if not job.finished.done():
                    job.finished.set_result(None)
        for link, message in messages.items():
            link.send(pb.LinkResponse(step_tokens=message))
