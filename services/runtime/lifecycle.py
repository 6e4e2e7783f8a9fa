"""A service's life in one process and one event loop: listen, load, serve, drain, end.

The faces listen from the first moment: /livez answers and /readyz says "loading" while models are read in a thread. On
SIGTERM or SIGINT readiness goes first, then nothing new is accepted, accepted work is finished, and the process ends
with 0. A second signal ends it at once.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import knnlm
from knnlm.errors import KnnlmError
from services.runtime.http import build_app
from services.runtime.http_server import HttpServer, StartupFailed, bind
from services.runtime.observability import configure_logs, event
from services.runtime.process import (
    SWITCH_INTERVAL_S,
    configure_malloc,
    end_with_stdin,
    keep_loaded,
    set_omp_wait_policy,
)
from services.runtime.rpc import RpcServer, address
from services.runtime.security import FileReloader, Reloadable, is_loopback
from services.runtime.service import Admission, Service
from services.runtime.settings import GrpcSettings, described, unknown_variables
from services.runtime.tls import server_tls

LOG = logging.getLogger(__name__)
FLUSH_SECONDS = 5.0  # for the last traces, at the end


def main(service: Service) -> NoReturn:
    """The whole process of a service: logs, life, end. Ends by SystemExit with 0, or 1 when it could not start.

    Its settings come from `load_settings`, which has ended the process with 2 where they are bad.
    """
    settings = service.settings
    configure_logs(settings.log_format, settings.log_level)
    configure_malloc(os.environ)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.disable()  # until `keep_loaded`: what is imported and loaded is no garbage
    set_omp_wait_policy(os.environ, service.omp_spins)
    end_with_stdin(os.environ)
    for name in unknown_variables(type(settings), os.environ):
        event(LOG, "unknown_setting", logging.WARNING, variable=name)
    event(LOG, "starting", service=service.name, version=knnlm.__version__, **described(settings))
    if not (settings.api_keys or settings.api_keys_file) and not is_loopback(settings.host):
        event(LOG, "open_to_all", logging.WARNING, advice=f"{settings.host} is no loopback address: set --api-keys")
    try:
        asyncio.run(until_signal(service))
    except StartupFailed as err:
        event(LOG, "failed", logging.CRITICAL, reason=str(err))
        _end(1)
    _end(0)


@asynccontextmanager
async def running(service: Service) -> AsyncIterator["Host"]:
    """A service listening and loaded inside this event loop; drained on leaving. For tests and notebooks."""
    host = Host(service)
    await host.listen()
    try:
        await host.load()
        yield host
    finally:
        await host.shut()


class Host:
    """The two faces over one core. `port` and `grpc_port` are the ones really listened on.

    Raises InvalidRequest that names the setting when a file of keys or certificates cannot be used.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._tls = server_tls(service.settings)
        self.admission = Admission(service)
        watched: list[Reloadable] = [self.admission.keys] if self.admission.keys.watched else []
        self._reloader = FileReloader([*watched, *([] if self._tls is None else [self._tls])])
        self.app = build_app(service, self.admission)
        self.port = 0
        self.grpc_port: int | None = None
        self._rpc = RpcServer(service, self.admission) if service.rpc else None
        self._http = HttpServer(self.app, service.settings, None if self._tls is None else self._tls.context)
        self._serving: asyncio.Task[None] | None = None

    async def listen(self) -> None:
        """Open both ports. Raises StartupFailed when one is taken."""
        settings = self.service.settings
        with contextlib.ExitStack() as undo:
            listener = undo.enter_context(bind(settings.host, settings.port, "--port"))
            self.port = listener.getsockname()[1]
            if self._rpc is not None and isinstance(settings, GrpcSettings):
                self.grpc_port = await self._listen_grpc(self._rpc, settings)
            undo.pop_all()
        self._serving = asyncio.create_task(self._http.serve(sockets=[listener]))
        self._reloader.start()
        faces = {"http": self.port, "grpc": self.grpc_port}
        addresses = {face: address(settings.host, port) for face, port in faces.items() if port is not None}
        secured = {} if self._tls is None else {"tls": "mutual" if self._tls.mutual else "server"}
        event(LOG, "listening", **addresses, **secured)

    async def _listen_grpc(self, rpc: RpcServer, settings: GrpcSettings) -> int:
        bind(settings.host, settings.grpc_port, "--grpc-port").close()  # gRPC's own message hides the reason
        try:
            credentials = None if self._tls is None else self._tls.credentials
            return await rpc.start(settings.host, settings.grpc_port, credentials)
        except RuntimeError as err:
            raise StartupFailed(f"cannot listen on {settings.host}:{settings.grpc_port} (--grpc-port): {err}") from err

    async def load(self, loaded: Callable[[], None] = lambda: None) -> None:
        """Load and start the core, then take requests. loaded: called when the core is loaded, before it starts:
        that may wait for another service without end."""
        await _in_daemon_thread(self.service.core.load, "load")
        loaded()
        await self.service.core.start()
        self.admission.readiness.enter("ready")
        if self._rpc is not None:
            await self._rpc.serving()
        event(LOG, "ready", service=self.service.name)

    async def shut(self) -> None:
        """Stop being ready, stop accepting, finish what was accepted, free the core."""
        event(LOG, "draining", service=self.service.name)
        settings = self.service.settings
        if self._rpc is not None:
            await self._rpc.draining()
        self.admission.readiness.enter("draining")
        self._http.end()
        stopping = [self._serving] if self._serving is not None else []
        if self._rpc is not None:
            stopping.append(asyncio.ensure_future(self._rpc.stop(settings.drain_timeout_s)))
        await asyncio.gather(*stopping)
        await self.service.core.close()
        await self._reloader.close()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await _in_daemon_thread(self.admission.tracing.close, "flush")
        except TimeoutError:
            event(LOG, "traces_lost", logging.WARNING, reason="the collector did not take them in time")
        event(LOG, "stopped", service=self.service.name)


