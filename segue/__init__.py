"""Segue: a disaggregated prefill/decode inference cluster. This is what its users import.

>>> from segue import Client
>>> with Client() as client:
...     print(client.generate("The capital of France is", max_tokens=8).text)
"""

from importlib.metadata import version

from segue.client import (
    Access,
    AsyncClient,
    AsyncGenerationStream,
    Choice,
    Client,
    ClusterStatus,
    Completed,
    Event,
    GenerateOptions,
    Generation,
    GenerationStream,
    ModelInfo,
    Output,
    Prompt,
    RequestPath,
    RetryPolicy,
    SamplingOptions,
    Started,
    Tokenization,
    Usage,
    WorkerLoad,
    WorkerStatus,
)
from segue.errors import SegueError
from segue.sampling import FinishReason, GeneratedToken

__version__ = version("segue")

__all__ = [
    "Access",
    "AsyncClient",
    "AsyncGenerationStream",
    "Choice",
    "Client",
    "ClusterStatus",
    "Completed",
    "Event",
    "FinishReason",
    "GenerateOptions",
    "GeneratedToken",
    "Generation",
    "GenerationStream",
    "ModelInfo",
    "Output",
    "Prompt",
    "RequestPath",
    "RetryPolicy",
    "SamplingOptions",
    "SegueError",
    "Started",
    "Tokenization",
    "Usage",
    "WorkerLoad",
    "WorkerStatus",
]
