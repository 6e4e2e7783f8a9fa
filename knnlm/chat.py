"""A chat model's template: messages to the text of a prompt.

Templates are Jinja, rendered as transformers renders them (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson`). A template is a program that comes with a model, and is given what users
wrote: it runs in Jinja's immutable sandbox, without the functions that make much of little, and within a budget. Every
turn of a loop, every call of a macro and every character that is made costs some of it, and each looks at the clock.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from knnlm.errors import InvalidRequest, TooLarge

MAX_WORK = 1 << 26  # characters made, with STEP_WORK for each turn of a loop
MAX_SECONDS = 5.0
STEP_WORK = 64
MAX_INTEGER_BITS = 256
NO_FILTERS = frozenset(("center", "batch", "slice", "wordwrap", "format", "random", "pprint", "xmlattr", "urlize"))
NO_METHODS = frozenset(
    ("format", "format_map", "center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans", "to_bytes")
)
PARAM = "messages"

Json = Mapping[str, Any]  # Any: JSON


class ChatTemplate:
    """bos_token, eos_token: what the template may write; "" where the model has none. Raises InvalidRequest for a
    template that is none."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        work = _WORK.set(_Work(MAX_WORK, MAX_SECONDS))  # what is constant is computed here
        try:
            self._template = _Environment().from_string(source)
        except Exception as err:  # a template is a foreign program: whatever it raises is about it
            raise _unusable(err) from err
        finally:
            _WORK.reset(work)

    def render(self, messages: Sequence[Json], *, max_characters: int, seconds: float = MAX_SECONDS) -> str:
        """The prompt that the messages make, with the beginning of the assistant's answer. Blocks for some `seconds`.

        Raises InvalidRequest for messages that the template refuses, TooLarge for a prompt of more characters.
        """
        before = _WORK.set(_Work(MAX_WORK, seconds))
        parts: list[str] = []
        size = 0
        try:
            given = [dict(message) for message in messages]
            for part in self._template.generate(messages=given, add_generation_prompt=True, **self._tokens):
                parts.append(part)
                size += len(part)
                if size > max_characters:
                    break
        except _Refused as err:
            raise InvalidRequest(f"the model's chat template refuses the messages: {err!s:.300}", param=PARAM) from err
        except Exception as err:  # a template is a foreign program: whatever it raises is about it
            raise _unusable(err) from err
        finally:
            _WORK.reset(before)
        if size > max_characters:
            raise TooLarge(
                f"{PARAM} make a prompt of more than {max_characters} characters (--max-text-bytes)", param=PARAM
            )
        return "".join(parts)


class _Refused(Exception):
    """What a template raises by `raise_exception`."""


class _Exhausted(Exception):
    """The budget is spent."""


class _Work:
    """The budget of one rendering."""

    def __init__(self, most: int, seconds: float) -> None:
        self._left = most
        self._until = time.monotonic() + seconds

    def spend(self, work: int) -> None:
        self._left -= work
        if self._left < 0:
            raise _Exhausted("the chat template makes too much of these messages")
        if time.monotonic() > self._until:
            raise _Exhausted("the chat template takes too long with these messages")

    def check(self, value: object) -> None:
        """Raises _Exhausted for a value that would be too long as a text; nothing is spent."""
        self._check(value, self._left)

    def _check(self, value: object, left: int) -> int:
        if isinstance(value, str):
            left -= len(value)
        elif isinstance(value, Mapping):
            for key, inner in value.items():
                left = self._check(inner, self._check(key, left))
        elif isinstance(value, list | tuple | set):
            for inner in value:
                left = self._check(inner, left)
        else:
            left -= 8
        if left < 0:
            raise _Exhausted("the chat template makes too much of these messages")
        return left - 1


_WORK: ContextVar[_Work] = ContextVar("work")


def _spent(value: Any) -> Any:  # Any: whatever a template makes, here and below
    _WORK.get().spend(len(value) if isinstance(value, str | list | tuple | dict) else 1)
    return value


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        work = _WORK.get()
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | list | tuple | dict):
                work.check(value)
        return _spent(function(*args, **kwargs))

    return guarded


