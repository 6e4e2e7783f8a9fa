"""The model's chat template in a process of its own, which ends when a rendering takes too much."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from knnlm.chat import PARAM
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable
from services.runtime.observability import event

LOG = logging.getLogger(__name__)
MAX_SECONDS = 5.0  # of one rendering
MAX_MEMORY_BYTES = 1 << 29
KEPT_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "PYTHONHOME")  # and no keys


class TemplateProcess:
    """Renders messages one after the other. Make it with `start`, end it with `close`.

    max_characters: of a prompt. problem: why no messages can be rendered, None where they can.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        max_characters: int,
        seconds: float = MAX_SECONDS,
        memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self._begin = {
            "source": source, "bos_token": bos_token, "eos_token": eos_token,
            "max_characters": max_characters, "seconds": seconds, "bytes": memory_bytes,
        }  # fmt: skip
        self._too_much = (
            f"the model's chat template takes more than {seconds:g} seconds or {memory_bytes >> 20} MiB of memory"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "chat-template")  # of its own, so that nothing but renderings waits for it
        self.problem: InvalidRequest | None = None

    async def start(self) -> None:
        """Start the process and compile the template; one that cannot be used is logged, and each rendering raises why.
        Raises Unavailable where no process can be started."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._started)
        except InvalidRequest as err:
            self.problem = err
            event(LOG, "chat_template_unusable", logging.WARNING, reason=err.message)
            await self.close()
        except BaseException:
            await self.close()
            raise

    async def render(self, messages: Sequence[Mapping[str, str]], seconds: float) -> str:
        """The prompt that the messages make. Waits for at most some `seconds`.

        Raises InvalidRequest for messages that the template refuses, fails with or takes too long for, TooLarge for a
        prompt of more characters, DeadlineExceeded, Unavailable after `close`.
        """
        if self.problem is not None:
            raise InvalidRequest(self.problem.message, param=self.problem.param)
        self._check_open()
        until = time.monotonic() + seconds
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.get_running_loop().run_in_executor(self._thread, self._rendered, messages, until)
        except TimeoutError as err:
            raise _late() from err

    async def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()  # the thread, if it waits for an answer, reads the end of the pipe
        await asyncio.to_thread(self._thread.shutdown)
        await asyncio.to_thread(self._end)

    def _rendered(self, messages: Sequence[Mapping[str, str]], until: float) -> str:
        self._check_open()
        if time.monotonic() > until:
            raise _late()
        return self._asked(self._started(), messages)

    def _started(self) -> "subprocess.Popen[bytes]":
        """The process, a new one where the last has ended, with the template compiled."""
        if self._process is not None and self._process.poll() is not None:  # somebody ended it between two renderings
            self._end()
        if self._process is None:
            kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "knnlm.chat"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**kept, "PYTHONPATH": os.pathsep.join(sys.path)},
                    start_new_session=True,  # what a terminal interrupts is the service, which closes this
                )
            except OSError as err:
                raise Unavailable(f"no process for the model's chat template could be started: {err}") from err
            self._asked(self._process, self._begin)
        return self._process

    def _asked(self, process: "subprocess.Popen[bytes]", line: Any) -> str:  # Any: JSON
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("a process without pipes")
        try:
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
            said = process.stdout.readline()
        except BrokenPipeError:
            said = b""
        if not said.endswith(b"\n"):
            self._end()
            self._check_open()
            raise InvalidRequest(self._too_much, param=PARAM)
        ((kind, text),) = json.loads(said).items()
        if kind != "text":
            raise (TooLarge if kind == "too_large" else InvalidRequest)(text, param=PARAM)
        return str(text)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(BrokenPipeError), process:  # closes the pipes and waits
                pass

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the model is no longer served")


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the request's time was over before its messages were rendered")
