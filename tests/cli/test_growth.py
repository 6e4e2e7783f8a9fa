"""`knnlm add`, `knnlm forget` and `knnlm compact`, over a real store and a tiny model."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.updates.transaction import begin_update
from knnlm.datastore.verify import verify
from knnlm.lm.model import LanguageModel
from knnlm.messages import ForwardRequest, ForwardResult
from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.cli.conftest import Knnlm


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """Two documents that the store does not have."""
    path = tmp_path / "new.jsonl"
    rows = [{"id": "n0", "text": "the cat ran under the log"}, {"id": "n1", "text": "a bird saw it"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def target(model: Path) -> Iterator[str]:
    """An lm service of the model, in a thread; it wants the key "k"."""
    listening, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    address: list[str] = []

    async def serve() -> None:
        settings = LmSettings(model=str(model), port=0, grpc_port=0, device="cpu", api_keys=(SecretStr("k"),))
        async with running(service(settings)) as host:
            address.append(f"127.0.0.1:{host.grpc_port}")
            listening.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert listening.wait(60)
    yield address[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def current(store: Path) -> Manifest:
    catalog = Catalog(store)
    return Manifest.load(catalog.path("toy", catalog.current("toy") or ""))


def sound(store: Path) -> bool:
    catalog = Catalog(store)
    return all(c.problem is None for v in catalog.versions("toy") for c in verify(catalog.path("toy", v)))


def test_add_says_what_it_made_and_activates_it(knnlm: Knnlm, store: Path, new: Path) -> None:
    before = current(store)
    answer = knnlm("add", "toy", new)
    assert answer.code == 0, answer.err
    after = current(store)
    assert (after.version, after.documents, after.tuning) == ("v2", before.documents + 2, before.tuning)
    assert f"{store / 'toy' / 'v2'}: {after.entries:,} entries of 32 documents" in answer.out
    assert f"added since v1: {after.entries - before.entries:,} entries of 2 documents" in answer.out
    assert "v2 is now the current version of toy (was v1)" in answer.out
    assert sound(store)


def test_add_refuses_ids_that_exist_unless_they_are_replaced(
    knnlm: Knnlm, store: Path, corpus: Path, new: Path
) -> None:
    answer = knnlm("add", "toy", new, corpus, "--part", "store")
    assert answer.code == 1
    assert "v1 has a document 'd0' already: replace it, or remove it first" in answer.err
    assert Catalog(store).versions("toy") == ["v1"]
    made = knnlm("add", "toy", new, corpus, "--part", "all", "--replace", "--no-activate", "--json").json
    assert (made["added_documents"], made["removed_documents"], made["documents"]) == (42, 30, 42)
    assert (made["version"], made["parent"], made["active"]) == ("v2", "v1", False)
    assert "`knnlm compact toy`" in made["advice"]
    assert Catalog(store).current("toy") == "v1"


def test_add_that_was_stopped_says_how_to_continue_and_continues(
    knnlm: Knnlm, store: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = LanguageModel.forward, 0

    def stopped(self: LanguageModel, request: ForwardRequest) -> ForwardResult:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return forward(self, request)

    monkeypatch.setattr(LanguageModel, "forward", stopped)
    command = ("add", "toy", corpus, "--replace", "--batch-tokens", "256")
    answer = knnlm(*command)
    assert (answer.code, Catalog(store).versions("toy")) == (130, ["v1"])
    assert "the same command continues" in answer.err
    assert knnlm(*command, "--json").json["version"] == "v2"
    assert sound(store)


def test_add_through_a_service_makes_the_same_keys(
    knnlm: Knnlm, store: Path, new: Path, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = knnlm("add", "toy", new, "--no-activate", "--json").json
    key = tmp_path / "key"
    key.write_text("k\n")
    command = ("add", "toy", new, "--lm-target", target, "--no-activate", "--json")
    again = knnlm(*command, "--api-key-file", key)
    assert again.json["version"] == own["version"]  # byte for byte what it made itself
    monkeypatch.setenv("KNNLM_API_KEY", "k")
    assert knnlm(*command).json["version"] == own["version"]
    monkeypatch.setenv("KNNLM_API_KEY", "k-of-another")
    refused = knnlm(*command)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "k-of-another" not in refused.err


def test_forget_removes_documents(knnlm: Knnlm, store: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.txt"
    ids.write_text("d1\n\nd2\n")
    answer = knnlm("forget", "toy", "d0", "--ids-file", ids)
    assert answer.code == 0, answer.err
    assert "removed since v1: " in answer.out
    assert "entries of 27 documents" in answer.out
    assert (current(store).version, current(store).live_documents) == ("v2", 27)
    score = ("score", "the cat sat", "--domain", "toy", "--exclude-document", "d0")
    assert "'d0', which is no document of toy v2" in knnlm(*score).err
    unknown = knnlm("forget", "toy", "d3", "d0", "--json")
    assert (unknown.code, unknown.out) == (1, "")
    assert "version v2 has no document 'd0': nothing was removed" in unknown.err
    assert Catalog(store).versions("toy") == ["v1", "v2"]
    assert knnlm("forget", "toy", "d3", "--no-activate", "--json").json["removed_documents"] == 1
    assert Catalog(store).current("toy") == "v2"


def test_compact_folds_keeps_the_tuning_and_says_what_is_not_kept(knnlm: Knnlm, store: Path, new: Path) -> None:
    knnlm("index", "build", "toy", "--recipe", "ivf4", "--beside")
    knnlm("add", "toy", new)
    knnlm("forget", "toy", "d0")
    answer = knnlm("compact", "toy", "--index", "ivf2,flat")
    assert answer.code == 0, answer.err
    manifest = current(store)
    assert (manifest.version, manifest.format_version, manifest.documents) == ("v4", 1, 31)
    assert [index.recipe for index in manifest.indexes] == ["ivf2,flat"]
    assert "v4 is now the current version of toy (was v3)" in answer.out
    assert "the tuning was fitted to neighbors found by flat: run `knnlm tune toy` again" in answer.err
    assert "v3 also has the index ivf4: build it with `knnlm index build toy --recipe ivf4 --beside`" in answer.err
    assert sound(store)
    again = knnlm("compact", "toy")
    assert (again.code, again.out) == (0, "toy v4 has nothing to fold: no document was added or removed\n")
    assert knnlm("compact", "toy", "--json").json["version"] == "v4"


def test_compact_without_activation_leaves_what_answers(knnlm: Knnlm, store: Path) -> None:
    knnlm("forget", "toy", "d0")
    made = knnlm("compact", "toy", "--no-activate", "--json").json
    assert (made["version"], made["active"], made["documents"], made["index"]) == ("v3", False, 29, "flat")
    assert Catalog(store).current("toy") == "v2"


def test_another_change_is_a_conflict(knnlm: Knnlm, store: Path, new: Path) -> None:
    with begin_update(Catalog(store), "toy", wait=False):
        for command in (("add", "toy", new), ("forget", "toy", "d0"), ("compact", "toy")):
            answer = knnlm(*command)
            assert (answer.code, answer.out) == (1, "")
            assert answer.err.startswith("error: another process is changing domain toy")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["add", "law", "x.jsonl"], 1, "unknown domain 'law'"),
        (["add", "toy", "/nowhere.txt"], 2, "no such file or folder: /nowhere.txt"),
        (["add", "toy", "x", "--part", "half"], 2, "part must be one of all, store, tune, report, got 'half'"),
        (["add", "toy", "x", "--api-key-file", "x"], 2, "--api-key-file means nothing without --lm-target"),
        (["add", "toy", "x", "--model", "m", "--lm-target", "h:1"], 2, "expected either --model or --lm-target"),
        (["add", "toy", "x", "--lm-target", "h:1", "--api-key-file", "/nowhere"], 2, "cannot read /nowhere"),
        (["forget", "toy"], 2, "there is no id of a document to remove"),
        (["forget", "toy", "--ids-file", "/nowhere"], 2, "/nowhere cannot be read: No such file or directory"),
        (["forget", "law", "x"], 1, "unknown domain 'law'"),
        (["compact", "law"], 1, "unknown domain 'law'"),
        (["compact", "toy", "--index", "magic"], 2, "unknown index recipe 'magic'"),
    ],
)
@pytest.mark.usefixtures("store")
def test_errors_are_one_sentence_and_an_exit_code(knnlm: Knnlm, arguments: list[str], code: int, message: str) -> None:
    answer = knnlm(*arguments)
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.err
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1


@pytest.mark.usefixtures("store")
def test_add_without_a_model_asks_the_lm_service_of_this_machine(
    knnlm: Knnlm, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KNNLM_MODEL")
    monkeypatch.setattr("knnlm.cli.add.LOCAL", "127.0.0.1:1")  # where none is
    answer = knnlm("add", "toy", new)
    assert (answer.code, answer.out) == (1, "")
    assert "127.0.0.1:1 does not answer" in answer.err
    assert "give --lm-target, or --model to load the model here" in answer.err
