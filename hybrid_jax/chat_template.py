"""Chat templates: a published Jinja template turns messages into the text of a prompt.

A template is foreign code, so it runs in Jinja's immutable sandbox: no attributes that begin with an underscore, no
change of what is passed in, no files, no imports, and bounds on its source and its output. The sandbox bounds neither
time nor memory: who renders for strangers does it in a process that it can end. This file run as a program is that
process: it reads JSON lines, first the template, then what to render, and writes one for each. Knows nothing of tokens.
"""

import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn, Protocol

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

TEMPLATE_BYTES = 64 * 2**10
RENDERED_BYTES = 4 * 2**20
MAX_TEMPLATE_VARIABLES = 16
PROCESS_BYTES = 2**30  # of memory, of a process that renders
SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OUR_NAMES = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", *SPECIAL_TOKEN_NAMES}
Scalar = str | int | float | bool | None


class Template(Protocol):
    """What makes text of messages. As of `ChatTemplate`."""

    @property
    def source(self) -> str:
        """Its text."""

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Spellings by name."""

    @property
    def reads_tools(self) -> bool:
        """Whether tools make a difference to it."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Scalar] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A chat template. Made by `compile_template`.

    variables: the names that it reads beside those that `render` always passes. reads_tools: whether it reads `tools`.
    """

    template: jinja2.Template
    source: str
    special_tokens: Mapping[str, str]
    variables: frozenset[str]
    reads_tools: bool

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Scalar] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The text of a conversation.

        variables: values for names that the template reads (`enable_thinking`), scalars only.
        now: what `strftime_now` formats; None leaves that function undefined, for which templates have a fixed text.
        Raises ValueError with the template's own words if it refuses the messages, and for an output over 4 MiB.
        """
        context: dict[str, Any] = dict(self.special_tokens) | self._checked(variables or {})
        context |= {"messages": messages, "tools": tools, "documents": None}
        context["add_generation_prompt"] = add_generation_prompt
        if now is not None:
            context["strftime_now"] = now.strftime
        try:
            return "".join(_bounded(self.template.generate(context)))
        except Exception as error:  # whatever foreign code raises is a refusal of these messages
            raise ValueError(f"the chat template refused the messages: {str(error)[:1000]}") from None

    def _checked(self, variables: Mapping[str, Scalar]) -> dict[str, Scalar]:
        if len(variables) > MAX_TEMPLATE_VARIABLES:
            raise ValueError(
                f"wanted at most {MAX_TEMPLATE_VARIABLES} template variables, got {len(variables)}: drop some"
            )
        for name, value in variables.items():
            if name not in self.variables:
                raise ValueError(f"wanted template variables among {sorted(self.variables)}, got {name!r}: drop it")
            if not isinstance(value, str | int | float | bool | None):
                raise ValueError(
                    f"wanted a scalar for the template variable {name}, got {type(value).__name__}: pass one"
                )
        return dict(variables)


def compile_template(source: bytes, special_tokens: Mapping[str, str]) -> ChatTemplate:
    """A template that can use the spellings of `special_tokens`, by names such as `bos_token`.

    Raises ValueError for a source that is over 64 KiB, not UTF-8 or not Jinja.
    """
    if len(source) > TEMPLATE_BYTES:
        raise ValueError(f"wanted a chat template of at most {TEMPLATE_BYTES} bytes, got {len(source)}: shorten it")
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    try:
        text = source.decode()
        names = jinja2.meta.find_undeclared_variables(sandbox.parse(text)) - set(sandbox.globals)
        template, variables = sandbox.from_string(text), frozenset(names - OUR_NAMES)
        return ChatTemplate(template, text, special_tokens, variables, "tools" in names)
    except Exception as error:  # a RecursionError is possible too
        raise ValueError(f"wanted a Jinja chat template, got {str(error)[:200]}: correct it") from None


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    size_bytes = 0
    for part in parts:
        size_bytes += len(part.encode("utf-8", "surrogatepass"))
        if size_bytes > RENDERED_BYTES:
            raise ValueError(f"wanted at most {RENDERED_BYTES} bytes of text, got more: send less")
        yield part


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute that begins with an underscore, no change of what was passed in, no files, no huge products."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Numbers are multiplied; repeating a text and raising to a power, which explode in one step, are refused."""
        if operator == "**" or not all(isinstance(side, int | float) for side in (left, right)):
            raise SecurityError(f"a chat template may multiply numbers only, got {operator} of other things")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}`, which marks an assistant's part for training: its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """The body up to `endgeneration`, in a scope of its own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as published templates expect it: nothing escaped for HTML, characters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


# --------------------------------------------------------------------------------------------------- as a process alone


def _serve_lines() -> None:
    """Render what is asked for on standard input until it ends."""
    resource.setrlimit(resource.RLIMIT_AS, (PROCESS_BYTES, PROCESS_BYTES))
    stated = json.loads(sys.stdin.readline())
    template = compile_template(stated["source"].encode("utf-8", "surrogatepass"), stated["special_tokens"])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(template, json.loads(line))), flush=True)


def _answer(template: ChatTemplate, asked: dict[str, Any]) -> dict[str, str]:
    try:
        now = None if asked["now"] is None else datetime.fromisoformat(asked["now"])
        messages, tools, prompts = asked["messages"], asked["tools"], asked["add_generation_prompt"]
        return {"text": template.render(messages, tools, prompts, asked["variables"], now)}
    except ValueError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    _serve_lines()
