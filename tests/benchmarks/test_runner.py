"""`make bench` and the table of results: every figure is collected, and a program that fails is not passed over."""

import json
import sys

import pytest

from benchmarks import __main__ as runner
from benchmarks.results import markdown

FIGURE = '{"figure": "speed", "value": 1.0, "goal": 2.0, "holds": false}'


def call(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_lines_of_all_programs_are_collected_and_the_rest_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    calls = {"a": call(f"print('a table'); print('''{FIGURE}''')"), "b": call(f"print('''{FIGURE}'''); print('{{}}')")}
    lines, failed = runner.run_all(calls, [])
    assert (lines, failed) == ([FIGURE, FIGURE], [])
    assert "a table" in capfd.readouterr().out


def test_a_program_that_crashes_is_named_and_the_next_one_runs() -> None:
    calls = {"bad": call("raise SystemExit(3)"), "good": call(f"print('''{FIGURE}''')")}
    assert runner.run_all(calls, []) == ([FIGURE], ["bad"])


def test_a_program_that_ends_without_a_figure_has_failed() -> None:
    assert runner.run_all({"silent": call("print('done')")}, []) == ([], ["silent"])


def test_options_reach_the_programs() -> None:
    code = "import json, sys; print(json.dumps(dict(figure=sys.argv[1], value=1, goal=None, holds=None)))"
    lines, _ = runner.run_all({"a": call(code)}, ["--size"])
    assert json.loads(lines[0])["figure"] == "--size"


@pytest.mark.parametrize("line", ["", "figure", "{", '{"figure": 1}', "[1]"])
def test_other_lines_are_no_figures(line: str) -> None:
    assert not runner.is_figure(line)


def test_modules_without_a_main_are_no_programs() -> None:
    assert not {"harness", "data", "results", "__main__", "__init__"} & set(runner.programs())


def test_an_unknown_program_is_refused_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match="no benchmark 'speeed'"):
        runner.main(["speeed", "--size", "10"])


def row(**fields: object) -> dict[str, object]:
    return {"figure": "x", "value": 1.5, "goal": 1.0, "holds": True, "size": 1000, "command": "c", "commit": "d",
            "machine": "m", **fields}  # fmt: skip


def test_results_become_a_table_with_goals_and_machines() -> None:
    text = markdown(
        [row(), row(figure="y", goal=2.0, holds=False, better="less"), row(figure="z", goal=None, holds=None)]
    )
    lines = text.splitlines()
    assert lines[2] == "| x | 1.5 | ≥ 1 | yes | 1,000 | `c` | `d` |"
    assert lines[3] == "| y | 1.5 | ≤ 2 | **no** | 1,000 | `c` | `d` |"
    assert lines[4] == "| z | 1.5 | - | - | 1,000 | `c` | `d` |"
    assert lines[6:] == ["Machine: m"]


def test_the_last_result_of_a_figure_at_a_size_counts() -> None:
    text = markdown([row(value=1.0), row(value=2.0), row(value=3.0, size=10)])
    assert [line.split(" | ")[1] for line in text.splitlines()[2:4]] == ["2", "3"]


@pytest.mark.parametrize("ray", [None, object()])
def test_what_a_cluster_measured_is_calculated_with_after_it(ray: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_spec", {"ray": ray}.get)
    cluster = [name for name in runner.programs() if name.startswith("cluster_")]
    assert cluster == ([] if ray is None else ["cluster_build", "cluster_serving", "cluster_simulation"])
