"""Training that was stopped goes on to the same bits, and only as what it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from knnlm.errors import Conflict
from knnlm.evaluation.memory_targets import build_targets
from knnlm.lm.distillation import DistilSettings
from tests.memory.conftest import World
from tests.memory.trained import SETTINGS, Step, Stopped, run


@pytest.mark.parametrize(("kind", "last"), [("decoder", 8), ("mlp", 12)])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(world: World, tmp_path: Path, kind: str, last: int) -> None:
    whole, first, rest = Step(), Step(last), Step()
    made = run(world, tmp_path / "whole", kind=kind, on_step=whole)
    with pytest.raises(Stopped):
        run(world, tmp_path / "out", kind=kind, on_step=first, save_seconds=0)
    assert not (tmp_path / "out").exists()
    again = run(world, tmp_path / "out", kind=kind, on_step=rest)
    assert first.steps + rest.steps == whole.steps == list(range(1, 25))
    assert first.losses + rest.losses == whole.losses
    assert first.tried + rest.tried == whole.tried
    assert again.tune == made.tune
    assert {n: f.sha256 for n, f in again.files.items()} == {n: f.sha256 for n, f in made.files.items()}


def test_dropout_is_continued_too(world: World, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(world.model, start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    settings = DistilSettings(**{**vars(SETTINGS), "steps": 6})
    whole, first, rest = Step(), Step(3), Step()
    run(world, tmp_path / "whole", settings, start=str(start), on_step=whole)
    with pytest.raises(Stopped):
        run(world, tmp_path / "out", settings, start=str(start), on_step=first, save_seconds=0)
    run(world, tmp_path / "out", settings, start=str(start), on_step=rest)
    assert first.losses + rest.losses == whole.losses


def test_an_unfinished_run_is_not_continued_as_another(world: World, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(world, tmp_path / "out", on_step=Step(2))
    with pytest.raises(Conflict, match=r"unfinished run with beta 0\.5, this one has 0\.25"):
        run(world, tmp_path / "out", DistilSettings(**{**vars(SETTINGS), "beta": 0.25}))
    with pytest.raises(Conflict, match="unfinished run with kind 'decoder'"):
        run(world, tmp_path / "out", kind="mlp")


def test_what_was_fitted_is_not_fitted_again_when_targets_are_continued(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: list[Any] = [world.store, "law", str(world.model), tmp_path / "out"]
    options: dict[str, Any] = {"ks": [8, 64], "max_tokens": 500, "part_entries": 500}
    with monkeypatch.context() as patch:
        patch.setattr("knnlm.memory.making._merge", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            build_targets(*arguments, **options)
    arguments[2] = "no model is asked again"
    made = build_targets(*arguments, **options)
    assert made.settings.k in (8, 64)
    assert made.fit is not None
    assert made.fit.documents > 1
    whole = build_targets(world.store, "law", str(world.model), tmp_path / "whole", **options)
    assert (whole.fit, whole.shape, whole.settings) == (made.fit, made.shape, made.settings)


def test_weights_kept_by_a_run_that_was_killed_before_its_state_was_saved_do_no_harm(
    world: World, tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        run(world, tmp_path / "out", on_step=Step(13))
    assert (tmp_path / ".out.building/best.safetensors").exists()
    assert not (tmp_path / ".out.building/state.safetensors").exists()
    whole, again = run(world, tmp_path / "whole"), run(world, tmp_path / "out")
    assert whole.tune == again.tune
    assert whole.files == again.files
