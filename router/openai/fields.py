"""Reading a request body: JSON to a checked model, every problem an InvalidRequest that names the field.

A field that would change the answer and is not served is refused by name, unless it has the value that changes nothing; a
field that cannot change the answer is taken and ignored; null counts as not given, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from segue.errors import InvalidRequest

HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    | {"parallel_tool_calls"}
)
# Field → values that ask for nothing.
COMPLETION_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {"suffix": ("",), "echo": (False,)}
CHAT_UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
}

# A name that the client made up is not sent back at any length.
_MAX_PATH = 100

RequestModel = TypeVar("RequestModel", bound=BaseModel)


def parse_body(model: type[RequestModel], body: bytes, unsupported: Mapping[str, tuple[object, ...]]) -> RequestModel:
    """Raises InvalidRequest for text that is not UTF-8 or not JSON, and for the first field that is wrong."""
    values = without_nulls(_parse_object(body))
    for name, neutral in unsupported.items():
        if name in values and values.pop(name) not in neutral:
            raise InvalidRequest(name, "is not supported; leave it out")
    given = {name: value for name, value in values.items() if name not in HARMLESS}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _first_problem(error) from None


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest("body", f"is not valid JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "must be a JSON object")
    return value


def without_nulls(value: Any) -> Any:
    """The same JSON value without the null members of objects."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [without_nulls(member) for member in value] if any(isinstance(m, dict) for m in value) else value
    return value


def _first_problem(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False)[0]
    name = _path(problem["loc"])
    if problem["type"] == "missing":
        return InvalidRequest(name, "is missing")
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(name, "is not a known field; leave it out")
    return InvalidRequest(name, problem["msg"])


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`"""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path[:_MAX_PATH] or "body"
