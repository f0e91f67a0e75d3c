"""The Python client, blocking and asyncio, over gRPC. Needs only grpcio and protobuf."""

from segue.client.access import Access
from segue.client.async_client import AsyncClient, AsyncGenerationStream
from segue.client.events import Completed, Event, Output, RequestPath, Started
from segue.client.requests import GenerateOptions, Prompt, SamplingOptions
from segue.client.results import Choice, Generation, Usage
from segue.client.retry import RetryPolicy
from segue.client.status import ClusterStatus, ModelInfo, Tokenization, WorkerLoad, WorkerStatus
from segue.client.sync_client import Client, GenerationStream

__all__ = [
    "Access",
    "AsyncClient",
    "AsyncGenerationStream",
    "Choice",
    "Client",
    "ClusterStatus",
    "Completed",
    "Event",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "ModelInfo",
    "Output",
    "Prompt",
    "RequestPath",
    "RetryPolicy",
    "SamplingOptions",
    "Started",
    "Tokenization",
    "Usage",
    "WorkerLoad",
    "WorkerStatus",
]
