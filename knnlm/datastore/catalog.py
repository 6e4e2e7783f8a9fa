"""The store: which domains and versions exist, and which version of a domain is current.

store/<domain>/<version>/ is a published version, immutable; store/<domain>/CURRENT names the one that answers. Whatever
begins with a dot is work in progress and is never listed. Knows nothing of what is inside a version but its manifest.
"""

import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from knnlm.datastore.files import disk_errors, locked, sync_folder, write_atomic
from knnlm.datastore.layout import CURRENT, HIGHEST, MANIFEST
from knnlm.datastore.manifest import Manifest
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreMismatch, InvalidRequest, UnknownDomain, UnknownVersion

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Catalog:
    """`store` need not exist yet: then there are no domains. Safe for several processes at once."""

    def __init__(self, store: str | Path) -> None:
        self.store = Path(store)

    def domains(self) -> list[str]:
        """Domains with at least one published version, in alphabetical order."""
        if not self.store.is_dir():
            return []
        return sorted(d.name for d in self.store.iterdir() if NAME.fullmatch(d.name) and self._published(d.name))

    def versions(self, domain: str) -> list[str]:
        """Published versions, oldest first as people number them: v2 before v10. Raises UnknownDomain."""
        versions = self._published(_checked(domain, "domain"))
        if not versions:
            known = ", ".join(self.domains()) or "none"
            raise UnknownDomain(f"unknown domain {domain!r}; in {self.store}: {known}", param="domain")
        return versions

    def current(self, domain: str) -> str | None:
        """The version that is to answer, None when none was ever activated. Raises UnknownDomain."""
        file = self.store / _checked(domain, "domain") / CURRENT
        try:
            version = file.read_text(encoding="utf-8").removesuffix("\n")
        except FileNotFoundError:
            self.versions(domain)
            return None
        except (OSError, UnicodeDecodeError) as err:
            self.versions(domain)
            raise DatastoreCorrupt(f"{file} cannot be read: {err}") from err
        if not self._is_published(domain, version):
            self.versions(domain)  # looks at all of them: only where something is wrong
        if not NAME.fullmatch(version):
            raise DatastoreCorrupt(f"{file} holds {version[:80]!r}, expected the name of a version in one line")
        return version

    def path(self, domain: str, version: str) -> Path:
        """The folder of a published version. Raises UnknownDomain or UnknownVersion, which list what exists."""
        if self._is_published(_checked(domain, "domain"), version):
            return self.store / domain / version
        versions = self.versions(domain)
        _checked(version, "version")
        raise UnknownVersion(
            f"domain {domain} has no version {version!r}; it has {', '.join(versions)}", param="version"
        )

    def activate(self, domain: str, version: str, instead_of: str | None = None) -> None:
        """Make a published version the current one; rolling back is the same. Replicas that watch the store follow.

        instead_of: only while this version is current, or `version` itself is. Raises as `path` does, Conflict when
        another one is current than `instead_of`, DatastoreCorrupt when the manifest is not valid, and DatastoreMismatch
        when the folder was moved here under another name.
        """
        manifest = Manifest.load(self.path(domain, version))
        if (manifest.domain, manifest.version) != (domain, version):
            raise DatastoreMismatch(
                f"{self.store / domain / version} was built as {manifest.domain}/{manifest.version}, "
                f"it cannot be activated as {domain}/{version}"
            )
        with locked(self.store / domain, wait=True, doing="changing the domain"):
            self.path(domain, version)  # it may have been removed while we waited
            if instead_of is not None and (current := self.current(domain)) not in (instead_of, version):
                raise Conflict(
                    f"version {version} of domain {domain} was published, but is not activated: it was made of "
                    f"{instead_of}, and meanwhile the domain was switched to {current}",
                    param="version",
                )
            with disk_errors(self.store / domain):
                for leftover in (self.store / domain).glob(f".{CURRENT}.*.tmp"):  # left by a kill
                    leftover.unlink()
            write_atomic(self.store / domain / CURRENT, f"{version}\n".encode())

    def remove(self, domain: str, version: str) -> None:
        """Delete a version for good. Raises Conflict for the current one, and as `path` does."""
        folder = self.store / _checked(domain, "domain")
        self.path(domain, version)
        with locked(folder, wait=True, doing="changing the domain"):
            if self.current(domain) == version:
                raise Conflict(
                    f"version {version} of domain {domain} is current: activate another one before it is removed",
                    param="version",
                )
            with disk_errors(self.path(domain, version)):
                self._keep_number(domain)
                # renamed first: a version that is half deleted must not be found
                self.path(domain, version).rename(folder / f".{version}.removed.{secrets.token_hex(4)}")
                sync_folder(folder)
                for leftover in folder.glob(".*.removed.*"):
                    shutil.rmtree(leftover)

    def next_version(self, domain: str) -> str:
        """What a build without a name of its own makes: the v<number> whose building was interrupted, the highest of
        several, else one more than the highest there ever was, or "v1". The domain need not exist."""
        published, begun = self._numbers(domain)
        unfinished = [number for number in begun if number not in published]
        return f"v{max(unfinished, default=max(*published, self._kept_number(domain), 0) + 1)}"

    def free_version(self, domain: str) -> str:
        """A name that was never published and is not being built: one more than the highest v<number>."""
        published, begun = self._numbers(domain)
        return f"v{max(*published, *begun, self._kept_number(domain), 0) + 1}"

    def folder(self, domain: str, version: str) -> Path:
        """Where a version is or will be; only the names are checked (InvalidRequest)."""
        if version == CURRENT.lower():  # the same file as CURRENT where case is not told apart
            raise InvalidRequest(f"version {version!r} is a name that the store needs itself", param="version")
        return self.store / _checked(domain, "domain") / _checked(version, "version")

    def _keep_number(self, domain: str) -> None:
        """Before a version is removed: its number must not name another one, which a replica could take for it."""
        highest = max(self._numbers(domain)[0], default=0)
        if highest > self._kept_number(domain):
            write_atomic(self.store / domain / HIGHEST, f"{highest}\n".encode())

    def _kept_number(self, domain: str) -> int:
        """The highest that a version had when one was removed; 0 when none ever was."""
        file = self.store / domain / HIGHEST
        try:
            return int(file.read_text(encoding="ascii"))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as err:
            raise DatastoreCorrupt(f"{file} cannot be read: {err}; expected the highest number of a version") from err

    def _numbers(self, domain: str) -> tuple[list[int], list[int]]:
        """Numbers of the versions v<number> that are published, and of those whose building has begun."""
        published = [int(v[1:]) for v in self._published(_checked(domain, "domain")) if re.fullmatch(r"v\d+", v)]
        begun = [re.fullmatch(r"\.v(\d+)\.building", f.name) for f in (self.store / domain).glob(".v*.building")]
        return published, [int(found[1]) for found in begun if found]

    def _published(self, domain: str) -> list[str]:
        folder = self.store / domain
        if not folder.is_dir():
            return []
        return sorted((v.name for v in folder.iterdir() if self._is_published(domain, v.name)), key=_natural)

    def _is_published(self, domain: str, version: str) -> bool:
        return NAME.fullmatch(version) is not None and (self.store / domain / version / MANIFEST).is_file()


