"""The HTTP handlers. A request is read, planned (prompts to tokens, options to specs), then answered whole or as a stream."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from router.access import Access
from router.caller import CURRENT_CALLER
from router.console.routes import console_routes
from router.http_server import read_body_in_time
from router.merge import merge
from router.metrics import RequestMeter
from router.openai.authentication import authenticate
from router.openai.description import describe
from router.openai.errors import RECORD, REQUEST_ID, RETRY_AFTER_S, answer_errors, give_request_id, show_request
from router.openai.event_ids import LAST_EVENT_ID, EventIds, ResumePoint
from router.openai.fields import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, parse_body
from router.openai.responses import CHAT, COMPLETION, Answer, Endpoint, Extras, to_json
from router.openai.schema import ChatRequest, CompletionRequest
from router.openai.stream import NumberedEvents, stream_answer
from router.options import MAX_CHOICES, GenerationOptions, GenerationSpec, choice_seed, draw_seed
from router.records import RequestRecord
from router.service import Service
from segue.errors import InvalidRequest, Unavailable

MAX_PROMPTS = 128
# Seconds in which the client wants the whole answer.
TIMEOUT = "X-Request-Timeout"


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that has been checked: one spec for each prompt."""

    endpoint: Endpoint
    # In the answer's id and, if it is streamed, in those of its events.
    answer_id: str
    created_unix_s: int
    seed: int
    specs: list[GenerationSpec]
    stream: bool
    extras: Extras


