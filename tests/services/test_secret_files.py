"""A client's secret in a file, followed while it is replaced."""

import logging
from pathlib import Path

import pytest

from knnlm.errors import InvalidRequest
from knnlm.transport.security import LOOK_SECONDS, SecretFile


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_first_line_is_the_secret(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("\n# since May\n  hush \r\nother\n")
    secret = SecretFile(path)
    assert secret() == "hush"
    assert "hush" not in repr(secret)
    assert "hush" not in repr(secret._lines)


def test_a_new_secret_is_seen_at_the_next_look_and_not_before(tmp_path: Path) -> None:
    path, clock = tmp_path / "key", Clock()
    path.write_text("one")
    secret = SecretFile(path, clock=clock)
    path.write_text("two")
    clock.now += 0.9 * LOOK_SECONDS
    assert secret() == "one"
    clock.now += 0.2 * LOOK_SECONDS
    assert secret() == "two"


def test_the_last_secret_stays_while_the_file_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, clock = tmp_path / "key", Clock()
    path.write_text("hush")
    secret = SecretFile(path, clock=clock)

    def looked() -> str:
        clock.now += LOOK_SECONDS
        return secret()

    with caplog.at_level(logging.WARNING):
        path.unlink()
        assert [looked(), looked()] == ["hush", "hush"]
        path.write_text("")
        assert looked() == "hush"
        assert len(caplog.records) == 1
        assert str(path) in caplog.text
        path.write_text("two")
        assert looked() == "two"
        path.unlink()
        assert looked() == "two"
    assert len(caplog.records) == 2
    assert "hush" not in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"#\n", b"\xff", b"a\x00b"])
def test_a_file_without_a_secret_is_refused_at_first(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=str(path)):
        SecretFile(path)
