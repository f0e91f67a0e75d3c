"""Tiny random checkpoints, made by transformers, and an engine that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.distributed import HashStore

from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.layout import kv_layout
from engine.parallel import RankGroup, Shard
from engine.sequence import Sequence
from engine.step import Chunk
from engine.weights import WeightFormats
from segue.config import EngineSettings
from segue.models.config import ModelConfig
from segue.prefix import block_hashes
from segue.sampling import GeneratedToken, SamplingParams

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    # Wide enough that attention and norms matter and no two logits are nearly equal.
    "initializer_range": 0.25,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_4_kv_heads": lambda: transformers.LlamaConfig(
        **SIZES | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 128}
    ),
    # Fills whole groups of int4 weights.
    "llama_96": lambda: transformers.LlamaConfig(**SIZES | {"hidden_size": 96, "intermediate_size": 128}),
    "llama3_rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "linear_rope": lambda: transformers.LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    ),
    "llama_biases": lambda: transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=16),
    "mistral_window": lambda: transformers.MistralConfig(**SIZES, sliding_window=64),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=False),
    "qwen3_biases": lambda: transformers.Qwen3Config(**SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True),
}


class Checkpoint:
    """A model directory and the transformers model that wrote it."""

    def __init__(self, directory: Path, model: Any) -> None:
        self.directory = directory
        self.model = model
        self.config = ModelConfig.from_dir(directory)

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation as transformers gives it."""
        output = self.model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
        return output[0, len(prompt) :].tolist()

    def logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(torch.tensor([token_ids])).logits[0, -1]

    @contextmanager
    def engine(
        self, *, num_blocks: int = 160, kernels: str = "auto", threads: int = 1, block_size: int = 4, **options: Any
    ) -> Iterator[EngineRunner]:
        """`options` are further fields of EngineSettings."""
        settings = EngineSettings(block_size=block_size, **options)
        layout = kv_layout(self.config, settings, "test")
        formats = WeightFormats(getattr(torch, settings.dtype), settings.quantization, frozenset(settings.keep_float))
        # Stale memory holds anything: no result may depend on it.
        cache = KVCache.over(bytearray(b"\x42") * (num_blocks * layout.block_bytes), layout, num_blocks)
        with Engine.load(self.directory, self.config, cache, formats, threads=threads, kernels=kernels) as engine:
            yield EngineRunner(engine)
            engine.pool.check()

    @contextmanager
    def ranks(self, size: int, *, num_blocks: int = 160, kernels: str = "auto", **options: Any) -> Iterator[RankedRunner]:
        """An engine of `size` ranks, which are threads of this process; `options` as in `engine`."""
        settings = EngineSettings(**{"block_size": 4} | options)
        formats = WeightFormats(getattr(torch, settings.dtype), settings.quantization, frozenset(settings.keep_float))
        store = HashStore()

        def load(rank: int) -> Engine:
            shard = Shard(rank, size)
            layout = kv_layout(self.config, settings, "test", shard)
            cache = KVCache.over(bytearray(b"\x42") * (num_blocks * layout.block_bytes), layout, num_blocks)
            group = RankGroup(store, shard)
            return Engine.load(self.directory, self.config, cache, formats, group, threads=1, kernels=kernels)

        with ThreadPoolExecutor(size) as threads:
            engines = list(threads.map(load, range(size)))
        following = [asyncio.create_task(engine.follow()) for engine in engines[1:]]
        try:
            yield RankedRunner(engines, following)
            engines[0].pool.check()
        finally:
            for engine in engines:
                engine.close()


class EngineRunner:
    """Drives an engine the way workers do."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self, prompt: list[int], num_tokens: int, *, reuse_prefix: bool = False, **sampling: Any) -> Sequence:
        block_size = self.engine.layout.block_size
        params = SamplingParams(max_tokens=num_tokens, **{"temperature": 0.0, **sampling})
        # The last prompt token is always computed: its logits give the first token.
        hashes = block_hashes(prompt[:-1], block_size) if reuse_prefix else []
        lease = self.engine.pool.lease(self.engine.layout.num_blocks_for(len(prompt) + num_tokens), hashes)
        assert lease is not None
        return Sequence(len(prompt), list(prompt), params, lease=lease, num_computed=lease.num_cached * block_size)

    async def step(self, chunks: list[Chunk]) -> list[GeneratedToken | None]:
        tokens = await self.engine.run(chunks)
        for chunk, token in zip(chunks, tokens, strict=True):
            if token is not None:
                chunk.sequence.append(token)
        return tokens

    async def finish(self, sequences: list[Sequence], *, max_chunk: int = 1000) -> list[list[int]]:
        """Runs all to their max_tokens, together, and releases them. What each generated."""
        while running := [s for s in sequences if s.num_generated < s.sampling.max_tokens]:
            await self.step([Chunk(s, min(max_chunk, s.num_uncomputed)) for s in running])
        for sequence in sequences:
            self.release(sequence)
        return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]

    def release(self, sequence: Sequence) -> None:
        """Publishes the full blocks, then gives all of them back."""
        lease, block_size = sequence.lease, self.engine.layout.block_size
        assert lease is not None
        for index, block_hash in enumerate(block_hashes(sequence.token_ids[: sequence.num_computed], block_size)):
            self.engine.pool.publish(lease, index, block_hash)
        self.engine.pool.release(lease)

    async def generate(self, prompt: list[int], num_tokens: int, *, max_chunk: int = 1000, **options: Any) -> list[int]:
        (tokens,) = await self.finish([self.start(prompt, num_tokens, **options)], max_chunk=max_chunk)
        return tokens


class RankedRunner(EngineRunner):
    """One with the engines of all ranks, and what those after the first do."""

    def __init__(self, engines: list[Engine], following: list[asyncio.Task[None]]) -> None:
        super().__init__(engines[0])
        self.engines = engines
        self.following = following

    @property
    def caches(self) -> list[KVCache]:
        return [engine.decoder.kernels.cache for engine in self.engines]


MakeCheckpoint = Callable[[str], Checkpoint]
OpenEngine = Callable[..., AbstractContextManager[EngineRunner]]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """Makes the checkpoint of that name in CONFIGS, once."""

    @cache
    def make(name: str) -> Checkpoint:
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
        # Biases and norm weights start as constants, which would hide that they are used wrongly.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(directory)
        return Checkpoint(directory, model.eval())

    return make


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 96, (length,), generator=generator).tolist() for length in (1, 4, 5, 17, 39)]