def _checked(name: str, param: str) -> str:
    if not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{param} {name[:80]!r} is not a name: expected 1 to 64 of a-z, 0-9, '-', '_', '.', "
            "beginning with a letter or digit",
            param=param,
        )
    return name


def _natural(name: str) -> list[str | int]:
    """Digits compare as numbers: ["v", 2, ""] before ["v", 10, ""]; text and numbers alternate, so they never meet."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def version_path(store: str | Path, domain: str, version: str | None) -> Path:
    """The folder of a version, of the current one for None. Raises UnknownDomain and UnknownVersion."""
    return current_versions(store, [domain])[domain] if version is None else Catalog(Path(store)).path(domain, version)


def current_versions(store: str | Path | None, domains: Sequence[str] | None) -> dict[str, Path]:
    """The folder of the version that answers, for each of the domains; None: for all that have one. Raises
    UnknownDomain and UnknownVersion."""
    if store is None:
        if domains:
            raise InvalidRequest(f"domains {', '.join(domains)} were asked for, but no store", param="store")
        return {}
    catalog = Catalog(Path(store))
    paths = {}
    for domain in catalog.domains() if domains is None else domains:
        version = catalog.current(domain)
        if version is None and domains is None:  # none was activated yet; as the datastore service does
            continue
        if version is None:
            raise UnknownVersion(
                f"domain {domain} has no current version: activate one of {', '.join(catalog.versions(domain))}",
                param="domain",
            )
        paths[domain] = catalog.path(domain, version)
    return paths