async def until_signal(service: Service) -> None:
    """Serve until SIGTERM or SIGINT, and drain. Raises StartupFailed. Only in the main thread."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    try:
        host = Host(service)
    except KnnlmError as err:
        await service.core.close()
        raise StartupFailed(err.message) from err
    await host.listen()
    loading = asyncio.create_task(host.load(keep_loaded))
    waiting = asyncio.create_task(asked.wait())
    try:
        await asyncio.wait((loading, waiting), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            _raise_load_failure(loading)
            await waiting
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second signal does what it does to any program
        loading.cancel()
        (failure,) = await asyncio.gather(loading, return_exceptions=True)
        if isinstance(failure, Exception) and asked.is_set():  # else it is raised by now
            event(LOG, "load_failed", logging.WARNING, reason=f"{type(failure).__name__}: {failure}")
        await host.shut()


def _raise_load_failure(loading: "asyncio.Task[None]") -> None:
    try:
        loading.result()
    except (KnnlmError, OSError) as err:
        raise StartupFailed(str(err)) from err
    except Exception as err:  # the process edge
        event(LOG, "unhandled", logging.ERROR)
        raise StartupFailed(f"{type(err).__name__} while loading") from err


async def _in_daemon_thread(work: Callable[[], None], name: str) -> None:
    """Like asyncio.to_thread, but a process that is told to end need not wait for it."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(err: BaseException | None) -> None:
        if done.cancelled():
            return
        if err is None:
            done.set_result(None)
        else:
            done.set_exception(err)

    def run() -> None:
        failure: BaseException | None = None
        try:
            work()
        except BaseException as err:  # noqa: BLE001  the edge of the thread: raised again where it is awaited
            failure = err
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    await done


def _end(status: int) -> NoReturn:
    if any(thread.name in ("load", "flush") for thread in threading.enumerate()):
        # native code still runs in it: taking the interpreter down under it can crash, so leave without
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
