"""A router that is ready as soon as it runs. What it does wrong, SEGUE_STUB_ROUTER says."""

import asyncio
import os
import sys

from segue.config import RouterSettings
from segue.errors import ConfigError
from segue.runtime import run_process, say_serving, stop_event


async def main() -> None:
    settings = RouterSettings.load()
    match os.environ.get("SEGUE_STUB_ROUTER"):
        case "refuse":
            raise ConfigError("the stub router does not like its settings")
        case "die":
            sys.stderr.write("the stub router dies\n")
            sys.exit(3)
    server = await asyncio.start_server(_answer, settings.host, settings.http_port, reuse_port=settings.shares_ports)
    stop = stop_event()
    port = server.sockets[0].getsockname()[1]
    say_serving(http=f"{settings.host}:{port}", grpc=f"{settings.host}:1")
    await stop.wait()
    server.close()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    body = b'{"status": "ok", "ready": true}'
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


if __name__ == "__main__":
    sys.exit(run_process(main))
