"""Decode steps from recorded graphs: which steps, in which buffers, and that padding harms nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.cuda_graphs import GraphDecoder, batch_sizes
from engine.kernels.reference import TorchKernels
from engine.model import Decoder
from engine.step import Chunk, prepare_step
from engine.weights import WeightFormats
from tests.support.triton_decoder import (
    TritonKernels,
    config,
    make_kernels,
    make_sequences,
    make_weights,
    take_step,
    triton_backend,
)

LENGTHS = [9, 6, 3, 5]
PROMPTS = [8, 5, 2, 4]


class CalledAgain:
    """A graph that calls what was recorded on the same tensors, as a GPU would run it."""

    def record(self, function):
        self._function = function
        self._result = function()
        return self._result

    def replay(self):
        self._result.copy_(self._function())


class Setup:
    def __init__(self, kind=TritonKernels):
        model = replace(config(num_heads=2, num_kv_heads=1), num_layers=1)
        self.kernels, self.cache = make_kernels(kind, model)
        self.eager = Decoder(make_weights(model, WeightFormats()), self.kernels)
        self.sequences = make_sequences(LENGTHS, 4)
        self.graphs = []
        self.decoder = GraphDecoder(self.eager, self.kernels, max_batch=4, new_graph=self._new_graph)

    def _new_graph(self):
        self.graphs.append(CalledAgain())
        return self.graphs[-1]

    def prefill(self):
        self.eager.forward(take_step(self.sequences, PROMPTS, self.cache.layout))

    def step(self, indices):
        """The next token of these sequences, which does not count as computed."""
        return prepare_step([Chunk(self.sequences[index], 1) for index in indices], self.cache.layout)


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.setattr(triton_backend, "_ENTER_ROWS", 16)
    setup = Setup()
    setup.prefill()
    return setup


def test_batch_sizes():
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(33) == [1, 2, 4, 8, 16, 32, 64]


def test_replays_give_what_the_decoder_gives(setup):
    """In graphs with and without padding, after steps of more and of fewer sequences."""
    recorded = []
    for indices in ([0, 1, 2], [2], [1, 2, 0]):
        step = setup.step(indices)
        expected = setup.eager.forward(step)
        logits = setup.decoder.forward(step)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        # Not the graph's own memory, which the next replay overwrites.
        recorded.append((logits, expected))
    assert len(setup.graphs) == 2
    for logits, expected in recorded:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_each_replay_gives_what_the_torch_backend_gives(setup):
    reference = Setup(TorchKernels)
    reference.prefill()
    expected = reference.eager.forward(reference.step([0, 1, 2]))
    step = setup.step([0, 1, 2])
    for _ in range(2):
        torch.testing.assert_close(setup.decoder.forward(step), expected, rtol=0, atol=1e-4)


def test_padding_writes_nothing(setup):
    """Neither when graphs are recorded, nor where a step leaves rows of the one before it in the buffers."""
    before = [layer.clone() for layer in setup.cache.layers]
    setup.decoder.record_all()
    assert all(torch.equal(layer, old) for layer, old in zip(setup.cache.layers, before, strict=True))
    setup.decoder.forward(setup.step([0, 1, 2, 3]))
    for layer, old in zip(setup.cache.layers, before, strict=True):
        layer.copy_(old)
    setup.decoder.forward(setup.step([0, 1, 2]))
    assert len(setup.graphs) == 3
    expected = {
        (sequence.lease.block_ids[position // 4], position % 4)
        for sequence, length in zip(setup.sequences, [*LENGTHS[:3], PROMPTS[3]], strict=True)
        for position in range(length)
    }
    # The cache was full of NaNs.
    filled = setup.cache.keys(0)[:, 0, 0].isfinite().nonzero()
    assert set(map(tuple, filled.tolist())) == expected


def test_rows_that_are_not_sampled(setup):
    """A single token that does not end its sequence gives no logits."""
    sequences = setup.sequences
    sequences[1].token_ids.append(5)
    step = setup.step([0, 1, 2])
    logits = setup.decoder.forward(step)
    assert step.sampled_chunks == [0, 2]
    torch.testing.assert_close(logits, setup.eager.forward(step), rtol=0, atol=1e-5)


def test_other_steps_run_as_they_are(setup):
    calls = []
    with_hook = setup.decoder.forward(setup.step([0]), calls.append)
    assert calls == [0]
    sequences = setup.sequences
    sequences[2].num_computed = 0
    mixed = prepare_step([Chunk(sequences[0], 1), Chunk(sequences[2], 3)], setup.cache.layout)
    logits = setup.decoder.forward(mixed)
    torch.testing.assert_close(logits[:1], with_hook, rtol=0, atol=1e-5)
    small = GraphDecoder(setup.eager, setup.kernels, max_batch=1, new_graph=setup._new_graph)
    small.forward(setup.step([0, 1]))
    assert setup.graphs == []
