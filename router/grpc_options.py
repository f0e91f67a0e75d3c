"""The public SamplingOptions message to GenerationOptions: a field that is not set becomes None."""

from __future__ import annotations

from typing import Any

from router.options import GenerationOptions
from segue.v1 import inference_pb2 as pb

_OPTIONAL = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "num_logprobs",
)


def options_from_pb(request: pb.GenerateRequest) -> GenerationOptions:
    sampling = request.sampling
    given: dict[str, Any] = {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}  # type: ignore[arg-type]
    if request.HasField("resume"):
        given["seed"] = request.resume.seed
    return GenerationOptions(
        logit_bias=dict(sampling.logit_bias),
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        num_choices=request.num_choices if request.HasField("num_choices") else None,
        **given,
    )
