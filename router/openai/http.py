"""The HTTP handlers. A request is read, planned (prompts to tokens, options to specs), then answered whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from router.merge import merge
from router.metrics import RequestMeter
from router.openai.errors import RECORD, REQUEST_ID, RETRY_AFTER_S, answer_errors, give_request_id, show_request
from router.openai.fields import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, parse_body
from router.openai.responses import CHAT, COMPLETION, Answer, Endpoint, Extras, to_json
from router.openai.schema import ChatRequest, CompletionRequest
from router.openai.stream import NumberedEvents, stream_answer
from router.options import GenerationSpec
from router.records import RequestRecord
from router.service import Service
from segue.errors import InvalidRequest, Unavailable

MAX_PROMPTS = 128


@dataclass(frozen=True, slots=True)
class _Plan:
    """A request that has been checked: one spec for each prompt."""

    endpoint: Endpoint
    specs: list[GenerationSpec]
    stream: bool
    extras: Extras


def build_application(service: Service) -> web.Application:
    handlers = _Handlers(service)
    application = web.Application(middlewares=[give_request_id, answer_errors], client_max_size=service.max_body)
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
        ]
    )
    return application


class _Handlers:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def complete(self, request: web.Request) -> web.StreamResponse:
        with self._service.metrics.track(COMPLETION.api) as meter:
            body = parse_body(CompletionRequest, await request.read(), COMPLETION_UNSUPPORTED)
            plan = await self._plan_completion(request[REQUEST_ID], body)
            return await self._answer(request, plan, meter)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        with self._service.metrics.track(CHAT.api) as meter:
            body = parse_body(ChatRequest, await request.read(), CHAT_UNSUPPORTED)
            plan = await self._plan_chat(request[REQUEST_ID], body)
            return await self._answer(request, plan, meter)

    async def _plan_completion(self, request_id: str, body: CompletionRequest) -> _Plan:
        self._service.check_model(body.model)
        if len(body.prompt) > MAX_PROMPTS:
            raise InvalidRequest("prompt", f"at most {MAX_PROMPTS} prompts in one request, not {len(body.prompt)}")
        options, specs = body.options(), list[GenerationSpec]()
        for place, prompt in enumerate(body.prompt):
            token_ids = await self._service.encode_text(prompt) if isinstance(prompt, str) else prompt
            specs.append(self._service.build_spec(f"{request_id}-p{place}", token_ids, options, body.names()))
        return _Plan(COMPLETION, specs, body.stream, body.extras())

    async def _plan_chat(self, request_id: str, body: ChatRequest) -> _Plan:
        self._service.check_model(body.model)
        options = body.options()
        token_ids = await self._service.encode_chat([message.to_chat_message() for message in body.messages])
        spec = self._service.build_spec(request_id, token_ids, options, body.names(), continues_text=False)
        return _Plan(CHAT, [spec], body.stream, body.extras())

    async def _answer(self, request: web.Request, plan: _Plan, meter: RequestMeter) -> web.StreamResponse:
        service = self._service
        answer = Answer(
            plan.endpoint, request[REQUEST_ID], service.model_name, int(time.time()), plan.specs, service.tokenizer, plan.extras
        )
        num_prompt_tokens = sum(len(spec.prompt_token_ids) for spec in plan.specs)
        with service.records.record(request[REQUEST_ID], plan.endpoint.api, num_prompt_tokens) as record:
            request[RECORD] = record
            async with aclosing(self._events(plan, meter, record)) as events:
                if plan.stream:
                    return await stream_answer(service, request, answer, events, meter)
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

    async def metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=self._service.metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _json(body: Mapping[str, Any], status: int = 200) -> web.Response:
    headers = {"Retry-After": RETRY_AFTER_S} if status == Unavailable.http_status else {}
    return web.Response(text=to_json(body), status=status, headers=headers, content_type="application/json")
