"""Versions opened on a Ray cluster, by its nodes, instead of in this process."""

from pathlib import Path
from typing import TYPE_CHECKING

from knnlm.cluster.connection import configure
from knnlm.errors import DatastoreError
from knnlm.protocols import Searching
from services.datastore.loaded import setting_errors
from services.datastore.settings import DatastoreSettings

if TYPE_CHECKING:
    from knnlm.cluster.applications import Applications


class ClusterOpener:
    """An Opener. All methods block; Ray is imported by `connect` and by nothing before."""

    def __init__(self, settings: DatastoreSettings) -> None:
        self._settings = settings
        self._applications: Applications | None = None

    def connect(self) -> "Applications":
        """Connect to the cluster; further calls return the same. Raises Unavailable when none answers, DatastoreError
        where Ray is not installed."""
        if self._applications is None:
            configure(self._settings.cluster)
            try:
                from knnlm.cluster.applications import Applications
            except ModuleNotFoundError as err:
                raise DatastoreError(f"--cluster needs {err.name}: pip install 'knnlm[cluster]'") from err
            applications = Applications(self._settings.cluster)
            applications.connect()
            self._applications = applications
        return self._applications

    def __call__(self, path: Path, memory_limit: int | None) -> Searching:
        """Open the version on the cluster. memory_limit is ignored: this process holds nothing of it. Raises as
        `connect` and knnlm.cluster.serving.open_version."""
        del memory_limit
        applications = self.connect()
        from knnlm.cluster.registry import ShardOptions
        from knnlm.cluster.serving import open_version

        settings = self._settings
        options = ShardOptions(
            index=settings.index or None,
            resident=settings.memory == "resident",
            device=settings.device,
            max_candidates=settings.max_candidates,
            check=settings.check,
            min_replicas=settings.shard_min_replicas,
            max_replicas=settings.shard_max_replicas,
            target_requests=settings.shard_target_requests,
            upscale_delay_s=settings.shard_upscale_delay_s,
            downscale_delay_s=settings.shard_downscale_delay_s,
            cpus=settings.shard_cpus,
            replicas_per_node=settings.shard_replicas_per_node,
        )
        with setting_errors(settings):
            return open_version(applications, path, options)

    def leave(self) -> None:
        """Wait no longer for versions that are being deployed; does not block."""
        if self._applications is not None:
            self._applications.leave()

    def close(self) -> None:
        """Leave the cluster; the applications of current versions stay."""
        if self._applications is not None:
            self._applications.close()
