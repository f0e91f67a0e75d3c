"""A model's chat template: Jinja2 in a sandbox, with the filters and functions that Hugging Face templates rely on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from segue.errors import InvalidRequest, ModelFileError


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration is an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """Compiled once; rendering is pure, but for the time zone that templates see."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], file_name: str) -> None:
        """`special_tokens`: names such as bos_token, as the template sees them. Raises ModelFileError on bad syntax."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelFileError(f"{file_name}: chat_template, line {error.lineno}: {error.message}") from None

    def render(self, messages: Sequence[ChatMessage], now_unix_s: int) -> str:
        """The chat as one text, up to where the assistant is to speak; `now_unix_s` is what templates take for the time. Raises
        InvalidRequest naming `messages`."""
        now = datetime.datetime.fromtimestamp(now_unix_s).astimezone()
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                strftime_now=now.strftime,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise InvalidRequest("messages", f"the model's chat template refuses them: {error}") from None
