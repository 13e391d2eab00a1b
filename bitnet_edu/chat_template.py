"""Chat templates: small Jinja programs out of other people's files, rendered with bounds.

The language is that of transformers' `apply_chat_template`. Jinja's sandbox keeps a template from
reaching the machine; the bounds here keep it from taking all of its time and memory. No value may
grow beyond `MAX_SIZE`, so that no single operation takes long, and all of them together may make
no more than `MAX_WORK`, in `MAX_SECONDS`.
"""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from bitnet_edu.errors import InputError

MAX_TEMPLATE = 2**18  # characters; the longest in use have about 2**16
STEP = 20  # characters that a step, or a thing in a list, counts as much as
MAX_SIZE = 4 * 10**6  # characters in a value
MAX_WORK = 2 * 10**7  # characters in all that is made
MAX_SECONDS = 5.0
MAX_BITS = 10_000  # of a whole number

# functions and filters whose result can be as large as the product of their arguments
GROWING = {
    *("center", "ljust", "rjust", "zfill", "expandtabs", "replace", "join", "translate"),
    *("indent", "wordwrap", "batch", "slice", "tojson", "sum", "round", "xmlattr", "to_bytes"),
    *("format", "format_map", "strftime_now"),
}
QUADRATIC = {"sum", "striptags", "urlize", "wordwrap"}  # in time
FORMATS = {"format", "format_map", "strftime_now"}


class TooMuch(jinja2.TemplateError):
    """A template wants more than it may have."""


class _Meter:
    """What a rendering has made so far."""

    def __init__(self):
        self.left = MAX_WORK
        self.deadline = time.monotonic() + MAX_SECONDS

    def spend(self, work: int) -> None:
        self.left -= work + STEP
        if self.left < 0:
            raise TooMuch("it makes too much text, or never ends")
        if time.monotonic() > self.deadline:
            raise TooMuch(f"it runs for more than {MAX_SECONDS:.0f} seconds")


_meter: ContextVar[_Meter] = ContextVar("meter")


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of these variables, which must be plain JSON values.

    Raises InputError, whose message begins with "the chat template", if the template is wrong,
    refuses the variables (`raise_exception`), or goes beyond the bounds.
    """
    token = _meter.set(_Meter())
    try:
        return _compiled(source).render(variables)
    except Exception as error:  # a template is a small program and can fail in any way
        reason = str(error) or type(error).__name__
        raise InputError(f"the chat template refuses these messages: {reason:.300}") from None
    finally:
        _meter.reset(token)


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    if len(source) > MAX_TEMPLATE:
        raise TooMuch(f"it is longer than {MAX_TEMPLATE:,} characters")
    return _Environment().from_string(source)


def size_of(value: Any) -> int:
    """Characters in a value, of which each thing in it has STEP; TooMuch for too many.

    What is in it twice counts twice: a list that holds a list twice, and so on, can be short to
    write and endless to print.
    """
    size, waiting = -STEP, [value]
    while waiting:
        value = waiting.pop()
        size += STEP
        if isinstance(value, str | bytes | range):
            size += len(value)
        elif isinstance(value, list | tuple | set | frozenset | Mapping):
            inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            if size + STEP * len(inside) > MAX_SIZE:
                size = MAX_SIZE + 1
            else:
                waiting += inside
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuch("it makes a number of thousands of digits")
        if size > MAX_SIZE:
            raise TooMuch(f"it makes a text or a list larger than {MAX_SIZE:,}")
    return size


class _Generation(Extension):
    """{% generation %}: marks what the model writes, for training; shows its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, in which all that is made is measured."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self.made,
        )
        self.code_generator_class = _Generator
        del self.globals["lipsum"]  # random text
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": strftime_now}
        self.filters["tojson"] = tojson
        self.filters = {name: self._bounded(name, f) for name, f in self.filters.items()}

    def made(self, value: Any) -> Any:
        """Count a value in, and pass it on."""
        _meter.get().spend(size_of(value))
        return value

    def joined(self, *values: Any) -> str:
        """The operator ~."""
        return self.made("".join(str(self.made(value)) for value in values))

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """What a loop goes through, each step counted."""
        for value in values:
            _meter.get().spend(0)
            yield value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 1) > MAX_BITS:
                raise TooMuch("it makes a number of thousands of digits")
        elif operator == "%" and isinstance(left, str):
            _require_small("format", [left, right])
        elif operator == "*" and not numbers:
            _require_small("*", [left, right], MAX_SIZE)
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        function = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        name, owner = getattr(function, "__name__", ""), getattr(function, "__self__", None)
        _meter.get().spend(0)
        if name in GROWING:
            args = [__self._whole(value) for value in args]
            _require_small(name, [owner, *args, *kwargs.values()])
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def _bounded(self, name: str, function: Callable) -> Callable:
        @wraps(function)  # with the marks of what jinja passes first
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if name in GROWING | QUADRATIC:
                args = [self._whole(value) for value in args]
                _require_small(name, [*args, *kwargs.values()])
            return self.made(function(*args, **kwargs))

        return bounded

    def _whole(self, value: Any) -> Any:
        return self.made(list(value)) if isinstance(value, Iterator) else value


class _Bounds(NodeTransformer):
    """Sends what the sandbox can't intercept (loops, ~, lists, long texts) past the meter."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _through("counted", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _through("joined", *node.nodes)

    def visit_List(self, node: nodes.List | nodes.Dict | nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") != "load" else _through("made", node)

    visit_Dict = visit_Tuple = visit_List

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Expr:
        if len(node.data) < STEP:
            return node
        return _through("made", nodes.Const(node.data).set_lineno(node.lineno))


def _through(name: str, *values: nodes.Expr) -> nodes.Call:
    line = values[0].lineno
    function = nodes.EnvironmentAttribute(name).set_lineno(line)
    return nodes.Call(function, list(values), [], None, None).set_lineno(line)


class _Generator(CodeGenerator):
    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        node = _Bounds().visit(node)
        super().visit_Template(node.set_environment(self.environment), frame)


def _require_small(name: str, values: list[Any], most: int = MAX_WORK) -> None:
    """TooMuch if a growing function could make more of these arguments than it may."""
    values = [value for value in values if isinstance(value, _PLAIN)]
    if name in FORMATS and values and isinstance(values[0], str):
        if re.search(r"\d{5}|%[^a-zA-Z%]*\*|\{[^{}]*:[^{}]*\{", values[0]):
            raise TooMuch("it formats with a width that is large, or a variable")
        values = [value for value in values if not isinstance(value, int)]
    if name == "replace" and len(values) > 2:
        del values[1]  # what is replaced makes nothing longer
    if name in QUADRATIC:
        values += values[:1]
    product = 1
    for value in values:
        product *= max(1, abs(value) if isinstance(value, int) else size_of(value))
        if product > most:
            raise TooMuch("it makes too large a text")


_PLAIN = (str, bytes, int, list, tuple, dict, set, frozenset, range)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: Jinja's own sorts the keys and escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
