import shutil
import threading
import time
from pathlib import Path

import pytest

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import locked
from knnlm.errors import (
    Conflict,
    DatastoreCorrupt,
    DatastoreMismatch,
    InvalidRequest,
    KnnlmError,
    UnknownDomain,
    UnknownVersion,
)
from knnlm.testing import toy_datastore


def store_with(store: Path, *names: str) -> Catalog:
    for name in names:
        domain, version = name.split("/")
        toy_datastore(store, texts=["some text"], domain=domain, version=version, activate=False)
    return Catalog(store)


def test_store_that_does_not_exist_has_no_domains(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    assert catalog.domains() == []
    assert catalog.next_version("law") == "v1"
    with pytest.raises(UnknownDomain, match=r"'law'; in .*: none"):
        catalog.versions("law")


def test_versions_are_in_natural_order(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v10", "law/v2", "law/2024-01", "law/v2.1", "med/v1")
    assert catalog.versions("law") == ["2024-01", "v2", "v2.1", "v10"]
    assert catalog.domains() == ["law", "med"]
    assert catalog.next_version("law") == "v11"
    assert catalog.next_version("med") == "v2"


def test_versions_that_are_being_built_keep_their_names(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v2", "law/v4")
    for name in (".v3.building", ".v7.building", ".v8.buildings", ".vx.building", ".add-v9.building"):
        (tmp_path / "law" / name).mkdir()
    assert catalog.next_version("law") == "v7"  # an interrupted build is continued
    assert catalog.free_version("law") == "v8"
    (tmp_path / "law" / ".v7.building").rmdir()
    assert (catalog.next_version("law"), catalog.free_version("law")) == ("v3", "v5")
    (tmp_path / "law" / ".v3.building").rename(tmp_path / "law" / ".v4.building")  # left over, and published since
    assert (catalog.next_version("law"), catalog.free_version("law")) == ("v5", "v5")
    assert Catalog(tmp_path / "none").free_version("law") == "v1"


def test_what_a_killed_activation_left_is_removed_by_the_next(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1")
    (tmp_path / "law" / ".CURRENT.17.0123abcd.tmp").touch()
    catalog.activate("law", "v1")
    assert sorted(f.name for f in (tmp_path / "law").iterdir()) == ["CURRENT", "v1"]


def test_a_build_does_not_activate(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1")
    assert catalog.current("law") is None


def test_activation_and_rolling_back(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2")
    for version in ("v1", "v2", "v1"):
        catalog.activate("law", version)
        assert catalog.current("law") == version
        assert (tmp_path / "law/CURRENT").read_text() == f"{version}\n"
    assert catalog.path("law", "v2") == tmp_path / "law/v2"


def test_current_is_replaced_as_a_whole(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2")
    catalog.activate("law", "v1")
    stop = threading.Event()
    seen: set[str | None] = set()
    failures: list[KnnlmError] = []

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add(catalog.current("law"))
            except KnnlmError as err:
                failures.append(err)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for i in range(30):
        catalog.activate("law", f"v{1 + i % 2}")
    stop.set()
    watcher.join()
    assert failures == []
    assert seen <= {"v1", "v2"}
    assert [f.name for f in (tmp_path / "law").iterdir() if f.name.startswith(".")] == []


def test_unknown_names_list_what_exists(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2", "med/v1")
    with pytest.raises(UnknownDomain, match=r"'cars'; in .*: law, med"):
        catalog.path("cars", "v1")
    for ask in (catalog.path, catalog.activate, catalog.remove):
        with pytest.raises(UnknownVersion, match="has no version 'v3'; it has v1, v2"):
            ask("law", "v3")


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".v1.building", "a/b", "../law", "Law", "a b", "a" * 65, "-a", "a\n", "é", "a\0"]
)
def test_names_cannot_leave_the_store(tmp_path: Path, name: str) -> None:
    catalog = store_with(tmp_path / "store", "law/v1")
    with pytest.raises(InvalidRequest, match="is not a name"):
        catalog.versions(name)
    with pytest.raises(InvalidRequest, match="is not a name"):
        catalog.next_version(name)
    with pytest.raises(InvalidRequest, match="is not a name"):
        catalog.folder("law", name)
    for ask in (catalog.path, catalog.activate, catalog.remove):
        with pytest.raises(InvalidRequest, match="is not a name"):
            ask("law", name)


def test_current_is_no_name_of_a_version(tmp_path: Path) -> None:
    """Where case is not told apart, its folder would be the file CURRENT."""
    with pytest.raises(InvalidRequest, match="'current' is a name that the store needs itself"):
        Catalog(tmp_path).folder("law", "current")


def test_what_is_unpublished_is_not_listed_or_activated(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1")
    shutil.copytree(tmp_path / "law/v1", tmp_path / "law/.v2.building")
    (tmp_path / "law/v3").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/.v1.building").mkdir()
    assert catalog.versions("law") == ["v1"]
    assert catalog.domains() == ["law"]
    with pytest.raises(UnknownVersion):
        catalog.activate("law", "v3")


def test_damaged_or_renamed_version_is_not_activated(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2")
    manifest = tmp_path / "law/v1/manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(DatastoreCorrupt, match=r"manifest\.json"):
        catalog.activate("law", "v1")
    (tmp_path / "law/v2").rename(tmp_path / "law/v5")
    with pytest.raises(DatastoreMismatch, match="built as law/v2, it cannot be activated as law/v5"):
        catalog.activate("law", "v5")
    assert catalog.current("law") is None


@pytest.mark.parametrize("content", [b"", b"../v1\n", b"v1\nv2\n", b"\xff"])
def test_damaged_current_is_an_error(tmp_path: Path, content: bytes) -> None:
    catalog = store_with(tmp_path, "law/v1")
    (tmp_path / "law/CURRENT").write_bytes(content)
    with pytest.raises(DatastoreCorrupt, match="CURRENT"):
        catalog.current("law")


def test_removing(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2")
    catalog.activate("law", "v2")
    with pytest.raises(Conflict, match="v2 of domain law is current"):
        catalog.remove("law", "v2")
    (tmp_path / "law/.v0.removed.12345678").mkdir()  # an earlier removal that was killed
    catalog.remove("law", "v1")
    assert catalog.versions("law") == ["v2"]
    assert sorted(f.name for f in (tmp_path / "law").iterdir()) == [".highest", "CURRENT", "v2"]


def test_the_number_of_a_version_that_was_removed_never_comes_again(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2", "law/v3")
    catalog.activate("law", "v1")
    for version in ("v3", "v2"):
        catalog.remove("law", version)
        assert catalog.next_version("law") == catalog.free_version("law") == "v4"
    catalog.activate("law", "v1")
    assert (catalog.versions("law"), catalog.domains()) == (["v1"], ["law"])
    assert store_with(tmp_path, "law/v4").free_version("law") == "v5"
    catalog.remove("law", "v4")
    assert catalog.free_version("law") == "v5"


def test_a_damaged_record_of_numbers_is_named(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1")
    (tmp_path / "law/.highest").write_text("v9\n")
    with pytest.raises(DatastoreCorrupt, match=r"\.highest .* expected the highest number"):
        catalog.free_version("law")


def test_a_version_follows_the_one_it_was_made_of_or_none(tmp_path: Path) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2", "law/v3")
    catalog.activate("law", "v1")
    catalog.activate("law", "v2", "v1")
    catalog.activate("law", "v2", "v1")  # it is there already
    with pytest.raises(Conflict, match=r"v3 of domain law .* not activated: it was made of v1, .* switched to v2"):
        catalog.activate("law", "v3", "v1")
    assert catalog.current("law") == "v2"


def test_a_switch_in_the_moment_of_activation_is_not_overwritten(tmp_path: Path) -> None:
    """The operator's switch holds the domain's lock when the other comes, which must look only once it has it."""
    catalog = store_with(tmp_path, "law/v1", "law/v2", "law/v3")
    catalog.activate("law", "v1")
    begun = threading.Event()
    errors: list[KnnlmError] = []

    def follow() -> None:
        begun.set()
        try:
            catalog.activate("law", "v3", "v1")
        except KnnlmError as err:
            errors.append(err)

    late = threading.Thread(target=follow)
    with locked(tmp_path / "law", wait=True, doing="changing the domain"):
        late.start()
        begun.wait()
        time.sleep(0.1)  # it waits for the lock
        (tmp_path / "law/CURRENT").write_text("v2\n")
    late.join()
    assert [type(err) for err in errors] == [Conflict]
    assert catalog.current("law") == "v2"


def test_half_removed_version_is_never_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = store_with(tmp_path, "law/v1", "law/v2")

    def killed(path: Path) -> None:
        (path / "keys.npy").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        catalog.remove("law", "v1")
    assert catalog.versions("law") == ["v2"]
