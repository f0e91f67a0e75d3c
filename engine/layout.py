"""From a model and settings to the layout of its KV cache."""

from __future__ import annotations

from segue.config import EngineSettings
from segue.kv_layout import KVLayout
from segue.models.config import ModelConfig


def kv_layout(config: ModelConfig, settings: EngineSettings, model_revision: str) -> KVLayout:
    """`model_revision` stands for the weights: workers with different ones never exchange KV, nor do workers of clusters that
    hold them in different formats."""
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_size=settings.block_size,
        dtype=settings.dtype if settings.kv_dtype == "auto" else settings.kv_dtype,
        model_revision=model_revision,
        weights=settings.weights,
    )
