"""From a model and settings to the layout of its KV cache."""

from __future__ import annotations

from engine.parallel import WHOLE, Shard
from segue.config import EngineSettings
from segue.errors import ConfigError
from segue.kv_layout import KVLayout
from segue.models.config import ModelConfig


def kv_layout(config: ModelConfig, settings: EngineSettings, model_revision: str, shard: Shard = WHOLE) -> KVLayout:
    """Of the KV that the rank `shard` holds. `model_revision` stands for the weights: workers with different ones never
    exchange KV, nor do workers of clusters that hold them in different formats. Raises ConfigError for a block size that would
    misplace int8's scales."""
    dtype = settings.kv_format
    if dtype == "int8" and config.head_dim * settings.block_size % 4:
        raise ConfigError(f"block_size: must be a multiple of 4 for int8 KV with heads of {config.head_dim} elements")
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=shard.of(config).num_kv_heads,
        head_dim=config.head_dim,
        block_size=settings.block_size,
        dtype=dtype,
        model_revision=model_revision,
        weights=settings.weights,
        rank=shard.rank,
        num_ranks=shard.size,
    )
