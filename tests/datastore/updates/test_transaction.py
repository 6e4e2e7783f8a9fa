"""How a change is made: one at a time, sharing files, found again, activated. What it makes is in test_growth.py."""

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import locked
from knnlm.datastore.manifest import IndexRecord, Manifest
from knnlm.datastore.progress import Progress
from knnlm.datastore.updates import transaction
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.revise import with_index, with_tuning
from knnlm.datastore.updates.transaction import advice, begin_update
from knnlm.errors import (
    Conflict,
    KnnlmError,
)
from knnlm.messages import Document, DomainChange, ForwardRequest, ForwardResult
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.tuning_records import Tuning
from tests.datastore.growing import NEW, folder, forget, grow, listed, live, sound, toy_catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return toy_catalog(tmp_path)


def test_without_activation_the_former_version_answers(catalog: Catalog) -> None:
    made = add(NEW, ToyLanguageModel(), catalog, "toy")
    assert (made.version, catalog.current("toy")) == ("v2", "v1")
    seen: list[tuple[str, ...]] = []
    again = add(NEW, ToyLanguageModel(), catalog, "toy", activate=lambda *asked: seen.append(asked))
    assert folder(catalog, again) == folder(catalog, made)  # the same change is not made twice
    assert seen == [("toy", "v2", "v1")]
    other = remove(["0"], catalog, "toy")
    assert (other.version, other.parent) == ("v3", "v1")


def test_the_change_that_is_found_again_is_that_of_the_same_version_alone(catalog: Catalog) -> None:
    first = remove(["0"], catalog, "toy")
    assert remove(["1"], catalog, "toy").version == "v3"
    assert remove(["0"], catalog, "toy").version == "v2"
    with_tuning(folder(catalog, first), Tuning(1.0, 0.5, 4, 9.0, 8.0, 5, 1))
    assert remove(["0"], catalog, "toy").version == "v4"


def test_a_damaged_version_beside_it_stops_no_change(catalog: Catalog) -> None:
    made = remove(["0"], catalog, "toy")
    (folder(catalog, made) / "manifest.json").write_text("{")
    assert remove(["0"], catalog, "toy").version == "v3"


def test_a_rollback_meanwhile_is_not_overruled(catalog: Catalog) -> None:
    catalog.activate("toy", grow(catalog).version)

    class RolledBack(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            catalog.activate("toy", "v1")
            return super().forward(request)

    with pytest.raises(Conflict, match=r"version v3 .* is not activated: it was made of v2, .* switched to v1"):
        grow(catalog, [Document("d", "text")], RolledBack())
    assert catalog.current("toy") == "v1"
    assert live(catalog.path("toy", "v3"))[-1] == "d"


def test_a_version_that_is_removed_meanwhile_is_a_conflict(catalog: Catalog) -> None:
    grow(catalog)

    class Removed(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            catalog.activate("toy", "v1")
            catalog.remove("toy", "v2")
            return super().forward(request)

    with pytest.raises(Conflict, match="v2 of domain toy was removed while it was being changed"):
        grow(catalog, [Document("d", "text")], Removed())
    assert catalog.versions("toy") == ["v1"]


def test_removing_the_parent_leaves_its_children_whole(catalog: Catalog) -> None:
    made = grow(catalog)
    catalog.remove("toy", "v1")
    assert sound(folder(catalog, made))
    assert live(folder(catalog, made))[0] == "0"


def test_an_activation_that_fails_can_be_repeated_without_the_model(catalog: Catalog) -> None:
    class Counting(ToyLanguageModel):
        calls = 0

        def forward(self, request: ForwardRequest) -> ForwardResult:
            self.calls += 1
            return super().forward(request)

    def full(domain: str, version: str, parent: str) -> None:
        raise Conflict(f"no memory for {domain} {version}")

    with pytest.raises(Conflict, match="no memory for toy v2"):
        add(NEW, ToyLanguageModel(), catalog, "toy", activate=full)
    assert (catalog.current("toy"), sound(catalog.path("toy", "v2"))) == ("v1", True)
    lm = Counting()
    assert (grow(catalog, NEW, lm).version, lm.calls) == ("v2", 0)
    assert listed(catalog) == ["CURRENT", "v1", "v2"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.EMLINK])
def test_where_there_are_no_links_files_are_copied(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number), str(source), None, str(target))

    monkeypatch.setattr(os, "link", refuse)
    made = grow(catalog)
    assert sound(folder(catalog, made))
    assert not os.path.samefile(folder(catalog, made) / "keys.npy", catalog.path("toy", "v1") / "keys.npy")
    assert live(folder(catalog, made))[-1] == "c"


