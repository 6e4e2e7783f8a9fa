"""docs/cli.md tells every command and option in the words of --help, and nothing that is not there."""

import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from knnlm.cli.main import app

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")


def commands() -> list[tuple[str, Any]]:  # Any: typer's own classes, which it does not export
    """("knnlm domains list", command) for every command that does something."""
    found = []
    for name, command in get_command(app).commands.items():  # type: ignore[attr-defined]  # a group
        if hasattr(command, "commands"):
            found += [(f"knnlm {name} {inner}", c) for inner, c in command.commands.items()]
        else:
            found.append((f"knnlm {name}", command))
    return found


def section(name: str) -> str:
    found = re.search(rf"^#+ {name}\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, f"docs/cli.md has no heading for `{name}`"
    return found[1]


def parameters(command: Any) -> list[Any]:  # Any: as above
    return [p for p in command.params if p.name != "help"]


def flags(parameter: Any) -> list[str]:  # Any: as above
    """How the docs write it: `--activate`, `--no-activate`; `DOMAIN` for an argument."""
    names = [*parameter.opts, *parameter.secondary_opts]
    return names if names[0].startswith("--") else [parameter.name.upper()]


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_every_command_is_documented_with_all_it_takes(name: str, command: Any) -> None:
    text = section(name)
    assert command.help.split("\n")[0] in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    for parameter in parameters(command):
        mine = [row for row in rows if all(f"`{flag}`" in row.split("|")[1] for flag in flags(parameter))]
        assert mine, f"{name}: {flags(parameter)} is not in docs/cli.md"
        assert parameter.help in mine[0], f"{name}: docs/cli.md describes {flags(parameter)} differently from --help"
        if parameter.envvar:
            assert f"`{parameter.envvar}`" in mine[0]


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_no_option_is_documented_that_does_not_exist(name: str, command: Any) -> None:
    known = {flag for parameter in parameters(command) for flag in flags(parameter)}
    for row in section(name).splitlines():
        if row.startswith("| `"):
            assert set(re.findall(r"`([^`]+)`", row.split("|")[1])) <= known


def test_every_documented_command_exists() -> None:
    documented = set(re.findall(r"^#+ (knnlm [a-z ]+)$", PAGE, flags=re.MULTILINE))
    assert documented == {name for name, _ in commands()}


def test_every_help_text_is_given() -> None:
    for name, command in commands():
        for parameter in parameters(command):
            assert parameter.help, f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("code", ["0", "1", "2", "130"])
def test_exit_codes_are_documented(code: str) -> None:
    assert re.search(rf"^\| {code} \|", PAGE, flags=re.MULTILINE)
