"""What both APIs stand on: one model, its text side, the core, and the account of what happens."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass

from router.caller import ANONYMOUS, Caller
from router.generation import ChoiceOutput, GenerationEvent, generate
from router.metrics import Metrics
from router.options import GenerationOptions, GenerationSpec, ModelLimits, Seen, build_spec
from router.quotas import Quotas
from router.readiness import Readiness
from router.records import Records, RequestRecord
from router.sequence import SequenceServer
from router.text import ChatMessage, Tokenizer
from router.tracing import RequestTracing
from segue.errors import InvalidRequest, ModelNotFound, RequestCancelled
from segue.logs import log_context
from segue.tracing import CURRENT_TRACE

# Shorter texts are encoded faster than a thread is woken.
_INLINE_CHARACTERS = 4096
MAX_MESSAGES = 4096


@dataclass(frozen=True, slots=True)
class Service:
    """`created_unix_s`: when this router began to serve. `max_body`: bytes of the largest request taken."""

    model_name: str
    tokenizer: Tokenizer
    limits: ModelLimits
    server: SequenceServer
    metrics: Metrics
    readiness: Readiness
    records: Records
    created_unix_s: int
    max_body: int
    # How long a client may leave the stream unread before its request is ended.
    stall_limit_s: float
    tracing: RequestTracing
    # None: nobody's API key has limits.
    quotas: Quotas | None = None

    @contextmanager
    def arrival(self, traceparent: str | None) -> Iterator[str]:
        """Around all that is done for one request, which came with this trace context; gives it its id."""
        request_id, trace = new_request_id(), self.tracing.arrived(traceparent)
        CURRENT_TRACE.set(trace)
        with log_context(request_id=request_id, trace_id=trace.trace_id if trace is not None else ""):
            yield request_id

    def check_model(self, name: str) -> None:
        """Raises ModelNotFound unless `name` is the model served here."""
        if name != self.model_name:
            raise ModelNotFound(f"model: {name[:100]!r} is not served here; {self.model_name!r} is", field="model")

    async def encode_text(self, text: str) -> list[int]:
        if len(text) <= _INLINE_CHARACTERS:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    async def encode_chat(self, messages: Sequence[ChatMessage], now_unix_s: int) -> list[int]:
        """`now_unix_s` is what the chat template takes for the time."""
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest("messages", f"at most {MAX_MESSAGES}, not {len(messages)}")
        if sum(len(message.content) for message in messages) <= _INLINE_CHARACTERS:
            return self.tokenizer.encode_chat(messages, now_unix_s)
        return await asyncio.to_thread(self.tokenizer.encode_chat, messages, now_unix_s)

    def build_spec(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        options: GenerationOptions,
        names: Mapping[str, str],
        *,
        continues_text: bool = True,
        seen: Sequence[Seen] = (),
        caller: Caller = ANONYMOUS,
        deadline_s: float | None = None,
    ) -> GenerationSpec:
        """See router.options.build_spec."""
        return build_spec(
            request_id,
            prompt_token_ids,
            options,
            self.limits,
            max_sequence_tokens=self.server.max_sequence_tokens,
            names=names,
            continues_text=continues_text,
            seen=seen,
            caller=caller,
            deadline_s=deadline_s,
        )

    def generate(self, spec: GenerationSpec, record: RequestRecord) -> AsyncGenerator[GenerationEvent, None]:
        """See router.generation.generate. Raises RateLimited as well."""
        events = generate(self.server, self.tokenizer, spec, record.paths)
        return events if self.quotas is None else _within_quota(self.quotas, spec, events)

    async def read_by_client(self, write: Awaitable[object]) -> None:
        """Awaits one write to a client. Raises RequestCancelled when the client leaves it unread for too long."""
        try:
            async with asyncio.timeout(self.stall_limit_s):
                await write
        except TimeoutError:
            raise RequestCancelled(f"the client read nothing for {self.stall_limit_s:g} s") from None


async def _within_quota(
    quotas: Quotas, spec: GenerationSpec, events: AsyncGenerator[GenerationEvent, None]
) -> AsyncGenerator[GenerationEvent, None]:
    num_prompt = len(spec.prompt_token_ids)
    async with (
        aclosing(events),
        quotas.taken(spec.caller, num_prompt + spec.num_choices * spec.sampling.max_tokens) as taken,
    ):
        async for event in events:
            if isinstance(event, ChoiceOutput):
                taken.num_used = max(taken.num_used, num_prompt) + len(event.tokens)
            yield event


def new_request_id() -> str:
    """Unique over all routers: the ids of sequences are made from it."""
    return f"req_{secrets.token_hex(12)}"
