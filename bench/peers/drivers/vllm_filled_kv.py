"""A KV connector that claims a prompt's KV to be there already, for some requests; vLLM loads it by this module's name.

vLLM's own DecodeBenchConnector does it for every request, which would leave nothing to prefill.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import (  # type: ignore[import-not-found]
    DecodeBenchConnector,
)
from vllm_driver import FILLED  # type: ignore[import-not-found]  # beside this file


class FilledKV(DecodeBenchConnector):  # type: ignore[misc]  # Any, where vLLM is not installed
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        if not request.request_id.startswith(FILLED):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
