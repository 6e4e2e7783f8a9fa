"""Chat templates in a process of their own: what takes too much ends it, and nothing else."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable
from services.aggregator.completions.templates import TemplateProcess
from tests.services.waiting import until

MESSAGES = [{"role": "user", "content": "Is it a bird?"}]
ECHO = "{{ bos_token }}{{ messages[0].content }}"
SPIN = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ON_DEMAND = "{% if messages[0].content == 'spin' %}" + SPIN + "{% endif %}" + ECHO
DOUBLED = (
    "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}{% set a.y = [a.y, a.y] %}"
)


@asynccontextmanager
async def started(source: str, **bounds: Any) -> AsyncIterator[TemplateProcess]:
    template = TemplateProcess(source, bos_token="<s>", **{"max_characters": 10_000, "seconds": 0.5, **bounds})
    await template.start()
    try:
        yield template
    finally:
        await template.close()


def said(content: str) -> list[Mapping[str, str]]:
    return [{"role": "user", "content": content}]


async def test_it_renders_as_the_template_does() -> None:
    async with started(ECHO) as template:
        assert template.problem is None
        assert await template.render(MESSAGES, 60) == "<s>Is it a bird?"
        assert await template.render(said('"\n\u2028é\U0001f600'), 60) == '<s>"\n\u2028é\U0001f600'
        with pytest.raises(TooLarge, match="more than 10000 characters") as raised:
            await template.render(said("a" * 100_000), 60)
        assert raised.value.param == "messages"
    async with started("{{ raise_exception('no birds') }}") as template:
        with pytest.raises(InvalidRequest, match="refuses the messages: no birds"):
            await template.render(MESSAGES, 60)


@pytest.mark.parametrize(
    "source",
    [
        SPIN,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'a' * 10**10 }}",
        "{% set ns = namespace(a='a') %}{% for i in range(64) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
        "{{ messages | length | round(-99999999) }}",  # from here on one call is all it does, for minutes
        DOUBLED + "{% endfor %}{{ a.x == a.y }}",
        DOUBLED + "{% endfor %}{{ a.x in [a.y] }}",
        DOUBLED + "{% endfor %}{{ [a.x, a.y] | sort | length }}",
        "{% set o = namespace(x='a') %}{% for i in range(60) %}{% set o.x = namespace(a=o.x, b=o.x) %}{% endfor %}"
        "{{ o }}",
        "{% set s = 'a' * 10**6 %}{% for i in range(99999) %}{% if 'a' * 10**5 + 'b' in s %}{% endif %}{% endfor %}",
    ],
)
async def test_what_takes_too_long_or_too_much_is_stopped(source: str) -> None:
    async with started(source) as template:
        with pytest.raises(InvalidRequest, match=r"takes more than 0\.5 seconds or 512 MiB of memory") as raised:
            await template.render(MESSAGES, 60)
        assert raised.value.param == "messages"


async def test_the_next_rendering_gets_a_new_process() -> None:
    async with started(ON_DEMAND) as template:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match="takes more than"):
                await template.render(said("spin"), 60)
            assert await template.render(said("bird"), 60) == "<s>bird"


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | round(-99999999) }}", "{% set x = 1 %}" * 100_000])
async def test_a_template_that_cannot_be_compiled_is_a_problem_from_the_start(
    source: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(source) as template:
        assert [record.message for record in caplog.records] == ["chat_template_unusable"]
        assert template.problem is not None
        assert template._process is None
        for _ in range(2):
            with pytest.raises(InvalidRequest) as raised:
                await template.render(MESSAGES, 60)
            assert raised.value.message == template.problem.message


async def test_who_waits_behind_a_slow_rendering_waits_no_longer_than_asked() -> None:
    async with started(ON_DEMAND, seconds=1.5) as template:
        slow = asyncio.create_task(template.render(said("spin"), 60))
        await asyncio.sleep(0)
        for _ in range(3):
            with pytest.raises(DeadlineExceeded):
                await template.render(said("bird"), 0.05)
        left = asyncio.create_task(template.render(said("spin"), 60))  # leaves before its turn
        await asyncio.sleep(0)
        left.cancel()
        third = asyncio.create_task(template.render(said("bird"), 60))
        with pytest.raises(InvalidRequest):
            await slow
        assert await third == "<s>bird"


async def test_closing_ends_it_in_the_middle_of_a_rendering() -> None:
    template = TemplateProcess(ON_DEMAND, max_characters=100, seconds=60)
    await template.start()
    process = template._process
    assert process is not None
    under_way = [asyncio.create_task(template.render(said("spin"), 60)) for _ in range(2)]
    await asyncio.sleep(0.1)
    await template.close()
    for rendering in under_way:
        with pytest.raises(Unavailable):
            await rendering
    with pytest.raises(Unavailable):
        await template.render(MESSAGES, 60)
    assert process.returncode == -signal.SIGKILL
    await template.close()


async def test_it_ends_with_the_process_that_started_it() -> None:
    """Also one that renders, and whose own end nobody closed."""
    for content, seconds in (("bird", 60), ("spin", 2)):
        script = (
            "import asyncio, os\n"
            "from services.aggregator.completions.templates import TemplateProcess\n"
            "async def main():\n"
            f"    template = TemplateProcess({ON_DEMAND!r}, max_characters=100, seconds={seconds})\n"
            "    await template.start()\n"
            "    print(template._process.pid, flush=True)\n"
            f"    task = asyncio.create_task(template.render([{{'role': 'user', 'content': {content!r}}}], 60))\n"
            "    await asyncio.sleep(0.3)\n"
            "    os.kill(os.getpid(), 9)\n"
            "asyncio.run(main())\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        run = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert run.returncode == -signal.SIGKILL
        pid = int(run.stdout)
        await until(partial(ended, pid))


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"  # waited for by nobody
    except FileNotFoundError:
        return True


async def test_a_process_that_was_ended_between_renderings_fails_nobody() -> None:
    async with started(ECHO) as template:
        process = template._process
        assert process is not None
        process.kill()
        await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert await template.render(MESSAGES, 5) == "<s>Is it a bird?"


async def test_it_knows_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_SECRET", "x")
    async with started(ECHO) as template:
        process = template._process
        assert process is not None
        known = await asyncio.to_thread(Path(f"/proc/{process.pid}/environ").read_text)
        assert "PYTHONPATH" in known
        assert "KNNLM_SECRET" not in known
