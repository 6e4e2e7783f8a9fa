"""Keys in files: read at start, followed while the service runs, and never a way to open it."""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from pydantic import SecretStr

from knnlm.errors import InvalidRequest, PermissionDenied, Unauthenticated
from knnlm.v1 import lm_pb2, lm_pb2_grpc
from services.runtime.context import RequestContext, entered
from services.runtime.http_server import StartupFailed
from services.runtime.lifecycle import Host, running, until_signal
from services.runtime.security import FileReloader, Keys, admin_only
from tests.services.echo import EchoCore, EchoSettings, echo_service
from tests.services.waiting import until


def written(path: Path, text: str) -> Path:
    """Replaced as a whole."""
    beside = path.with_suffix(".new")
    beside.write_text(text)
    beside.replace(path)
    return path


def settings(folder: Path, api: str | None, admin: str | None, host: str = "127.0.0.1") -> EchoSettings:
    files: Any = {
        name: None if text is None else written(folder / name, text)
        for name, text in (("api_keys_file", api), ("admin_api_keys_file", admin))
    }
    return EchoSettings(host=host, port=0, grpc_port=0, **files)


@pytest.mark.parametrize(
    ("api", "admin", "key", "expected"),
    [
        ("a\nb\n", None, None, "refused"),
        ("a\nb\n", None, "c", "refused"),
        ("a\nb\n", None, "b", "ordinary"),
        ("# of the lab\n\n  a  \r\n#b\n", None, "a", "ordinary"),
        ("# of the lab\n\n  a  \r\n#b\n", None, "#b", "refused"),
        (None, "z\n", None, "ordinary"),
        (None, "z\n", "z", "admin"),
        ("a", "z", "a", "ordinary"),
        ("a", "z", "z", "admin"),
        ("a", "z", None, "refused"),
    ],
)
def test_keys_of_a_file_count_as_those_of_the_settings(
    api: str | None, admin: str | None, key: str | None, expected: str, tmp_path: Path
) -> None:
    assert answered(Keys(settings(tmp_path, api, admin)), key) == expected


def answered(keys: Keys, key: str | None) -> str:
    try:
        return "admin" if keys.admits(None if key is None else f"Bearer {key}") else "ordinary"
    except Unauthenticated:
        return "refused"


def test_both_places_count(tmp_path: Path) -> None:
    keys = Keys(EchoSettings(api_keys=(SecretStr("a"),), api_keys_file=written(tmp_path / "keys", "b")))
    assert [answered(keys, key) for key in ("a", "b", "c")] == ["ordinary", "ordinary", "refused"]


def test_a_file_with_admin_keys_alone_makes_admin_calls_need_them(tmp_path: Path) -> None:
    call = RequestContext("id", "http", 0.0, admin=Keys(settings(tmp_path, None, "z")).admits(None))
    with entered(call), pytest.raises(PermissionDenied):
        asyncio.run(admin_only())


