"""The frame of the benchmarks: what a figure says, and that what is compared runs in turn."""

import json
import time
from pathlib import Path

import pytest

from benchmarks.harness import Latency, Rate, arguments, command, figure, interleave, latencies, machine, table


@pytest.mark.parametrize(
    ("value", "goal", "better", "holds"),
    [
        (3.0, 3.0, "more", True),
        (2.9, 3.0, "more", False),
        (1.0, 1.0, "less", True),
        (1.1, 1.0, "less", False),
        (5.0, None, "more", None),
        (float("nan"), 1.0, "more", False),
        (float("nan"), 1.0, "less", False),
    ],
)
def test_a_goal_holds_when_the_value_is_as_good(
    value: float, goal: float | None, better: str, holds: bool | None
) -> None:
    assert figure("x", value, goal, better=better)["holds"] is holds


def test_a_figure_is_one_line_of_json_with_its_origin(capsys: pytest.CaptureFixture[str]) -> None:
    said = figure("speed", 1 / 3, 0.5, size=7)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert json.loads(line) == said
    assert list(said)[:4] == ["figure", "value", "goal", "holds"]
    assert (said["value"], said["size"]) == (0.33333, 7)
    assert said["machine"] == machine()
    assert said["command"].startswith("python ")
    assert said["commit"]


def test_a_value_that_is_no_number_is_null() -> None:
    assert figure("x", float("inf"), 1.0)["value"] is None


def test_figure_refuses_a_direction_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="more or less"):
        figure("x", 1.0, 1.0, better="higher")


def test_programs_run_in_turn_and_every_other_round_backwards() -> None:
    order: list[str] = []

    def program(name: str) -> int:
        if order[-1:] != [name]:
            order.append(name)
        time.sleep(0.002)
        return 1

    rates = interleave({"a": lambda: program("a"), "b": lambda: program("b")}, seconds=0.01, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b"]  # a b untimed, then a b | b a | a b, neighbors alike folded
    assert [len(rates[name].rounds) for name in ("a", "b")] == [3, 3]


def test_the_units_of_a_call_count() -> None:
    def program(units: int) -> int:
        time.sleep(0.005)
        return units

    rates = interleave({"one": lambda: program(1), "hundred": lambda: program(100)}, seconds=0.02, rounds=3)
    assert rates["hundred"].over(rates["one"]) > 10


def test_a_program_runs_at_least_once_a_round_however_slow() -> None:
    calls = []

    def program() -> int:
        calls.append(1)
        time.sleep(0.01)
        return 1

    interleave({"a": program}, seconds=0.001, rounds=4)
    assert len(calls) == 1 + 4


def test_nothing_is_not_timed() -> None:
    with pytest.raises(ValueError, match="did nothing"):
        interleave({"idle": lambda: 0}, seconds=0.01, rounds=1)
    with pytest.raises(ValueError, match="seconds"):
        interleave({"a": lambda: 1}, seconds=0, rounds=1)
    with pytest.raises(ValueError, match="calls"):
        latencies({"a": lambda: 1}, calls=0)


def test_a_ratio_is_taken_within_rounds() -> None:
    """A machine that is ten times as slow in a round slows both."""
    assert Rate((10.0, 1.0, 20.0)).over(Rate((5.0, 0.5, 10.0))) == 2.0
    assert Rate((1.0, 3.0, 2.0)).median == 2.0
    assert Rate((1.0, 3.0, 2.0)).spread == 1.0


def test_latencies_are_of_single_calls() -> None:
    found = latencies({"a": lambda: None, "b": lambda: time.sleep(0.002)}, calls=20)
    assert [len(found[name].seconds) for name in ("a", "b")] == [20, 20]
    assert found["b"].p50 >= 0.002 > found["a"].p50
    assert Latency(tuple(float(i) for i in range(101))).p99 == 99.0
    assert Latency(tuple(float(i) for i in range(101))).p50 == 50.0


def test_arguments_have_a_size_texts_and_a_seed() -> None:
    parsed = arguments("doc").parse_args(["--text", "a", "b", "--text", "c", "--size", "7"])
    assert (parsed.size, parsed.text, parsed.seed) == (7, [Path("a"), Path("b"), Path("c")], 0)


def test_a_size_of_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments("doc").parse_args(["--size", "0"])
    assert "expected 1 or more" in capsys.readouterr().err


def test_a_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    table(["name", "q/s"], [["flat", "1"], ["ivf16,sq8", "1,000"]])
    assert capsys.readouterr().out == "name         q/s\nflat           1\nivf16,sq8  1,000\n"


def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--recipes", "flat ivf4,sq8"])
    assert command().endswith(" --recipes 'flat ivf4,sq8'")
