"""`segue explain`: which way a request took, and a waterfall of where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToJson
from rich.console import Console, Group, RenderableType
from rich.text import Text

from deploy.cli.session import AddressOption, connected
from router.waterfall import Span, failures_of, spans_of
from segue.client import Client
from segue.client.channel import DEFAULT_ADDRESS
from segue.errors import RequestError, SegueError
from segue.v1.inference_pb2 import RequestPath
from segue.v1.operator_pb2 import RequestRecord

_PIPED_WIDTH = 120
_TIME_WIDTH = len("1,000,000.0 ms")
_SHORTEST_BAR = 10
STAGE_COLOURS = {"queue": "yellow", "reserve": "magenta", "prefill": "blue", "transfer": "cyan", "decode": "green"}


def explain(
    request_id: Annotated[
        str,
        typer.Argument(help="x-request-id of the answer, id of an OpenAI answer; without it the latest.", show_default=False),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print all that is known as JSON.")] = False,
    address: AddressOption = DEFAULT_ADDRESS,
) -> None:
    """Show which way a recent request took and where its time went.

    Each router remembers its latest 1,000 requests; all routers of the cluster are asked. In the waterfall, ░ is a prompt that
    waits on its prefill worker, or KV that travels behind the computation; what a client waits for is █.
    """
    with connected(address) as client:
        record = find(client, request_id)
        if as_json:
            typer.echo(MessageToJson(record, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
            return
        console = Console(highlight=False)
        width = console.width if console.is_terminal else _PIPED_WIDTH
        console.print(render(record, width), soft_wrap=not console.is_terminal)


def find(client: Client, request_id: str) -> RequestRecord:
    """From whichever router served it; without an id, the request that came last of all. Raises what `client`'s router says
    when none of them has it."""
    records, failures = list[RequestRecord](), list[SegueError]()

    def ask(asked: Client) -> None:
        try:
            records.append(asked.explain(request_id))
        except SegueError as error:
            if not (isinstance(error, RequestError) or failures):
                raise  # not even the first router can be asked
            failures.append(error)

    ask(client)
    if not (request_id and records):
        for address in _other_routers(client):
            with Client(address) as other:
                ask(other)
    if not records:
        raise failures[0]
    return max(records, key=lambda record: record.arrived_unix_s)


def _other_routers(client: Client) -> list[str]:
    """Reached as the first one is: with TLS, if it is."""
    scheme, separator, _ = client.address.rpartition("://")
    addresses = {f"{scheme}{separator}{router.grpc_address}" for router in client.status().routers}
    return sorted(addresses - {client.address})


def render(record: RequestRecord, width: int) -> RenderableType:
    """What the request was, and for each of its choices the path and a waterfall, on one scale."""
    arrived = time.strftime("%H:%M:%S", time.localtime(record.arrived_unix_s))
    tokens = f"{record.num_prompt_tokens} prompt + {record.num_output_tokens} output tokens"
    title = Text(f"{record.request_id} · {record.api} · {arrived} · {record.outcome} · {tokens}", style="bold")
    parts: list[RenderableType] = [title]
    if record.error:
        parts.append(Text(record.error, style="red"))
    spans = [list(spans_of(path)) for path in record.paths]
    total_s = max((span.end_s for of_path in spans for span in of_path), default=0.0) or 1e-9
    for number, (path, of_path) in enumerate(zip(record.paths, spans, strict=True)):
        heading = f"choice {number}: " if len(record.paths) > 1 else ""
        parts += [Text(heading + describe(path)), *waterfall(of_path, total_s, width)]
        parts += [Text(failure, style="red") for failure in failures_of(path)]
    return Group(*parts)


def describe(path: RequestPath) -> str:
    cached = {"prefill": path.prefill_cached_tokens, "fetched": path.prefill_pulled_tokens, "decode": path.decode_cached_tokens}
    found = ", ".join(f"{number} {place}" for place, number in cached.items() if number) or "none"
    way = f"{path.prefill_worker} → {path.decode_worker or 'nowhere: one token'} over {path.transport}"
    return f"{way} ({path.placement or 'not placed'}), {path.transferred_bytes / 2**20:.1f} MiB; cached tokens: {found}"


def waterfall(spans: Sequence[Span], total_s: float, width: int) -> Iterator[Text]:
    """A line of `width` columns for each span."""
    names = max((len(span.name) for span in spans), default=0)
    notes = max((len(span.note) for span in spans), default=0)
    bars = max(width - names - notes - _TIME_WIDTH - 3, _SHORTEST_BAR)
    for span in spans:
        took = f"{1000 * (span.end_s - span.start_s):,.1f} ms".rjust(_TIME_WIDTH)
        bar = bar_of(span, total_s, bars).ljust(bars)
        colour = STAGE_COLOURS[span.name.rpartition(" ")[2]]
        yield Text.assemble(span.name.ljust(names), " ", (bar, colour), " ", took, " ", (span.note, "dim"))


def bar_of(span: Span, total_s: float, width: int) -> str:
    """Whatever has taken any time shows as one character at least."""
    start, split, end = (min(round(moment_s / total_s * width), width) for moment_s in (span.start_s, span.split_s, span.end_s))
    if start == end and span.end_s > span.start_s:
        start, end = min(start, width - 1), min(start, width - 1) + 1
        split = start
    return " " * start + "░" * (split - start) + "█" * (end - split)
