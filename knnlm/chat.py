"""A chat model's template: messages to the text of a prompt.

Templates are Jinja, rendered as transformers renders them (trim_blocks, lstrip_blocks, loop controls,
`raise_exception`, `strftime_now`, `tojson`). A template is a program that comes with a model, and is given what users
wrote. Jinja's immutable sandbox keeps it from files and modules, and from changing what it is given; nothing inside an
interpreter keeps it from taking all time and memory. Whoever serves others therefore runs this module as a process of
its own (`main`), which the system ends when it takes more than it may.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from knnlm.errors import InvalidRequest, TooLarge

PARAM = "messages"

Json = Mapping[str, Any]  # Any: JSON


class ChatTemplate:
    """bos_token, eos_token: what the template may write; "" where the model has none. Raises InvalidRequest for a
    template that is none."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except MemoryError:
            raise
        except Exception as err:  # a template is a foreign program: whatever it raises is about it
            raise InvalidRequest(f"the model's chat template cannot be used: {_said(err)}", param=PARAM) from err

    def render(self, messages: Sequence[Json], *, max_characters: int) -> str:
        """The prompt that the messages make, with the beginning of the assistant's answer.

        It takes whatever time the template takes. Raises InvalidRequest for messages that the template refuses or fails
        with, TooLarge for a prompt of more characters, MemoryError.
        """
        parts: list[str] = []
        size = 0
        try:
            given = [dict(message) for message in messages]
            for part in self._template.generate(messages=given, add_generation_prompt=True, **self._tokens):
                part.encode()
                parts.append(part)
                size += len(part)
                if size > max_characters:
                    break
        except _Refused as err:
            raise InvalidRequest(f"the model's chat template refuses the messages: {_text(err)}", param=PARAM) from err
        except MemoryError:
            raise
        except Exception as err:  # a template is a foreign program: whatever it raises is about it
            raise InvalidRequest(
                f"the model's chat template cannot be used with these messages: {_said(err)}", param=PARAM
            ) from err
        if size > max_characters:
            raise TooLarge(
                f"{PARAM} make a prompt of more than {max_characters} characters (--max-text-bytes)", param=PARAM
            )
        return "".join(parts)


class _Refused(Exception):
    """What a template raises by `raise_exception`."""


def _text(err: Exception) -> str:
    return f"{err!s:.300}".encode(errors="replace").decode()


def _said(err: Exception) -> str:
    return f"{type(err).__name__}: {_text(err)}"


def _tojson(
    value: Any,  # Any: whatever a template makes
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, not for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise _Refused(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)  # local time, as in transformers


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which trainers mark what the assistant wrote: shown as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja2's

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
    return environment


def main() -> None:
    """Render for the process at the other end of the pipes, until it is gone.

    A line of JSON comes in, one goes out. The first names the template, its tokens and the bounds: `source`,
    `bos_token`, `eos_token`, `max_characters`, `seconds`, `bytes`; every other one is a list of messages. An answer is
    {"text"}, empty for the template, or {"invalid"} or {"too_large"} with what is wrong. The system ends this process
    when it works on one line for longer than `seconds`, whatever it computes; it ends itself where `bytes` of memory
    are not enough.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    lines = sys.stdin.buffer
    given = json.loads(lines.readline())
    _limit(resource.RLIMIT_AS, given["bytes"])
    _limit(resource.RLIMIT_CORE, 0)
    template: ChatTemplate | None = None

    def compiled() -> str:
        nonlocal template
        template = ChatTemplate(given["source"], bos_token=given["bos_token"], eos_token=given["eos_token"])
        return ""

    try:
        _answer(compiled, given["seconds"])
        while template is not None and (line := lines.readline()):
            render = partial(template.render, max_characters=given["max_characters"])
            _answer(lambda: render(json.loads(line)), given["seconds"])  # noqa: B023  called at once
    except MemoryError:
        os._exit(1)


def _answer(make: Callable[[], str], seconds: float) -> None:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        answer = {"text": make()}
    except TooLarge as err:
        answer = {"too_large": err.message}
    except InvalidRequest as err:
        answer = {"invalid": err.message}
    line = json.dumps(answer).encode() + b"\n"
    signal.setitimer(signal.ITIMER_REAL, 0)  # the reader may take its time
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


def _limit(what: int, most: int) -> None:
    hard = resource.getrlimit(what)[1]
    with suppress(ValueError, OSError):  # macOS does not know every limit
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    main()