def _replace(text: str, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _WORK.get().spend((text.count(old) if count < 0 else count) * len(new))
    return text.replace(old, new, count)


def _join(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = (
        list(value) if attribute is None else list(map(jinja2.filters.make_attrgetter(environment, attribute), value))
    )
    work = _WORK.get()
    work.check(items)
    work.spend(len(items) * len(str(d)))
    return str(d).join(map(str, items))


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    lines = str(text).splitlines()
    pad = width if isinstance(width, str) else " " * min(width, 64)
    _WORK.get().spend(len(lines) * len(pad))
    return "\n".join(pad + line if (i or first) and (line or blank) else line for i, line in enumerate(lines))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, not for HTML."""
    indent = None if indent is None else min(indent, 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _concat(values: Sequence[object]) -> str:
    _WORK.get().check(values)
    return "".join(map(str, values))


@jinja2.pass_context  # so that it is not taken for a constant
def _step(context: Context, work: int) -> str:  # noqa: ARG001  Jinja's
    _WORK.get().spend(work)
    return ""


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    if len(form) > 64:
        raise _Exhausted("the format of a date has more than 64 characters")
    return datetime.now().strftime(form)  # local time, as in transformers


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which trainers mark what the assistant wrote: shown as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja2's

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Environment(ImmutableSandboxedEnvironment):
    """One per template."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            finalize=self._finalized,
        )
        self.filters = {name: _guarded(f) for name, f in self.filters.items() if name not in NO_FILTERS} | {
            "replace": _guarded(_replace),
            "join": _guarded(jinja2.pass_environment(_join)),
            "indent": _guarded(_indent),
            "tojson": _guarded(_tojson),
            "_concat": _guarded(_concat),
            "_step": _step,
        }
        for name in ("lipsum", "cycler", "joiner"):
            del self.globals[name]
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        loops: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
            *tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)
        ]  # fmt: skip
        for node in loops:
            work = STEP_WORK + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            step = nodes.Filter(nodes.Const(work), "_step", [], [], None, None, lineno=node.lineno)
            node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return _Concatenated().visit(tree).set_environment(self)  # type: ignore[no-any-return]  # it visits anything

    @staticmethod
    def _finalized(value: Any) -> Any:
        work = _WORK.get()
        work.check(value)
        work.spend(len(value) if isinstance(value, str) else 1)
        return value

    def wrap_str_format(self, value: Any) -> None:
        """`str.format` is no safe attribute here, wrapped or not."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in NO_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        work = _WORK.get()
        if operator == "%" and isinstance(left, str):
            raise _Exhausted("% formats no text here")
        if operator in ("*", "**"):
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    work.spend(len(one) * max(0, other))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            work.spend(MAX_WORK * (left.bit_length() * abs(right) > MAX_INTEGER_BITS))
        made = super().call_binop(context, operator, left, right)
        if isinstance(made, int) and made.bit_length() > MAX_INTEGER_BITS:
            raise _Exhausted("a number of the chat template has too many digits")
        return _spent(made)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as Jinja has it
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str) and __obj.__name__ in ("replace", "join"):
            if __obj.__name__ == "replace":
                return _spent(_replace(owner, *args, **kwargs))
            return _spent(_join(__self, args[0], owner))
        _WORK.get().check((args, kwargs))
        return _spent(super().call(__context, __obj, *args, **kwargs))


class _Concatenated(NodeTransformer):
    """`a ~ b` as a filter, which sees what it makes."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  Jinja's
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "_concat", [], [], None, None, lineno=node.lineno)


def _unusable(err: Exception) -> InvalidRequest:
    said = f"{type(err).__name__}: {err}" if not isinstance(err, _Exhausted) else str(err)
    return InvalidRequest(f"the model's chat template cannot be used with these messages: {said:.300}", param=PARAM)
