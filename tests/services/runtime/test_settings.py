from pathlib import Path

import pytest
from pydantic import SecretStr

from services.datastore.settings import DatastoreSettings
from services.lm.settings import LmSettings
from services.runtime.settings import HttpSettings, described, load_settings, unknown_variables
from tests.services.echo import EchoSettings


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(EchoSettings, [], prog="echo").size == 3
    monkeypatch.setenv("KNNLM_ECHO_SIZE", "5")
    assert load_settings(EchoSettings, [], prog="echo").size == 5
    assert load_settings(EchoSettings, ["--size", "7"], prog="echo").size == 7


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNNLM_ECHO_API_KEYS", "one, two,")
    settings = load_settings(EchoSettings, ["--admin-api-keys", "three"], prog="echo")
    assert [key.get_secret_value() for key in settings.api_keys] == ["one", "two"]
    assert [key.get_secret_value() for key in settings.admin_api_keys] == ["three"]


def complaint(argv: list[str], capsys: pytest.CaptureFixture[str], cls: type[HttpSettings] = EchoSettings) -> str:
    with pytest.raises(SystemExit) as ended:
        load_settings(cls, argv, prog="prog")
    assert ended.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    return out.err


def test_a_bad_flag_stops_with_one_line_that_names_it_its_variable_and_its_value(
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = complaint(["--size", "many"], capsys)
    assert message.count("\n") == 1
    for part in ("--size", "KNNLM_ECHO_SIZE", "'many'", "integer", "flag"):
        assert part in message


def test_a_bad_variable_stops_as_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KNNLM_ECHO_SIZE", "0")
    message = complaint([], capsys)
    for part in ("--size", "KNNLM_ECHO_SIZE", "'0'", "greater than or equal to 1", "environment"):
        assert part in message


def test_a_missing_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint([], capsys, LmSettings)
    assert "--model (environment: KNNLM_LM_MODEL) must be given" in message


def test_an_unknown_flag_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--sise" in complaint(["--sise", "3"], capsys)


def test_secrets_are_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    settings = EchoSettings(api_keys=(SecretStr("hidden"),), secret=SecretStr("hidden"))
    assert "hidden" not in repr(settings) + str(described(settings))
    assert described(settings)["api_keys"] == "set"
    assert described(EchoSettings())["secret"] == "none"


@pytest.mark.parametrize("cls", [EchoSettings, LmSettings, DatastoreSettings])
def test_help_lists_every_setting_with_its_variable(
    cls: type[HttpSettings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        load_settings(cls, ["--help"], prog="prog")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for name, field in cls.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert f"[env {cls.model_config.get('env_prefix', '')}{name.upper()}]" in text
        assert field.description, f"{name} has no description"
        assert field.description in text


def test_a_check_across_settings_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    message = complaint(["--store", "x", "--max-queries", "9", "--max-queue-queries", "5"], capsys, DatastoreSettings)
    assert message == "prog: bad settings: max_queries must be at most max_queue_queries, got 9 and 5\n"


def test_misspelt_variables_are_found() -> None:
    environ = {"KNNLM_ECHO_SISE": "3", "KNNLM_ECHO_SIZE": "3", "KNNLM_LM_MODEL": "x"}
    assert unknown_variables(EchoSettings, environ) == ["KNNLM_ECHO_SISE"]


def test_settings_cannot_be_changed() -> None:
    settings = DatastoreSettings(store=Path("x"))
    with pytest.raises(ValueError, match="frozen"):
        settings.max_k = 3  # type: ignore[misc]


def test_a_replica_on_a_cluster_has_the_one_gpu_that_it_is_given() -> None:
    with pytest.raises(ValueError, match="device must be cpu or cuda where a cluster searches, got cuda:1"):
        DatastoreSettings(store=Path("x"), cluster="auto", device="cuda:1")
    assert DatastoreSettings(store=Path("x"), cluster="auto", device="cuda").device == "cuda"
