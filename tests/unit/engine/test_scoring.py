"""Scores of whole texts are those that transformers gives."""

from __future__ import annotations

import pytest
import torch

from engine import scoring
from engine.kernels.reference import TorchKernels
from engine.layout import kv_layout
from engine.model import Decoder
from engine.rotary import RotaryTable
from engine.scoring import Score, cache_for, score
from engine.weights import WeightFormats, load_weights
from segue.config import EngineSettings
from tests.unit.engine.conftest import Checkpoint, MakeCheckpoint


def scored(model: Checkpoint, tokens: list[int]) -> Score:
    layout = kv_layout(model.config, EngineSettings(), "test")
    rotary = RotaryTable(model.config.rope, model.config.head_dim, len(tokens))
    kernels = TorchKernels(model.config, cache_for(len(tokens), layout), rotary)
    return score(Decoder(load_weights(model.directory, model.config, WeightFormats()), kernels), layout, tokens)


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 30])
def test_scores_are_those_of_transformers(checkpoint: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    monkeypatch.setattr(scoring, "STEP_TOKENS", 8)
    model = checkpoint("qwen3")
    tokens = torch.randint(0, 96, (num_tokens,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        logits = model.model(tokens[None]).logits[0, :-1]
        loss = model.model(tokens[None], labels=tokens[None]).loss
    result = scored(model, tokens.tolist())
    expected = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(result.log_likelihoods, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(result.likeliest, logits.argmax(-1))
    assert result.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
