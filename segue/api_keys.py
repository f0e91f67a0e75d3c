"""API keys and the file that they are kept in: JSON, which `segue keys` writes and routers read.

    {"keys": [{"name": "ann", "tenant": "ann", "key_id": "5f0c...", "sha256": "...", "permissions": ["infer"], ...}]}

A key is `segue_<key id>_<256 random bits>`, shown once, when it is made. The file holds its SHA-256 alone. Passwords need a
slow, salted hash since people choose them and they can be guessed. Nothing guesses 256 random bits: a fast hash keeps them as
well, and a slow one would cost every request, and let strangers keep the router busy with made-up keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from segue.errors import ConfigError

PREFIX = "segue"
DEFAULT_FILE = Path("api-keys.json")
# infer: generate, tokenize, list models. observe: metrics. operate: drain, change roles, restart, ... One gives no other.
Permission = Literal["infer", "observe", "operate"]
PERMISSIONS: tuple[Permission, ...] = get_args(Permission)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$")]


class ApiKey(BaseModel):
    """One entry. Keys of one tenant share its prefix caches and its share of the cluster; limits are each key's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    tenant: Name
    key_id: str = Field(pattern=r"^[0-9a-f]{16}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", repr=False)
    permissions: tuple[Permission, ...] = Field(("infer",), min_length=1)
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    weight: float = Field(1.0, gt=0, le=1000)
    # Requests get no lower number, which would be more urgent.
    best_priority: int = 0
    created: str = ""

    def is_of(self, text: str) -> bool:
        """Whether `text` is this very key. Takes as long whatever the answer."""
        return hmac.compare_digest(self.sha256, _hash(text))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[ApiKey, ...]


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """Raises ConfigError that names the file, and the entry and field at fault."""
    try:
        keys = _File.model_validate_json(file.read_bytes()).keys
    except OSError as error:
        raise ConfigError(f"api_keys_file: cannot read {file}: {error.strerror}", field="api_keys_file") from None
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "the whole"
        raise ConfigError(f"api_keys_file: {file}: {where}: {problem['msg']}", field="api_keys_file") from None
    for what, values in (("name", [key.name for key in keys]), ("key_id", [key.key_id for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(f"api_keys_file: {file}: two keys have the same {what}", field="api_keys_file")
    return keys


def create_key(file: Path, name: str, tenant: str | None = None, **terms: Any) -> str:
    """Adds a key to the file, which is made if it is not there; gives the key itself, which nothing keeps. `terms` are further
    fields of ApiKey: permissions and limits. Raises ConfigError."""
    keys = read_keys(file) if file.exists() else ()
    if any(key.name == name for key in keys):
        raise ConfigError(f"{file} has a key {name!r} already; revoke it first, or choose another name")
    key_id = secrets.token_hex(8)
    text = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        key = ApiKey(name=name, tenant=tenant or name, key_id=key_id, sha256=_hash(text), created=created, **terms)
    except ValidationError as error:
        problem = error.errors(include_input=False, include_url=False)[0]
        raise ConfigError(f"{problem['loc'][0]}: {problem['msg']}") from None
    _write(file, [*keys, key])
    return text


def revoke_key(file: Path, name: str) -> None:
    """Raises ConfigError when there is none of this name."""
    keys = read_keys(file)
    left = [key for key in keys if key.name != name]
    if len(left) == len(keys):
        names = ", ".join(key.name for key in keys) or "none"
        raise ConfigError(f"{file} has no key {name!r}; it has {names}")
    _write(file, left)


def find_key(keys: Sequence[ApiKey], text: str) -> ApiKey | None:
    """The key that `text` is. Ids are no secret, and looked up like any word; the rest is compared as secrets are."""
    key_id = text.removeprefix(f"{PREFIX}_").partition("_")[0]
    return next((key for key in keys if key.key_id == key_id and key.is_of(text)), None)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _write(file: Path, keys: Sequence[ApiKey]) -> None:
    """At once, so that no router reads half a file; for its owner alone."""
    content = json.dumps({"keys": [key.model_dump(exclude_none=True) for key in keys]}, indent=2) + "\n"
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(content)
        Path(temporary).replace(file)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from None
