"""Fetching a model from the Hugging Face Hub into its shared cache."""

from __future__ import annotations

import re
from pathlib import Path

from segue.errors import ModelFileError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Not *.safetensors: some repositories carry the same weights a second time under other names.
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "model*.safetensors",
    "model.safetensors.index.json",
]


def is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None


def download_from_hub(hub_id: str) -> Path:
    """The directory of `hub_id`'s files, downloaded unless they are there. Raises ModelFileError saying what to do."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    # Its bases are OSError and the HTTP library's own error, which has another name in each release.
    transport_errors = tuple(base for base in HfHubHTTPError.__mro__ if issubclass(base, Exception) and base is not Exception)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES))
    except GatedRepoError:
        raise ModelFileError(f"{hub_id} is gated: accept its terms on the Hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelFileError(
            f"the Hub has no model {hub_id}, or it is private: check the name or run `hf auth login`"
        ) from None
    except HFValidationError as error:
        raise ModelFileError(f"{hub_id} is not a Hub id: {error}") from None
    except transport_errors as error:
        raise ModelFileError(
            f"cannot download {hub_id} from the Hub ({_first_line(error)}) and no complete copy is cached; "
            "check the network, or copy the model's directory here and give its path"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
