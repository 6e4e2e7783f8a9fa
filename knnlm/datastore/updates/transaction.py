"""What every update of a domain has in common: it begins at the current version, publishes another, and activates it.

One update of a domain at a time, over all processes: its lock is held from reading CURRENT to activation. The new
version is made in a folder that nobody reads, shares the files that stay the same with the one before (hard links), and
appears by a rename. Killed at any moment, the former version answers and is what it was. Knows nothing of what changes.
"""

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import discard, disk_errors, locked, share, sync_folder
from knnlm.datastore.layout import BUILD_FOLDER
from knnlm.datastore.manifest import Manifest
from knnlm.errors import Conflict, DatastoreError, UnknownVersion

LOCK = ".change.lock"  # in the domain's folder, never removed: all that wait for it must hold the same file
DRAFT = ".change-"  # how folders begin that are of no use to anybody but the update that is being made
ADDING = ".add-"  # and those that are continued when the same documents are added again
LEFTOVER_SECONDS = 86_400

ADDED_SHARE, ADDED_ENTRIES, REMOVED_SHARE = 0.1, 200_000, 0.2  # from where on searches feel it

Activate = Callable[[str, str, str], None]  # domain, version, and the version that is current until then
Essence = Callable[[Manifest], Manifest]


class UpdateTransaction:
    """An update that is being made: `version`, in folder `path`, is what it begins at."""

    def __init__(self, catalog: Catalog, domain: str, version: str) -> None:
        self.domain = domain
        self.version = version
        self.path = catalog.path(domain, version)
        self.manifest = Manifest.load(self.path)
        self.folder = self.path.parent
        self._catalog = catalog

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder beside the versions, gone afterwards unless it was published."""
        folder = self.folder / f"{DRAFT}{secrets.token_hex(4)}"
        with disk_errors(folder):
            folder.mkdir()
        try:
            yield folder
        finally:
            discard(folder)

    def share(self, draft: Path, *, without: Iterable[str] = ()) -> Manifest:
        """Give `draft` the files of the version it begins at, and return that version's manifest as it is now.

        Its indexes and its tuning may have changed meanwhile, but not while they are shared. Raises Conflict when the
        version has been removed.
        """
        try:
            with locked(self.path, wait=True, doing="changing the manifest"):
                manifest = Manifest.load(self.path)
                for name in manifest.files.keys() - set(without):
                    share(self.path / name, draft / name)
        except (FileNotFoundError, DatastoreError) as err:
            if self.path.is_dir():
                raise
            raise Conflict(
                f"version {self.version} of domain {self.domain} was removed while it was being changed"
            ) from err
        return manifest

    def publish(self, draft: Path, manifest: Manifest, *, essence: Essence | None = None) -> Path:
        """Make `draft` a version: `manifest` says all about it but its name, which is chosen now.

        When an update that was killed has left the very same version, that one is taken. essence: the part of a
        manifest that must be the same for that; None = all but name and date.
        """
        found = self._found(manifest, essence or _unchanged)
        if found is not None:
            return found
        with locked(self.folder, wait=True, doing="changing the domain"):
            version = self._catalog.free_version(self.domain)
            target = self._catalog.folder(self.domain, version)
            manifest.model_copy(update={"version": version}).save(draft)
            with disk_errors(target):
                sync_folder(draft)
                draft.rename(target)
                sync_folder(self.folder)
        return target

    def activate(self, path: Path, activate: Activate | None) -> None:
        """Have the published version in folder `path` answer, unless None. Raises what `activate` does, Conflict when
        somebody has switched the domain since the update began; the version stays, not activated."""
        if activate is not None:
            activate(self.domain, path.name, self.version)

    def _found(self, wanted: Manifest, essence: Essence) -> Path | None:
        for version in self._catalog.versions(self.domain):
            path = self._catalog.folder(self.domain, version)
            try:
                manifest = Manifest.load(path)
            except DatastoreError:  # some other version that is damaged is none of our business
                continue
            same = {"version": wanted.version, "created": wanted.created}
            if essence(manifest).model_copy(update=same) == essence(wanted):
                return path
        return None


@contextmanager
def begin_update(catalog: Catalog, domain: str, *, wait: bool) -> Iterator[UpdateTransaction]:
    """Hold the domain's lock of updates, and begin at its current version.

    Raises UnknownDomain, UnknownVersion when no version is current, Conflict for a version of shards and when another
    process is changing the domain, unless this one is to `wait` for it.
    """
    catalog.versions(domain)
    folder = catalog.store / domain
    with disk_errors(folder / LOCK):
        (folder / LOCK).touch()
    with locked(folder / LOCK, wait=wait, doing=f"changing domain {domain}"):
        for draft in folder.glob(f"{DRAFT}*"):  # left by updates that were killed: nobody else has the lock
            discard(draft)
        version = catalog.current(domain)
        if version is None:
            raise UnknownVersion(
                f"domain {domain} has no current version to change: activate one, it has "
                f"{', '.join(catalog.versions(domain))}",
                param="version",
            )
        update = UpdateTransaction(catalog, domain, version)
        if update.manifest.shards:
            raise Conflict(
                f"version {version} of domain {domain} has {len(update.manifest.shards)} shards, and shards do not "
                f"change: build another version of all documents with `knnlm cluster build {domain}`",
                param="domain",
            )
        yield update


def remove_leftovers(folder: Path) -> None:
    """Remove what additions to the domain in `folder` left that were stopped more than a day ago and not continued."""
    for space in folder.glob(f"{ADDING}*"):
        try:
            with locked(space / BUILD_FOLDER / "lock", wait=False, doing="adding to the domain"):
                if _age(space) > LEFTOVER_SECONDS:
                    discard(space)
        except FileNotFoundError:  # half removed already
            discard(space)
        except Conflict:
            continue


def advice(manifest: Manifest) -> str | None:
    """A sentence when so much was added or removed that searches take longer than they need, else None."""
    added = manifest.entries - manifest.base_entries
    gone = manifest.entries - manifest.live_entries
    reasons = []
    if added > min(ADDED_SHARE * manifest.base_entries, ADDED_ENTRIES):
        reasons.append(f"{added:,} added entries are searched one by one beside the {manifest.base_entries:,} indexed")
    if gone > REMOVED_SHARE * manifest.entries:
        reasons.append(f"{gone:,} of {manifest.entries:,} entries are of removed documents")
    if not reasons:
        return None
    return f"{'; '.join(reasons)}: `knnlm compact {manifest.domain}` makes one index of what counts"


def _unchanged(manifest: Manifest) -> Manifest:
    return manifest


def _age(space: Path) -> float:
    """Seconds since something was last finished in a workspace."""
    places = (space, space / BUILD_FOLDER, space / BUILD_FOLDER / "parts")
    return time.time() - max(place.stat().st_mtime for place in places if place.exists())
