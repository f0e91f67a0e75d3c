"""A rank after the first: it computes the steps that rank 0 tells it of, over its own slices of weights and KV cache.

It needs no scheduler, no block pool and no sampler: blocks have the same numbers on all ranks.
"""

from __future__ import annotations

from pathlib import Path

import torch

from engine.engine import load_decoder, make_forward
from engine.kv_cache import WritableBuffer
from engine.model import Decoder
from engine.parallel import RankGroup
from engine.step_words import unpack_step
from engine.weights import WeightFormats
from segue.kv_layout import KVLayout
from segue.models.config import ModelConfig


class Follower:
    def __init__(self, decoder: Decoder, group: RankGroup, *, threads: int) -> None:
        self.decoder = decoder
        self._forward = make_forward(decoder)
        self._group = group
        self._threads = threads

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: ModelConfig,
        layout: KVLayout,
        num_blocks: int,
        kv_buffer: WritableBuffer,
        formats: WeightFormats,
        group: RankGroup,
        *,
        threads: int,
        device: str = "cpu",
        kernels: str = "auto",
    ) -> Follower:
        """As Engine.load."""
        decoder = load_decoder(
            model_dir,
            config,
            layout,
            num_blocks,
            kv_buffer,
            formats,
            group,
            threads=threads,
            device=device,
            kernels=kernels,
        )
        return cls(decoder, group, threads=threads)

    def run(self) -> None:
        """Computes until rank 0 closes its engine.

        Raises WorkerLost when another rank is gone, and when this one fails, which the others then notice.
        """
        torch.set_num_threads(self._threads)
        with self._group.together(), torch.inference_mode():
            while len(words := self._group.receive_step()):
                self._forward(unpack_step(words), None)
        self._group.leave()
