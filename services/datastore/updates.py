"""Documents added to and removed from a domain while it answers.

Each update is a version of its own, made in a thread beside the searches, opened and warmed like any other, and made
current last: a search sees all of it or nothing. One update at a time; callers that ask meanwhile wait as long as their
deadlines allow. An update that has begun goes on when its caller no longer waits. At shutdown it stops at the next
batch: what was encoded stays on disk, and the same documents sent again continue there.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from prometheus_client import Counter

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.progress import Progress
from knnlm.datastore.text import check_id
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.updates.transaction import Activate
from knnlm.errors import DeadlineExceeded, InvalidRequest, TooLarge, Unavailable
from knnlm.messages import Document, DomainChange
from knnlm.options import MAX_ID_CHARACTERS
from knnlm.protocols import LanguageModel
from knnlm.transport.context import outgoing
from services.datastore.pool import Pool
from services.datastore.settings import DatastoreSettings
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics, event

LOG = logging.getLogger(__name__)

EncoderOpener = Callable[[], AbstractContextManager[LanguageModel]]


class DocumentUpdates:
    """open_encoder: what turns documents into keys, opened for each update; None while there is no lm service."""

    def __init__(
        self, settings: DatastoreSettings, metrics: Metrics, pool: Pool, open_encoder: EncoderOpener | None
    ) -> None:
        self._settings = settings
        self._catalog = Catalog(settings.store)
        self._pool = pool
        self.open_encoder = open_encoder
        self._turn = asyncio.Lock()
        self._running: set[asyncio.Task[DomainChange]] = set()
        self._closing = False
        self._documents = Counter(
            "knnlm_documents_changed_total", "Documents added to or removed from a domain while it was served.",
            ["domain", "change"], registry=metrics.registry,
        )  # fmt: skip

    async def add(
        self, domain: str, documents: Sequence[Document], *, replace: bool, call: RequestContext
    ) -> DomainChange:
        """What became of the domain; it answers from that version now.

        Raises InvalidRequest or TooLarge for documents that cannot be taken, Unavailable without an lm service,
        DeadlineExceeded when it takes longer (it goes on then), what `knnlm.datastore.updates.documents.add` raises.
        """
        self._check(domain, [document.id for document in documents], "documents")
        for number, document in enumerate(documents):
            check_id(document.id, f"the id of document {number}", param=f"documents.{number}.id")
            if not document.text.strip():
                raise InvalidRequest(f"the text of document {number} is empty", param=f"documents.{number}.text")
        opener = self.open_encoder
        if opener is None:
            raise Unavailable("no lm service is configured (--lm-target), so documents cannot be encoded here")

        def work(activate: Activate) -> DomainChange:
            with opener() as lm:
                return add(
                    documents, lm, self._catalog, domain,
                    replace=replace, activate=activate, on_progress=self._stop_when_closing,
                )  # fmt: skip

        return await self._finished(work, call)

    async def remove(self, domain: str, ids: Sequence[str], call: RequestContext) -> DomainChange:
        """What became of the domain. Raises NotFound for an id that is no document, and as `add` does."""
        self._check(domain, ids, "ids")
        return await self._finished(lambda activate: remove(ids, self._catalog, domain, activate=activate), call)

    async def close(self) -> None:
        """Refuse new updates and wait for the running one to stop."""
        self._closing = True
        await asyncio.gather(*self._running, return_exceptions=True)

    def _check(self, domain: str, ids: Sequence[str], param: str) -> None:
        self._pool.get(domain, None)  # a domain that is not served here is not grown here
        if not ids:
            raise InvalidRequest(f"{param} is empty: expected at least one", param=param)
        most = self._settings.max_documents
        if len(ids) > most:
            raise TooLarge(f"{param} may hold {most} at once, got {len(ids)} (--max-documents)", param=param)
        for number, name in enumerate(ids):
            if not 0 < len(name) <= MAX_ID_CHARACTERS:
                raise InvalidRequest(
                    f"an id must have 1 to {MAX_ID_CHARACTERS} characters, number {number} has {len(name)}", param=param
                )

    async def _finished(self, work: Callable[[Activate], DomainChange], call: RequestContext) -> DomainChange:
        try:
            async with asyncio.timeout(call.remaining()):
                await self._turn.acquire()
        except TimeoutError as err:  # what is not begun is not kept either: else there would be no end to what waits
            raise DeadlineExceeded("other changes took all of the request's time: nothing was changed") from err
        update = asyncio.create_task(self._update(work, call))
        self._running.add(update)
        update.add_done_callback(self._ended)
        try:
            async with asyncio.timeout(call.remaining()):
                return await asyncio.shield(update)
        except TimeoutError as err:
            raise DeadlineExceeded("the change is still being made: ask for the domain to see when it is done") from err

    async def _update(self, work: Callable[[Activate], DomainChange], call: RequestContext) -> DomainChange:
        """Make the update whose turn it is, and give the turn on."""
        loop = asyncio.get_running_loop()

        def activate(domain: str, version: str, instead_of: str) -> None:
            """Called in the worker thread: the pool's own activation, which opens and warms the version first."""
            asyncio.run_coroutine_threadsafe(self._pool.activate(domain, version, instead_of), loop).result()

        try:
            if self._closing:
                raise Unavailable("the service is shutting down")
            with outgoing(request_id=call.id):  # without its deadline: the work goes on when nobody waits any more
                made = await asyncio.to_thread(work, activate)
        finally:
            self._turn.release()
        self._documents.labels(made.domain, "added").inc(made.added_documents)
        self._documents.labels(made.domain, "removed").inc(made.removed_documents)
        event(
            LOG, "domain_changed", domain=made.domain, version=made.version, parent=made.parent,
            added=made.added_documents, removed=made.removed_documents,
        )  # fmt: skip
        return made

    def _stop_when_closing(self, progress: Progress) -> None:
        del progress
        if self._closing:
            raise Unavailable("the service is shutting down; what was encoded is kept, send the documents again")

    def _ended(self, update: "asyncio.Task[DomainChange]") -> None:
        self._running.discard(update)
        if not update.cancelled() and (err := update.exception()) is not None:
            event(LOG, "change_failed", logging.WARNING, reason=str(err))
