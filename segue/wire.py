"""Between Segue's types and their protobuf messages. Pure functions; every one has its inverse beside it."""

from __future__ import annotations

from segue.sampling import FinishReason, GeneratedToken, SamplingParams
from segue.v1 import inference_pb2 as pb
from segue.v1 import worker_pb2 as worker_pb

_FINISH_TO_PB = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
_FINISH_FROM_PB = {value: reason for reason, value in _FINISH_TO_PB.items()}


def finish_reason_to_pb(reason: FinishReason | None) -> pb.FinishReason.ValueType:
    return _FINISH_TO_PB[reason]


def finish_reason_from_pb(value: pb.FinishReason.ValueType) -> FinishReason | None:
    return _FINISH_FROM_PB[value]


def token_to_pb(token: GeneratedToken) -> pb.Token:
    message = pb.Token(id=token.token_id, logprob=token.logprob)
    for token_id, logprob in token.top_logprobs:
        message.top_logprobs.add(id=token_id, logprob=logprob)
    return message


def token_from_pb(message: pb.Token) -> GeneratedToken:
    return GeneratedToken(
        token_id=message.id,
        logprob=message.logprob if message.HasField("logprob") else None,
        top_logprobs=tuple((top.id, top.logprob) for top in message.top_logprobs),
    )


def sampling_to_pb(params: SamplingParams) -> worker_pb.Sampling:
    return worker_pb.Sampling(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=params.logit_bias,
        seed=params.seed,
        stop_token_ids=params.stop_token_ids,
        num_logprobs=params.num_logprobs,
    )


def sampling_from_pb(message: worker_pb.Sampling) -> SamplingParams:
    return SamplingParams(
        max_tokens=message.max_tokens,
        min_tokens=message.min_tokens,
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty,
        logit_bias=dict(message.logit_bias),
        seed=message.seed,
        stop_token_ids=tuple(message.stop_token_ids),
        num_logprobs=message.num_logprobs if message.HasField("num_logprobs") else None,
    )
