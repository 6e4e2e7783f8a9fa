"""Every experiment at toy size: a record with tables, verdicts and figures, from what it said it needs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.harness import ROOT
from experiments import __main__ as runner
from experiments import page, plan, sizes
from experiments.experiment import Need
from experiments.figures import draw
from experiments.lab import BASE, Lab, Sight
from experiments.records import NotARecord, load, load_all, save
from experiments.scale import SCALES
from experiments.table import NAMES, experiment
from experiments.texts import Texts, find_texts
from knnlm.errors import Conflict
from knnlm.lm.model import LanguageModel

SLOW = {  # more models, datastores or searches
    "knn_cost", "knn_figure2", "knn_figure4", "knn_figure5", "knn_figure7", "knn_figure8", "knn_probes", "knn_table1",
    "knn_table3", "knn_table4", "knn_table5", "mem_figure4", "mem_table1", "mem_table3", "mem_table6", "mem_table8",
    "mem_table9", "mem_table19",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in NAMES]
)
def test_an_experiment_gives_a_record(name: str, lab: Lab, tmp_path: Path) -> None:
    one = experiment(name)
    record = runner._run(name, one, lab, tmp_path, "")
    kept = load(tmp_path / f"{name}.json")
    assert kept.findings == load(save(kept, tmp_path)).findings  # nothing is lost on the way
    assert kept.findings.tables
    assert kept.findings.verdicts
    assert set(lab.asked) <= {BASE, *with_models(one.needs(lab.texts, lab.scale))}  # the plan is what is done
    assert record.texts == {c.name: c.sha256 for c in lab.texts.all}
    text = page.render([kept], "")
    assert all(verdict.claim in text for verdict in kept.findings.verdicts)
    for chart in kept.findings.charts:
        files = draw(chart, tmp_path / chart.name)
        assert all(file.stat().st_size > 1000 for file in files)
        assert files[0].read_bytes() == draw(chart, tmp_path / "again")[0].read_bytes()


@pytest.mark.parametrize("content", ["", '{"findings": ', "[]", '{"a": 1}', '{"findings": {"tables": 3}}', "\xff"])
def test_a_damaged_record_is_named_and_its_experiment_runs_again(
    content: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records").mkdir()
    path = tmp_path / "records" / "knn_table1.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(NotARecord, match=r"knn_table1\.json is no record"):
        load(path)
    with pytest.raises(SystemExit, match=r"knn_table1\.json is no record"):
        page.main([], tmp_path)
    monkeypatch.setattr(runner, "commit", lambda: "abc")  # nothing that was not committed
    assert runner._kept(path, lab.scale, lab.texts, lab) is None


def test_passages_of_a_folder_are_not_published_and_docstrings_are(tmp_path: Path) -> None:
    record = load(ROOT / "docs" / "paper" / "knn_examples.json")
    save(record, tmp_path / "records")
    assert page.main(["--into", str(tmp_path / "docs")], tmp_path) == 0
    save(replace(record, source="my own text"), tmp_path / "records")
    with pytest.raises(SystemExit, match="shows passages of my own text"):
        page.main(["--into", str(tmp_path / "other")], tmp_path)
    assert not (tmp_path / "other").exists()
    assert page.main([], tmp_path) == 0  # at home it is seen


def test_a_page_of_no_records_says_so(tmp_path: Path) -> None:
    assert page.main([], tmp_path) == 0
    assert "No experiment has been run." in (tmp_path / "paper.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "found neither"),
        ({"one.jsonl": b'{"id": "a", "text": "hello"}\n'}, "found neither"),
        ({"bad.jsonl": b'{"id":\n'}, r"bad\.jsonl, line 1 is not JSON"),
        ({f"wiki.{part}.tokens": b"\xff = a = \n" for part in ("train", "valid", "test")}, "not UTF-8"),
        ({f"wiki.{part}.tokens": b" \n" for part in ("train", "valid", "test")}, "too few documents"),
    ],
)
def test_text_that_is_none_is_named(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        find_texts(tmp_path)


def with_models(needs: Sequence[Need]) -> set[Need]:
    """What is needed, and the models of it."""
    return {*needs, *(need.learner for need in needs if isinstance(need, Sight))}


@pytest.mark.slow
def test_the_same_again_and_continued_from_half_gives_the_same_numbers(texts: Texts, tmp_path: Path) -> None:
    found = []
    for name in ("first", "second"):
        lab = Lab(SCALES["toy"], texts, tmp_path / name)
        if name == "second":  # what was interrupted left a file of a view and none of its fit
            (tmp_path / "second").mkdir(exist_ok=True)
            for file in (tmp_path / "first").rglob("*-tune.npz"):
                target = tmp_path / "second" / file.relative_to(tmp_path / "first")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        record = runner._run("knn_table4", experiment("knn_table4"), lab, tmp_path / name, "")
        found.append(json.dumps(record.findings.tables[0].rows))
    assert found[0] == found[1]


def run_interrupted(out: Path, after: str | None) -> int:
    """Two experiments in a process of their own, with SIGINT once it says `after`; its status."""
    command = [
        sys.executable, "-m", "experiments", "knn_table4", "mem_table7", "--scale", "toy", "--text", "docstrings",
        "--out", str(out),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if after is not None and line.startswith(after):
                process.send_signal(signal.SIGINT)
    return process.returncode


@pytest.mark.slow
def test_what_ctrl_c_interrupts_is_continued_to_the_same_numbers(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_interrupted(whole, None) == 0
    for after in ("building", "training", "making targets", "training memory"):
        assert run_interrupted(parts, after) == runner.INTERRUPTED, after
    assert run_interrupted(parts, None) == 0
    for name in ("knn_table4", "mem_table7"):
        assert load(whole / "records" / f"{name}.json").findings == load(parts / "records" / f"{name}.json").findings


def test_a_plan_says_steps_time_and_memory_and_does_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert runner.main(["--scale", "full", "--plan", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "103,227,021 entries" in said
    assert "GB of memory" in said
    assert not (tmp_path / "out").exists()
    whole = plan.steps([(name, experiment(name)) for name in NAMES], plan.NOMINAL, SCALES["full"])
    assert len({step.what for step in whole}) == len(whole)  # each thing once
    assert all(step.seconds > 0 for step in whole)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, list[float]]:
    """What a plan says, and the GB of disk of its steps."""
    assert runner.main(["knn_table4", "--scale", "full", "--plan", *arguments]) == 0
    said = capsys.readouterr().out
    return said, [float(line.split()[-3]) for line in said.splitlines() if line.endswith("GB disk")]


def test_a_plan_is_reckoned_with_the_model_that_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((ROOT / "models" / "pocket" / "config.json").read_text())
    config |= {"hidden_size": 512, "vocab_size": 5000, "head_dim": 64, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))  # and no weights: none are needed
    default, gigabytes = planned(capsys)
    assert "vocabulary 50,257" in default
    said, smaller = planned(capsys, "--model", str(tmp_path))
    assert "from its config.json" in said
    assert "keys of 512, vocabulary 5,000" in said
    assert smaller[0] == pytest.approx(103_227_021 * (2 * 512 + 4) / 1e9, abs=0.01)
    assert gigabytes[0] == pytest.approx(103_227_021 * (2 * 1024 + 4) / 1e9, abs=0.01)
    assert f"windows {config['max_position_embeddings']}/" in said  # a context of 1,024 does not fit

    def away(*_: object) -> str:
        raise OSError("away")

    monkeypatch.setattr(sizes, "hf_hub_download", away)
    said, _ = planned(capsys, "--model", "meta-llama/Llama-3.1-8B")
    assert "8,000M parameters, 32 layers of width 4,096, vocabulary 128,256" in said
    assert "assumed by its name" in said
    with pytest.raises(SystemExit, match="its name does not say how many parameters"):
        planned(capsys, "--model", "someone/something")
    with pytest.raises(SystemExit, match="no model folder"):
        planned(capsys, "--model", "./nothing")


def test_the_sizes_of_a_scale_are_those_of_its_model() -> None:
    found = sizes.sizes_of(str(ROOT / "models" / "pocket"))
    for name in ("toy", "small"):
        assert sizes.fitted(SCALES[name], replace(found, name="")) == replace(SCALES[name], model="")
    lm = LanguageModel.load(str(ROOT / "models" / "pocket"))
    assert (found.width, found.vocabulary, found.context) == (
        lm.info.key_dim, lm.info.vocab_size, lm.info.context_length,
    )  # fmt: skip


def test_unknown_experiments_and_folders_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no experiment 'table5': there are knn_table4"):
        experiment("table5")
    with pytest.raises(SystemExit, match="found neither"):
        find_texts(tmp_path)


def test_a_run_beside_another_is_told_so_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def locked(*_given: object, **_more: object) -> None:
        raise Conflict("another process is training this memory: memories is locked")

    monkeypatch.setattr(runner, "run_all", locked)
    with pytest.raises(SystemExit, match="another process is training this memory"):
        runner.main(["knn_table4", "--scale", "toy", "--out", str(tmp_path)])


def test_wikitext_is_cut_into_articles_and_keeps_its_own_parts(tmp_path: Path) -> None:
    for part in ("train.prefix", "valid", "test"):
        text = f" \n = Of {part} = \n \n a b . \n = = Section = = \n c . \n \n = Other ( {part} ) = \n \n d . \n"
        (tmp_path / f"wiki.{part}.tokens").write_text(text)
    found = find_texts(tmp_path).wikitext
    assert found is not None
    assert [len(part) for part in (found.store, found.tune, found.report)] == [2, 2, 2]
    assert "= = Section = =" in found.store[0].text
    assert found.report[1].text.startswith("= Other ( test ) =")


def test_the_published_page_is_what_its_records_give() -> None:
    folder = ROOT / "docs"
    records = load_all(folder / "paper", NAMES)
    summary = folder / "paper" / "summary.md"
    assert (folder / "paper.md").read_text("utf-8") == page.render(records, summary.read_text("utf-8"))
