"""A program: a router's front over a core that plays a script, until its stdin closes. Says where it serves, in JSON."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from router.fake import FakeOperator, FakeSequenceServer, token_steps
from router.front import Front
from router.text import Tokenizer
from segue.config import RouterSettings

MAX_CONTEXT = 512


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


async def serve(model_dir: Path, model_name: str) -> None:
    tokenizer = Tokenizer.from_dir(model_dir)
    core = FakeSequenceServer(
        lambda request: token_steps([5] * max(min(request.sampling.max_tokens - len(request.output_token_ids), 8), 1))
    )
    config: Any = SimpleNamespace(
        max_context=MAX_CONTEXT, vocab_size=tokenizer.num_token_ids, eos_token_ids=(1,), bos_token_id=0
    )
    settings = RouterSettings(
        cluster_id="test",
        redis="unused",
        model_dir=model_dir,
        model_name=model_name,
        http_port=0,
        grpc_port=0,
        drain_s=1,
    )
    async with Front(settings, tokenizer, config, core, FakeOperator()) as front:
        say(http=front.http_address, grpc=front.grpc_address)
        await asyncio.to_thread(sys.stdin.read)
    say(active=len(core.active), finished=len(core.finished))


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), sys.argv[2]))
