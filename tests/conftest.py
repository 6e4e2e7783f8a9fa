"""Async tests run in an event loop of their own. Property tests draw the same examples every time, so that what passed
passes again; `make test-all` explores. Files that take longest begin first, so that none is left over at the end."""

import asyncio
import gc
import inspect
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("fixed", max_examples=40, derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

LONGEST = (
    "test_readme",
    "cli/test_serve",
    "e2e/",
    "datastore/test_bounded",
    "services/test_processes",
    "no_secret_is",
    "experiments/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((i for i, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays until the end: no need to look through it, here and whenever a test makes garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(20_000)
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """The file system's own cache outlives a process that is killed, and no test takes power from the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def test_...` with asyncio.run; True tells pytest that the test was run."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in wanted}))
    return True
