"""Typed reading of a model's JSON files. Every error names the file and the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segue.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class JsonFields:
    """The fields of one JSON object. A field that is null counts as missing wherever a number or a bool is asked for.

    A `default` of None means that there is none for numbers and bools: ModelFileError when the field is missing.
    """

    file: Path
    values: Mapping[str, Any]
    # Names of the objects that lead to this one, each with a dot after it.
    prefix: str = ""

    @classmethod
    def read(cls, file: Path) -> JsonFields:
        """Raises ModelFileError when `file` cannot be read or does not hold a JSON object."""
        try:
            values = json.loads(file.read_bytes())
        except OSError as error:
            raise ModelFileError(f"cannot read {file}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"{file} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ModelFileError(f"{file} must hold a JSON object")
        return cls(file, values)

    def error(self, name: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.file}: {self.prefix}{name}: {problem}", field=f"{self.prefix}{name}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value as it stands, null included; `default` where the field is missing."""
        return self.values.get(name, default)

    def child(self, name: str) -> JsonFields:
        value = self.get(name)
        if not isinstance(value, dict):
            raise self.error(name, f"must be an object, not {value!r}")
        return JsonFields(self.file, value, f"{self.prefix}{name}.")

    def integer(self, name: str, *, default: int | None = None, minimum: int = 1) -> int:
        value = self._value(name, default)
        if type(value) is not int or not minimum <= value < 2**31:
            raise self.error(name, f"must be a whole number of at least {minimum}, not {value!r}")
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A number above 0; infinity and NaN, which Python's JSON reader lets through, are refused."""
        value = self._value(name, default)
        if type(value) not in {int, float} or not 0 < value < 1e30:
            raise self.error(name, f"must be a number above 0, not {value!r}")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self._value(name, default)
        if type(value) is not bool:
            raise self.error(name, f"must be true or false, not {value!r}")
        return value

    def _value(self, name: str, default: float | bool | None) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise self.error(name, "is missing")
        return value