def during(catalog: Catalog, act: Callable[[], object]) -> DomainChange:
    """Add documents, and `act` while their keys are made. What it raises is raised."""

    class Acting(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            act()
            return super().forward(request)

    return grow(catalog, NEW, Acting())


@pytest.mark.parametrize(
    "other", [lambda c: grow(c, [Document("d", "text")]), lambda c: forget(c, "0")], ids=["add", "remove"]
)
def test_one_change_at_a_time(catalog: Catalog, other: Callable[[Catalog], DomainChange]) -> None:
    with pytest.raises(Conflict, match="another process is changing domain toy"):
        during(catalog, lambda: other(catalog))
    assert other(catalog).version == "v2"  # the lock is gone with who held it


def test_a_change_may_wait_for_the_one_before(catalog: Catalog) -> None:
    made: list[DomainChange | KnnlmError] = []

    def other() -> None:
        try:
            made.append(remove(["0"], catalog, "toy", activate=catalog.activate, wait=True))
        except KnnlmError as err:
            made.append(err)

    thread = threading.Thread(target=other)

    def begin() -> None:
        if thread.ident is None:
            thread.start()

    during(catalog, begin)
    thread.join()
    assert isinstance(made[0], DomainChange), made[0]
    assert (made[0].version, made[0].parent) == ("v3", "v2")
    assert live(folder(catalog, made[0])) == ["1", "2", "3", "a", "b", "c"]


def test_activating_and_removing_versions_go_on_beside_a_change(catalog: Catalog) -> None:
    toy_datastore(catalog.store, texts=["other"], version="v8", activate=False)
    toy_datastore(catalog.store, texts=["other"], version="v9", activate=False)

    def act() -> None:
        if "v9" in catalog.versions("toy"):
            catalog.activate("toy", "v9")
            catalog.activate("toy", "v1")
            catalog.remove("toy", "v9")

    assert during(catalog, act).version == "v10"  # a name never comes again
    assert catalog.versions("toy") == ["v1", "v8", "v10"]


def test_names_that_are_being_built_are_not_taken(catalog: Catalog) -> None:
    class Acting(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            if catalog.versions("toy") == ["v1"]:
                grow(catalog)
            return super().forward(request)

    assert build([Document("x", "text")], Acting(), catalog, "toy").name == "v2"
    assert catalog.current("toy") == "v3"


def test_leftovers_of_others_are_removed_after_a_day(catalog: Catalog) -> None:
    class Killed(BaseException):
        pass

    class Dying(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            raise Killed(request)

    for name in ("old", "recent", "held"):
        with pytest.raises(Killed):
            grow(catalog, [Document(name, "text")], Dying())
        (space,) = (s for s in (catalog.store / "toy").glob(".add-*") if not s.name.startswith(".add-of-"))
        space.rename(space.with_name(f".add-of-{name}.building"))
    (catalog.store / "toy" / ".change-0123").mkdir()
    for name in ("old", "held"):
        space = catalog.store / "toy" / f".add-of-{name}.building"
        for place in (space, space / ".build", space / ".build" / "parts"):
            os.utime(place, (time.time() - 90_000, time.time() - 90_000))
    with locked(catalog.store / "toy" / ".add-of-held.building" / ".build" / "lock", wait=False, doing="testing"):
        grow(catalog)
    assert listed(catalog) == [".add-of-held.building", ".add-of-recent.building", "CURRENT", "v1", "v2"]


def test_own_work_of_last_week_is_continued(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(ToyLanguageModel):
        left = 1

        def forward(self, request: ForwardRequest) -> ForwardResult:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return super().forward(request)

    settings = {"batch_tokens": 32, "part_entries": 16}
    with pytest.raises(KeyboardInterrupt):
        add(NEW, Dying(), catalog, "toy", **settings)  # type: ignore[arg-type]
    forget(catalog, "0")  # another change in between
    monkeypatch.setattr(transaction, "LEFTOVER_SECONDS", -1)
    seen: list[Progress] = []
    made = add(NEW, ToyLanguageModel(), catalog, "toy", on_progress=seen.append, **settings)  # type: ignore[arg-type]
    assert max(p.entries_resumed for p in seen) > 0
    assert live(folder(catalog, made)) == ["1", "2", "3", "a", "b", "c"]


def test_an_interrupted_addition_blocks_no_other(catalog: Catalog) -> None:
    with pytest.raises(KeyboardInterrupt):
        during(catalog, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert grow(catalog, [Document("d", "text")]).version == "v2"
    assert live(folder(catalog, grow(catalog)))[-3:] == ["a", "b", "c"]


def test_an_interrupted_addition_by_another_model_blocks_no_other(catalog: Catalog) -> None:
    with pytest.raises(KeyboardInterrupt):
        during(catalog, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    other = ToyLanguageModel(seed=1)
    toy_datastore(catalog.store, other, version="v2")
    assert live(folder(catalog, grow(catalog, NEW, other)))[-3:] == ["a", "b", "c"]


def test_progress_tells_all_phases(catalog: Catalog) -> None:
    seen: list[Progress] = []
    made = add(NEW, ToyLanguageModel(), catalog, "toy", on_progress=seen.append)
    assert list(dict.fromkeys(p.phase for p in seen)) == ["tokenize", "encode", "publish"]
    assert seen[-1].entries_done == seen[-1].entries_total == made.added_entries


@pytest.mark.parametrize(
    ("base", "added", "removed", "said"),
    [
        (1000, 100, 0, None),
        (1000, 101, 0, "101 added entries are searched one by one"),
        (10_000_000, 200_000, 0, None),
        (10_000_000, 200_001, 0, "200,001 added entries"),
        (1000, 0, 200, None),
        (1000, 0, 201, "201 of 1,000 entries are of removed documents"),
    ],
)
def test_compacting_is_advised_when_searches_feel_it(
    catalog: Catalog, base: int, added: int, removed: int, said: str | None
) -> None:
    manifest = Manifest.load(folder(catalog, forget(catalog, "0") if removed else grow(catalog)))
    fields: dict[str, object] = {"entries": base + added}
    if added:
        fields["segments"] = (manifest.segments[0].model_copy(update={"entries": added}),)
    elif manifest.segments:
        fields["segments"] = (manifest.segments[0].model_copy(update={"entries": 0}),)
    if manifest.removed is not None:
        fields["removed"] = manifest.removed.model_copy(update={"entries": removed})
    text = advice(manifest.model_copy(update=fields))
    assert text is None if said is None else text is not None and said in text and "`knnlm compact toy`" in text


def test_the_index_of_the_parent_may_change_while_keys_are_made(catalog: Catalog) -> None:
    made = during(
        catalog, lambda: with_index(catalog.path("toy", "v1"), IndexRecord(recipe="of-the-future"), {}, beside=False)
    )
    assert Manifest.load(folder(catalog, made)).index.recipe == "of-the-future"


def test_the_lock_of_changes_is_none_of_a_version(catalog: Catalog) -> None:
    with begin_update(catalog, "toy", wait=False) as change:
        assert (change.version, change.path) == ("v1", catalog.path("toy", "v1"))
        assert catalog.versions("toy") == ["v1"]
