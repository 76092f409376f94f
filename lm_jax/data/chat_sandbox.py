"""Jinja as Transformers sets it up for chat templates, in a sandbox that bounds what it takes.

A template comes with a model, from whoever made that. Jinja's own sandbox keeps it from what is not
its business. Here it is kept from taking the process's time and memory as well: each pass through a
loop or macro is counted, and nothing that it makes, a text, a list or a number, may be too large.
What would be is refused before it is made where an operator, a filter or a method multiplies.
"""

import contextlib
import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lm_jax.errors import UserError

MOST_CHARACTERS = 4_000_000  # of a rendered conversation, and of any value on the way to it
_MOST_STEPS = 200_000  # passes through loops and macros; takes less than a second
_MOST_SECONDS = 20.0
_MOST_WORK = 400_000_000  # characters that are read and written on the way
_MOST_BITS = 4096  # of an integer
_MEMBER = 16  # characters that a member of a list is worth
_LARGEST = 1_000_000  # number that a filter or method is given: a width, say
_WIDTH = re.compile(r"[0-9]{6}")  # in a format
# Names by which a compiled template calls what is here.
_STEP, _MADE, _JOIN = "lm_jax_step", "lm_jax_made", "lm_jax_join"
# Filters that look at no more than one value, however large.
_QUICK = {"length", "count", "first", "last", "default", "d"}


class _Meter:
    """What one rendering has taken."""

    def __init__(self) -> None:
        self._steps, self._work = _MOST_STEPS, _MOST_WORK
        self._end = time.monotonic() + _MOST_SECONDS

    def step(self) -> bool:
        """Always True."""
        self._steps -= 1
        if self._steps < 0:
            raise UserError(f"it took more than {_MOST_STEPS:,} steps: it may never end")
        if time.monotonic() > self._end:
            raise UserError(f"it took more than {_MOST_SECONDS:.0f} seconds")
        return True

    def made(self, value: Any) -> Any:
        """`value`, if it is not too large."""
        self._size(value)
        return value

    def check(self, values: Iterable[Any]) -> None:
        """Refuses what an operation could make of them, where that is too large."""
        sizes = [self._size(value) for value in values]
        largest, second, *_ = [*sorted(sizes, reverse=True), 1, 1]
        if largest * max(second, 1) > 16 * MOST_CHARACTERS or any(
            isinstance(value, int) and abs(value) > _LARGEST for value in values
        ):
            raise UserError("it would make too large a text")

    def _size(self, value: Any) -> int:
        """Characters, and `_MEMBER` for each member at any depth."""
        from jinja2.utils import Namespace

        size, left, texts = 0, [value], 0
        while left:
            one = left.pop()
            size += _MEMBER
            if isinstance(one, str | bytes):
                texts += len(one)
            elif isinstance(one, int) and one.bit_length() > _MOST_BITS:
                raise UserError(f"it made a number of more than {_MOST_BITS} bits")
            elif isinstance(one, dict):
                left += [*one.keys(), *one.values()]
            elif isinstance(one, list | tuple | set | frozenset):
                left += one
            elif isinstance(one, Namespace):
                left.append(object.__getattribute__(one, "_Namespace__attrs"))
            if size + texts > MOST_CHARACTERS:
                raise UserError(f"it made a text or a list of more than {MOST_CHARACTERS:,}")
        self._work -= size + (texts if isinstance(value, str) else 0)
        if self._work < 0:
            raise UserError("it takes too much work")
        return max(size, texts)


_meter: contextvars.ContextVar[_Meter] = contextvars.ContextVar("meter")


@contextlib.contextmanager
def metered() -> Iterator[dict[str, Any]]:
    """While entered, a template of `environment` can be rendered, given what this yields."""
    meter = _Meter()
    token = _meter.set(meter)
    try:
        yield {_STEP: meter.step, _MADE: lambda value: value, _JOIN: _joined}
    finally:
        _meter.reset(token)


def _joined(*values: Any) -> str:
    for value in values:
        _meter.get().made(value)
    return "".join(map(str, values))


def _concat(parts: Iterable[str]) -> str:
    return _meter.get().made("".join(parts))


def _bounded(filter: Callable[..., Any], form: bool) -> Callable[..., Any]:
    """
    Args:
      form: whether it fills in what it is given first.
    """

    @functools.wraps(filter)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        meter = _meter.get()  # while a template is compiled there is none: nothing is computed then
        given = (*args, *kwargs.values())
        if form:
            _check_format(meter, str(given[0]), given[1:])
        meter.check(given)
        return meter.made(filter(*args, **kwargs))

    return bounded


def environment() -> Any:
    """Jinja, with all that Transformers gives a template beside the conversation itself."""
    import jinja2
    from jinja2 import ext, nodes, visitor
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks what the model says; here it is rendered like the rest."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

        def inside(self, caller: Callable[[], str]) -> str:
            return caller()

    def call_of(name: str, args: list[Any], line: int) -> Any:
        return nodes.Call(nodes.Name(name, "load"), args, [], None, None).set_lineno(line)

    class Measured(visitor.NodeTransformer):
        """Has calls look at whatever is made without one."""

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return call_of(_JOIN, node.nodes, node.lineno)

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            stored = getattr(node, "ctx", "load") != "load"
            return node if stored else call_of(_MADE, [node], node.lineno)

        visit_Tuple = visit_Dict = visit_List

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})
        concat = staticmethod(_concat)

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            tree = Measured().visit(super()._parse(source, name, filename))
            for node in tree.find_all((nodes.For, nodes.Macro)):
                step = call_of(_STEP, [], node.lineno)
                if getattr(node, "test", None):  # what it passes over is counted as well
                    node.test = nodes.And(step, node.test).set_lineno(node.lineno)
                else:
                    node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
            return tree

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            meter = _meter.get()
            if operator == "*":
                numbers = [x for x in (left, right) if isinstance(x, int)]
                sized = [x for x in (left, right) if isinstance(x, str | list | tuple)]
                if numbers and sized and numbers[0] * meter._size(sized[0]) > MOST_CHARACTERS:
                    raise UserError("it would make too large a text")
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                if left.bit_length() * right > _MOST_BITS:
                    raise UserError(f"it would make a number of more than {_MOST_BITS} bits")
            elif operator == "%" and isinstance(left, str):
                given = right if isinstance(right, tuple) else (right,)
                _check_format(meter, left, given)
            return meter.made(super().call_binop(context, operator, left, right))

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            method = getattr(function, "__wrapped__", function)  # of str.format, which jinja wraps
            owner = getattr(method, "__self__", None)
            meter = _meter.get()
            if isinstance(owner, str) and method.__name__ in ("format", "format_map"):
                _check_format(meter, owner, (*args, *kwargs.values()))
            elif isinstance(owner, str | list | tuple | dict | int):
                meter.check((owner, *args, *kwargs.values()))
            return meter.made(super().call(context, function, *args, **kwargs))

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """Jinja's own escapes HTML."""
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def finalize(value: Any) -> Any:
        meter = _meter.get(None)
        return meter.made(value) if meter else value

    found = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
        finalize=finalize,
    )
    found.filters["tojson"] = to_json
    for name, filter in found.filters.items():
        if name not in _QUICK:
            found.filters[name] = _bounded(filter, name == "format")
    found.globals["raise_exception"] = refuse
    del found.globals["lipsum"]  # as much text as one likes
    return found


def _check_format(meter: _Meter, form: str, values: tuple[Any, ...]) -> None:
    meter.check((form, *values))
    if _WIDTH.search(form):
        raise UserError("it would make too large a text")
