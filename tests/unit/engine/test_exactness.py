"""A token's KV and logits are the same bits, whatever computed them: alone or among neighbours, in one chunk or many, as
prefill or as decode, in whichever blocks, on however many threads. The native kernels keep this in every format; int8 is where
it is promised."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.block_pool import Lease
from engine.sequence import Sequence
from engine.step import Chunk, prepare_step
from segue.sampling import SamplingParams

NUM_BLOCKS = 1200
FORMATS = [
    pytest.param({"quantization": "int8"}, id="int8"),
    pytest.param({"quantization": "int8", "kv_dtype": "float32"}, id="int8-kv-float32"),
    pytest.param({"quantization": "int8", "kv_dtype": "int8"}, id="int8-kv-int8"),
    pytest.param({"quantization": "int4"}, id="int4"),
    pytest.param({"dtype": "bfloat16"}, id="bfloat16"),
    pytest.param({}, id="float32"),
]


@dataclass(frozen=True)
class Way:
    """How a prompt is computed."""

    prompt: list[int]
    # Sizes of its chunks, the last one shortened to fit; over again when they are too few.
    chunks: list[int]
    num_neighbours: int
    seed: int


@st.composite
def ways(draw: st.DrawFn) -> Way:
    return Way(
        prompt=draw(st.lists(st.integers(0, 95), min_size=1, max_size=60)),
        chunks=draw(st.lists(st.integers(1, 24), min_size=1, max_size=4)),
        num_neighbours=draw(st.sampled_from([0, 1, 7, 31])),
        seed=draw(st.integers(0, 2**32)),
    )


class Lab:
    """One decoder, driven by hand: who owns which blocks is for the test to say."""

    def __init__(self, decoder, layout) -> None:
        self.decoder, self.layout = decoder, layout

    def sequence(self, prompt: list[int], blocks: list[int]) -> Sequence:
        num_blocks = self.layout.num_blocks_for(len(prompt))
        own, blocks[:] = blocks[:num_blocks], blocks[num_blocks:]
        return Sequence("s", list(prompt), SamplingParams(max_tokens=1), lease=Lease(own, 0))

    def step(self, chunks: list[Chunk]) -> dict[int, torch.Tensor]:
        """Logits by the index of the chunk that reached its sequence's end."""
        with torch.inference_mode():
            step = prepare_step(chunks, self.layout)
            logits = self.decoder.forward(step).clone()
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        return dict(zip(step.sampled_chunks, logits, strict=True))

    def result(self, sequence: Sequence, logits: torch.Tensor) -> list[torch.Tensor]:
        """Logits, and the KV of each layer at the sequence's positions."""
        found = [logits]
        cache, blocks = self.decoder.kernels.cache, list(sequence.lease.block_ids)
        for layer in range(self.layout.num_layers):
            found.append(cache.keys(layer)[blocks].transpose(2, 3).transpose(1, 2).flatten(0, 1)[: len(sequence.token_ids)])
            found.append(cache.values(layer)[blocks].transpose(1, 2).flatten(0, 1)[: len(sequence.token_ids)])
            if self.layout.dtype == "int8":
                found.append(cache.scales(layer)[blocks].movedim(-1, 1).flatten(0, 1)[: len(sequence.token_ids)])
        return [part.clone() for part in found]

    def whole(self, prompt: list[int]) -> list[torch.Tensor]:
        """Alone, at once, in the first blocks."""
        sequence = self.sequence(prompt, list(range(NUM_BLOCKS)))
        return self.result(sequence, self.step([Chunk(sequence, len(prompt))])[0])

    def by(self, way: Way) -> list[torch.Tensor]:
        dice = random.Random(way.seed)
        blocks = dice.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        sequence = self.sequence(way.prompt, blocks)
        others = [
            self.sequence([dice.randrange(96) for _ in range(dice.randint(1, 80))], blocks) for _ in range(way.num_neighbours)
        ]
        sizes = iter(way.chunks * len(way.prompt))
        while True:
            chunks = [Chunk(sequence, min(next(sizes), sequence.num_uncomputed))]
            chunks += [
                Chunk(other, 1 if dice.random() < 0.5 else dice.randint(1, other.num_uncomputed))
                for other in others
                if other.num_uncomputed
            ]
            order = dice.sample(range(len(chunks)), len(chunks))
            logits = self.step([chunks[index] for index in order])
            if not sequence.num_uncomputed:
                return self.result(sequence, logits[order.index(0)])


@pytest.fixture(scope="module", params=FORMATS)
def lab(request, checkpoint):
    with checkpoint("llama_96").engine(num_blocks=NUM_BLOCKS, **request.param) as runner:
        if runner.engine.decoder.kernels.name == "torch":
            pytest.skip("the torch reference promises equality up to rounding only")
        yield Lab(runner.engine.decoder, runner.engine.layout)


@given(way=ways())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
def test_bits_do_not_depend_on_the_way(lab, way):
    for expected, found in zip(lab.whole(way.prompt), lab.by(way), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("num_neighbours", [0, 1, 7, 31])
def test_prefill_and_decode_of_the_same_tokens(lab, num_neighbours):
    prompt = [7 * index % 96 for index in range(45)]
    one_by_one = Way(prompt, [1], num_neighbours, seed=num_neighbours)
    for expected, found in zip(lab.whole(prompt), lab.by(one_by_one), strict=True):
        assert torch.equal(expected, found)


def test_layers_one_by_one_and_at_once(lab):
    """Whoever is told of each layer has them computed one by one."""
    results, told = [], []
    for on_layer in (None, told.append):
        sequence = lab.sequence([3 * index % 96 for index in range(45)], list(range(NUM_BLOCKS)))
        with torch.inference_mode():
            step = prepare_step([Chunk(sequence, 45)], lab.layout)
            results.append(lab.result(sequence, lab.decoder.forward(step, on_layer).clone()))
    assert told == list(range(lab.layout.num_layers))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_threads_change_nothing(checkpoint):
    prompt = [5 * index % 96 for index in range(40)]
    results = []
    for threads in (1, 3):
        with checkpoint("llama_96").engine(num_blocks=NUM_BLOCKS, quantization="int8", threads=threads) as runner:
            results.append(Lab(runner.engine.decoder, runner.engine.layout).whole(prompt))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