@pytest.mark.parametrize("name", ["api_keys_file", "admin_api_keys_file"])
@pytest.mark.parametrize("content", [None, "", "# nothing but words\n\n", "one\x07key", "schlüssel", "a" * (2 << 20)])
def test_a_file_that_holds_no_keys_stops_the_start_and_is_named_with_its_setting(
    name: str, content: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    core = EchoCore()
    given: Any = {name: path, "port": 0, "grpc_port": 0}
    with pytest.raises(StartupFailed) as failed:
        asyncio.run(until_signal(echo_service(core, EchoSettings(**given))))
    flag = name.replace("_", "-")
    assert str(failed.value).startswith(f"--{flag} (environment: KNNLM_ECHO_{name.upper()}): ")
    assert str(path) in str(failed.value)
    assert not content or content not in str(failed.value)
    assert core.happened == ["close"]


def test_an_empty_variable_is_no_file() -> None:
    assert EchoSettings.model_validate({"api_keys_file": ""}).api_keys_file is None


def plain(folder: Path) -> tuple[Path, Callable[[str], None]]:
    def write(text: str) -> None:
        written(folder / "keys", text)

    return folder / "keys", write


def kubernetes(folder: Path) -> tuple[Path, Callable[[str], None]]:
    """As a mounted Secret is updated: keys -> ..data/keys, ..data -> ..<time>, and ..data is what is replaced."""
    (folder / "keys").symlink_to(Path("..data") / "keys")

    def write(text: str) -> None:
        number = len(list(folder.iterdir()))
        version = folder / f"..{number}"
        version.mkdir()
        (version / "keys").write_text(text)
        (folder / "..next").symlink_to(version.name)
        os.replace(folder / "..next", folder / "..data")

    return folder / "keys", write


@pytest.mark.parametrize("layout", [plain, kubernetes])
def test_keys_change_while_the_service_runs_on_both_faces(
    layout: Callable[[Path], tuple[Path, Callable[[str], None]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, write = layout(tmp_path)
    write("old")

    async def check() -> None:
        given = EchoSettings(port=0, grpc_port=0, api_keys_file=path)
        async with (
            running(echo_service(EchoCore(), given)) as host,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{host.port}") as client,
            grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}") as channel,
        ):
            stub = lm_pb2_grpc.LanguageModelStub(channel)

            async def admitted(key: str) -> tuple[bool, bool]:
                over_http = await client.get("/version", headers={"authorization": f"Bearer {key}"})
                call = stub.GetModel(lm_pb2.GetModelRequest(), metadata=(("authorization", f"Bearer {key}"),))
                code = await call.code()
                assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED)
                return over_http.status_code == 200, code == grpc.StatusCode.OK

            def all_admit(key: str) -> Callable[[], Awaitable[bool]]:
                async def look() -> bool:
                    return await admitted(key) == (True, True)

                return look

            assert await admitted("old") == (True, True)
            assert await admitted("new") == (False, False)
            write("old\nnew")
            await until(all_admit("new"))
            assert await admitted("old") == (True, True)
            write("new")  # as long as the former file, and perhaps of the same second

            async def old_is_refused() -> bool:
                return await admitted("old") == (False, False)

            await until(old_is_refused)
            assert await admitted("new") == (True, True)

    with caplog.at_level(logging.INFO):
        asyncio.run(check())
    changes = [record for record in caplog.records if record.getMessage() == "keys_changed"]
    assert [record.knnlm_fields for record in changes] == [  # type: ignore[attr-defined]  # as logs.event puts them
        {"api_keys": 2, "admin_api_keys": 0},
        {"api_keys": 1, "admin_api_keys": 0},
    ]


@pytest.mark.parametrize("broken", [None, "", "# all gone\n"])
def test_a_file_that_can_no_longer_be_read_leaves_the_keys_as_they_were(broken: str | None, tmp_path: Path) -> None:
    keys = Keys(settings(tmp_path, "a", "z"))
    for name in ("api_keys_file", "admin_api_keys_file"):
        if broken is None:
            (tmp_path / name).unlink()
        else:
            written(tmp_path / name, broken)
    with pytest.raises(InvalidRequest, match=r"--api-keys-file.*--admin-api-keys-file"):
        keys.refresh()
    assert [answered(keys, key) for key in ("a", "z", None)] == ["ordinary", "admin", "refused"]
    written(tmp_path / "api_keys_file", "b")
    with pytest.raises(InvalidRequest, match=r"^--admin-api-keys-file"):
        keys.refresh()
    assert [answered(keys, key) for key in ("a", "b", "z", None)] == ["refused", "ordinary", "admin", "refused"]


def test_what_cannot_be_read_again_is_logged_once_until_it_can(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keys(settings(tmp_path, "a", None))
    path = tmp_path / "api_keys_file"
    looks = 0

    class Counted:
        name = "keys"

        def refresh(self) -> None:
            nonlocal looks
            looks += 1
            keys.refresh()

    async def looked(times: int) -> None:
        seen = looks

        async def enough() -> bool:
            return looks >= seen + times

        await until(enough)

    async def check() -> None:
        renewal = FileReloader([Counted()], seconds=0.001)
        renewal.start()
        path.unlink()
        await looked(3)
        written(path, "a")
        await looked(3)
        path.unlink()
        await looked(3)
        await renewal.close()
        assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    with caplog.at_level(logging.INFO):
        asyncio.run(check())
    assert [record.getMessage() for record in caplog.records] == ["keys_kept", "keys_kept"]


def test_a_renewal_outlives_what_nobody_foresaw(caplog: pytest.LogCaptureFixture) -> None:
    looks = 0

    class Broken:
        name = "keys"

        def refresh(self) -> None:
            nonlocal looks
            looks += 1
            raise ZeroDivisionError

    async def check() -> None:
        renewal = FileReloader([Broken()], seconds=0.001)
        renewal.start()

        async def twice() -> bool:
            return looks > 1

        await until(twice)
        await renewal.close()

    asyncio.run(check())
    assert {record.getMessage() for record in caplog.records} == {"keys_failed"}


async def test_nothing_is_followed_where_no_file_is_named() -> None:
    before = asyncio.all_tasks()
    host = Host(echo_service(EchoCore(), EchoSettings(port=0, grpc_port=0, api_keys=(SecretStr("a"),))))
    await host.listen()
    assert not [t for t in asyncio.all_tasks() - before if "FileReloader" in str(t.get_coro())]
    await host.shut()