def build_application(service: Service, access: Access) -> web.Application:
    handlers = _Handlers(service)
    middlewares = [give_request_id(service), answer_errors, authenticate(access), read_body_in_time]
    application = web.Application(middlewares=middlewares, client_max_size=service.max_body)
    application.on_response_prepare.append(show_request)
    application.add_routes(
        [
            web.post("/v1/completions", handlers.complete),
            web.post("/v1/chat/completions", handlers.chat),
            web.get("/v1/models", handlers.list_models),
            # Names may hold slashes, as Hub ids do.
            web.get("/v1/models/{model:.+}", handlers.get_model),
            web.get("/health", handlers.health),
            web.get("/ready", handlers.ready),
            web.get("/metrics", handlers.metrics),
            web.get("/openapi.json", handlers.describe),
            *console_routes(service),
        ]
    )
    return application


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: web.Request) -> web.StreamResponse:
        with self._service.metrics.track(COMPLETION.api) as meter:
            body = parse_body(CompletionRequest, await request.read(), COMPLETION_UNSUPPORTED)
            plan = await self._plan_completion(request, body, resume_point(request, body))
            return await self._answer(request, plan, meter)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        with self._service.metrics.track(CHAT.api) as meter:
            body = parse_body(ChatRequest, await request.read(), CHAT_UNSUPPORTED)
            plan = await self._plan_chat(request, body, resume_point(request, body))
            return await self._answer(request, plan, meter)

    async def _plan_completion(self, request: web.Request, body: CompletionRequest, resume: ResumePoint | None) -> _Plan:
        self._service.check_model(body.model)
        if len(body.prompt) > MAX_PROMPTS:
            raise InvalidRequest("prompt", f"at most {MAX_PROMPTS} prompts in one request, not {len(body.prompt)}")
        options, specs = body.options(), list[GenerationSpec]()
        seed, deadline_s = _seed(options, resume), _deadline_s(request)
        for place, prompt in enumerate(body.prompt):
            token_ids = await self._service.encode_text(prompt) if isinstance(prompt, str) else prompt
            # Equal prompts have different answers, unless the client wants one seed for all.
            own_seed = seed if options.seed is not None else choice_seed(seed, place * MAX_CHOICES)
            specs.append(
                self._service.build_spec(
                    f"{request[REQUEST_ID]}-p{place}",
                    token_ids,
                    replace(options, seed=own_seed),
                    body.names(),
                    seen=resume.of_prompt(place, len(body.prompt), body.n) if resume else (),
                    caller=CURRENT_CALLER.get().asking(body.priority),
                    deadline_s=deadline_s,
                )
            )
        return _Plan(COMPLETION, _answer_id(request, resume), _created_unix_s(resume), seed, specs, body.stream, body.extras())

    async def _plan_chat(self, request: web.Request, body: ChatRequest, resume: ResumePoint | None) -> _Plan:
        self._service.check_model(body.model)
        options = body.options()
        seed, created_unix_s = _seed(options, resume), _created_unix_s(resume)
        token_ids = await self._service.encode_chat([message.to_chat_message() for message in body.messages], created_unix_s)
        spec = self._service.build_spec(
            request[REQUEST_ID],
            token_ids,
            replace(options, seed=seed),
            body.names(),
            continues_text=False,
            seen=resume.of_prompt(0, 1, body.n) if resume else (),
            caller=CURRENT_CALLER.get().asking(body.priority),
            deadline_s=_deadline_s(request),
        )
        return _Plan(CHAT, _answer_id(request, resume), created_unix_s, seed, [spec], body.stream, body.extras())

    async def _answer(self, request: web.Request, plan: _Plan, meter: RequestMeter) -> web.StreamResponse:
        service = self._service
        answer = Answer(
            plan.endpoint, plan.answer_id, service.model_name, plan.created_unix_s, plan.specs, service.tokenizer, plan.extras
        )
        num_prompt_tokens = sum(len(spec.prompt_token_ids) for spec in plan.specs)
        with service.records.record(request[REQUEST_ID], plan.endpoint.api, num_prompt_tokens) as record:
            request[RECORD] = record
            async with aclosing(self._events(plan, meter, record)) as events:
                if plan.stream:
                    ids = EventIds(plan.answer_id, plan.created_unix_s, plan.seed, plan.specs)
                    return await stream_answer(service, request, answer, events, ids, meter)
                async for prompt, event in events:
                    answer.add(prompt, event)
        return _json(answer.whole())

    def _events(self, plan: _Plan, meter: RequestMeter, record: RequestRecord) -> NumberedEvents:
        """Events of all prompts as they come, each with the number of its prompt."""

        async def numbered(prompt: int, spec: GenerationSpec) -> NumberedEvents:
            async with aclosing(self._service.generate(spec, record)) as events:
                async for event in events:
                    meter.see(event, prompt)
                    record.see(event)
                    yield prompt, event

        return merge([numbered(prompt, spec) for prompt, spec in enumerate(plan.specs)])

    async def list_models(self, request: web.Request) -> web.Response:
        return _json({"object": "list", "data": [self._model()]})

    async def get_model(self, request: web.Request) -> web.Response:
        self._service.check_model(request.match_info["model"])
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created_unix_s,
            "owned_by": "segue",
            "max_context": service.limits.max_context,
        }

    async def health(self, request: web.Request) -> web.Response:
        """The process is alive; /ready says whether it can serve."""
        return _json({"status": "ok"})

    async def ready(self, request: web.Request) -> web.Response:
        report = await self._service.readiness.check()
        body = {"ready": report.ready, "reason": report.reason, "missing_roles": list(report.missing_roles)}
        return _json(body, status=200 if report.ready else Unavailable.http_status)

    async def describe(self, request: web.Request) -> web.Response:
        return _json(describe())

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def resume_point(request: web.Request, body: ChatRequest | CompletionRequest) -> ResumePoint | None:
    """Where the stream broke that this request goes on with. Raises InvalidRequest."""
    event_id = request.headers.get(LAST_EVENT_ID)
    return ResumePoint.parse(event_id) if event_id and body.stream else None


def _deadline_s(request: web.Request) -> float | None:
    """What the client allows, on the loop's clock. Raises InvalidRequest."""
    text = request.headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(TIMEOUT, f"must be a number of seconds above 0, not {text[:100]!r}")
    return asyncio.get_running_loop().time() + seconds


def _seed(options: GenerationOptions, resume: ResumePoint | None) -> int:
    if options.seed is not None:
        return options.seed
    return draw_seed() if resume is None else resume.seed


def _answer_id(request: web.Request, resume: ResumePoint | None) -> str:
    return request[REQUEST_ID].removeprefix("req_") if resume is None else resume.answer_id


def _created_unix_s(resume: ResumePoint | None) -> int:
    return int(time.time()) if resume is None else resume.created_unix_s


def _json(body: Mapping[str, Any], status: int = 200) -> web.Response:
    headers = {"Retry-After": RETRY_AFTER_S} if status == Unavailable.http_status else {}
    return web.Response(text=to_json(body), status=status, headers=headers, content_type="application/json")
