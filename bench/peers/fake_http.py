"""`python -m bench.peers.fake_http STEP_MS`: an engine of the OpenAI kind that computes nothing, for routers that speak HTTP.

Prompts take no time, tokens a set time each. As prefill and as decode worker of a pair it answers alike.
"""

from __future__ import annotations

import asyncio
import json
import sys

from aiohttp import web

from segue.runtime import run_process, say_serving, stop_event


def make_app(step_ms: float) -> web.Application:
    async def complete(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        count = int(body.get("max_tokens", 16))
        if not body.get("stream"):
            return web.json_response({"object": "text_completion", "choices": [{"index": 0, "text": "x" * count}]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(count):
            if number:
                await asyncio.sleep(step_ms / 1000)
            choice = {"index": 0, "text": "x", "finish_reason": "length" if number == count - 1 else None}
            chunk = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "fake", "choices": [choice]}
            await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await response.write(b"data: [DONE]\n\n")
        return response

    async def fine(request: web.Request) -> web.Response:
        return web.json_response({"model_path": "fake", "served_model_name": "fake", "data": [{"id": "fake"}]})

    app = web.Application()
    app.add_routes([web.post("/v1/completions", complete), web.get("/{path:.*}", fine)])
    return app


async def main() -> None:
    stop = stop_event()
    runner = web.AppRunner(make_app(float(sys.argv[1])), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        say_serving(http=f"127.0.0.1:{runner.addresses[0][1]}")
        await stop.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    sys.exit(run_process(main))
