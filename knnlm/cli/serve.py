"""`knnlm serve`: the three services over one model and one store, each its own process, started and stopped together.

They are configured through their environment alone, as in a container, so that whatever else is set there
(KNNLM_DATASTORE_MEMORY, KNNLM_AGGREGATOR_ADMIN_API_KEYS, ...) holds as well, and their own probe finds them with it.
Nothing of them is imported here.
"""

import importlib.util
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

import knnlm
from knnlm.cli.common import DEFAULT_STORE, DeviceOption, ModelOption, StoreOption, remark
from knnlm.errors import KnnlmError

NEEDED = ("torch", "faiss", "grpc", "fastapi")  # one package of each extra that the services need
DEFAULTS = {  # where nobody says otherwise; as in the services' settings
    "LM_PORT": "8001", "LM_GRPC_PORT": "9001", "DATASTORE_PORT": "8002", "DATASTORE_GRPC_PORT": "9002",
    "AGGREGATOR_PORT": "8000",
}  # fmt: skip
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed
LOOK_SECONDS = 0.3
STOP_SECONDS = 60.0  # more than a service takes to finish what it accepted
TAIL_LINES = 10

Port = Annotated[int | None, typer.Option(help="HTTP port of the aggregator, 8000. Any port that is 0: a free one.")]
LmPort = Annotated[int | None, typer.Option(help="HTTP port of the lm service, 8001.")]
LmGrpcPort = Annotated[int | None, typer.Option(help="gRPC port of the lm service, 9001.")]
DatastorePort = Annotated[int | None, typer.Option(help="HTTP port of the datastore service, 8002.")]
DatastoreGrpcPort = Annotated[int | None, typer.Option(help="gRPC port of the datastore service, 9002.")]


def serve(
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    host: Annotated[
        str | None, typer.Option(help="Address that the aggregator listens on, 127.0.0.1; 0.0.0.0 for every interface.")
    ] = None,
    port: Port = None,
    lm_port: LmPort = None,
    lm_grpc_port: LmGrpcPort = None,
    datastore_port: DatastorePort = None,
    datastore_grpc_port: DatastoreGrpcPort = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            help="Mix this Memory Decoder, too: its folder, with NAME= before it for another name; may be repeated."
        ),
    ] = None,
    device: DeviceOption = "auto",
) -> int:
    """Serve a model and a store: lm, datastore and aggregator together, until Ctrl-C."""
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"no module named {package}", name=package)
    given = {
        "LM_MODEL": model, "LM_DEVICE": None if device == "auto" else device, "DATASTORE_STORE": str(store.absolute()),
        "AGGREGATOR_HOST": host, "AGGREGATOR_PORT": port, "LM_PORT": lm_port, "LM_GRPC_PORT": lm_grpc_port,
        "DATASTORE_PORT": datastore_port, "DATASTORE_GRPC_PORT": datastore_grpc_port,
    }  # fmt: skip
    targets, decoders = _memories(memory or [])
    if targets:
        given["AGGREGATOR_MEMORY"] = ",".join(targets)
    settings = environment({f"KNNLM_{name}": str(value) for name, value in given.items() if value is not None})
    folder = home()
    _check_ports(settings)
    with ServiceGroup(folder, settings) as group:
        for names in (("lm", "datastore", *decoders), ("aggregator",)):
            for name in names:
                group.start(name, decoders.get(name))
            for name in names:
                if not group.wait_until_ready(name):
                    return group.exit_code
        _greet(settings, store)
        group.wait()
        return group.exit_code


def _memories(given: Sequence[str]) -> tuple[list[str], dict[str, dict[str, str]]]:
    """What the aggregator is told of each memory; and by the names of their processes the variables of those that run
    as lm services of their own. Raises KnnlmError for a folder that is none, and as MemoryManifest.open."""
    from knnlm.cli.retrieval import MemoryChoice
    from knnlm.memory.manifest import MEMORY, MemoryManifest

    targets, decoders = [], {}
    for one in given:
        ((name, where),) = MemoryChoice(one, None).here()[1].items()
        folder = Path(where).absolute()
        if not folder.is_dir():
            raise KnnlmError(f"--memory {one}: there is no folder {folder}")
        if (folder / MEMORY).is_file() and MemoryManifest.open(folder).kind == "mlp":
            targets.append(f"{name}={folder}")
            continue
        http, grpc = str(_free_port()), str(_free_port())
        variables = {"MODEL": str(folder), "PORT": http, "GRPC_PORT": grpc, "HOST": "127.0.0.1"}
        decoders[f"memory {name}"] = {f"KNNLM_LM_{variable}": value for variable, value in variables.items()}
        targets.append(f"{name}=127.0.0.1:{grpc}")
    return targets, decoders


def home() -> Path:
    """The folder that the package `services` lies in: the repository, or its place in an installed wheel.

    Raises KnnlmError where there is neither.
    """
    beside = Path(knnlm.__file__).resolve().parent.parent
    for folder in (beside, beside / "knnlm_servers"):
        if (folder / "services" / "runtime").is_dir():
            return folder
    raise KnnlmError(f"the services are not installed beside {beside / 'knnlm'}: install the wheel or the repository")


def variables_of(service: str, given: Mapping[str, object]) -> dict[str, str]:
    """This process's variables with those of one service's settings, by their names; a variable that is set already
    holds where a setting is None."""
    return {**os.environ, **{f"KNNLM_{service}_{name}": str(v) for name, v in given.items() if v is not None}}


def environment(given: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for all three services: what is given, else what `environ` says, else that each finds the others.

    Ports that are 0 become free ones.
    """
    found = {**environ, **given}
    for name, port in DEFAULTS.items():
        asked = found.get(f"KNNLM_{name}") or port
        found[f"KNNLM_{name}"] = str(_free_port()) if asked == "0" else asked
    lm, datastore = (_address(found, service, "GRPC_PORT") for service in ("LM", "DATASTORE"))
    for name, address in (("AGGREGATOR_LM", lm), ("AGGREGATOR_DATASTORE", datastore), ("DATASTORE_LM", lm)):
        found.setdefault(f"KNNLM_{name}_TARGET", address)
    return found


class ServiceGroup:
    """Child processes that live and end together. Leaving stops those that run, the one started last first.

    SIGNALS end `wait` and `wait_until_ready`; a second one kills, unless it is SIGHUP, which comes from the shell and
    from the system. Children end by themselves when this process does without stopping them. exit_code: 0, or what it
    was that ended.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        path = os.pathsep.join(part for part in (str(folder), settings.get("PYTHONPATH")) if part)
        self._environment = {
            **settings, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "KNNLM_END_WITH_STDIN": "1",
        }  # fmt: skip
        self._others: dict[str, Mapping[str, str]] = {}  # variables of a child's own
        self._children: dict[str, subprocess.Popen[str]] = {}
        self._readers: dict[str, threading.Thread] = {}
        self._tails: dict[str, deque[str]] = {}
        self._asked = False  # no Event: setting one in a handler that interrupts its wait may never return
        self._handlers: dict[signal.Signals, signal._HANDLER] = {}  # as they were
        self.exit_code = 0

    def __enter__(self) -> "ServiceGroup":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *raised: object) -> None:
        for name in reversed(self._children):
            child = self._children[name]
            if child.poll() is None:
                child.terminate()
                try:
                    child.wait(STOP_SECONDS)
                except subprocess.TimeoutExpired:
                    _say(f"the {name} service does not end: killed")
                    child.kill()
            self._readers[name].join()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(self, name: str, own: Mapping[str, str] | None = None) -> None:
        """own: variables of an lm service that runs under another name."""
        if own is not None:
            self._others[name] = own
        child = subprocess.Popen(
            [sys.executable, "-m", f"services.{self._service(name)}"],
            env=self._variables(name), text=True, errors="replace",
            stdin=subprocess.PIPE,  # whose end tells it that this process has ended, however that was
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops them in order
        )  # fmt: skip
        tail: deque[str] = deque(maxlen=TAIL_LINES)

        def read() -> None:
            for line in child.stdout or ():
                tail.append(line.rstrip("\n"))
                _say(f"{name:10} | {tail[-1]}")

        self._children[name], self._tails[name] = child, tail
        self._readers[name] = threading.Thread(target=read, name=name)
        self._readers[name].start()

    def wait_until_ready(self, name: str) -> bool:
        """False when a service ended or the person at the terminal wants it to."""
        probe, variables = [sys.executable, "-m", "services.runtime.probe", self._service(name)], self._variables(name)
        return self._until(
            lambda: subprocess.run(probe, env=variables, capture_output=True, check=False).returncode == 0
        )

    def _service(self, name: str) -> str:
        return "lm" if name in self._others else name

    def _variables(self, name: str) -> dict[str, str]:
        return {**self._environment, **self._others.get(name, {})}

    def wait(self) -> None:
        self._until(lambda: False)

    def _until(self, done: Callable[[], bool]) -> bool:
        while not self._asked:
            for name, child in self._children.items():
                if child.poll() is not None:
                    self._tell_end(name, child.returncode)
                    return False
            if done():
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def _tell_end(self, name: str, code: int) -> None:
        self._readers[name].join()  # all it said
        ended = f"by signal {-code}" if code < 0 else f"with {code}"
        _say(f"error: the {name} service ended {ended}; the end of its log:")
        for line in self._tails[name]:
            _say(f"  {line}")
        self.exit_code = code if code > 0 else 1

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  as signal.signal wants it
        if self._asked and number != signal.SIGHUP:
            for child in self._children.values():
                child.kill()
        self._asked = True


def _say(text: str) -> None:
    """A remark, where somebody can still read it: what the services say is taken from them in any case."""
    with suppress(OSError):  # the terminal was closed
        remark(text)


def _check_ports(settings: Mapping[str, str]) -> None:
    """Raises KnnlmError, naming the option, for a port that is taken: whoever has it would be asked in our stead."""
    with ExitStack() as held:  # together, so that none of them is another's
        for name in DEFAULTS:
            host = settings.get(f"KNNLM_{name.split('_')[0]}_HOST") or "127.0.0.1"
            port = settings[f"KNNLM_{name}"]
            if not port.isdecimal() or int(port) > 65535:
                continue  # the service says what is wrong with it
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            try:
                held.enter_context(socket.create_server((host, int(port)), family=family))
            except OSError as err:
                option = "--" + name.removeprefix("AGGREGATOR_").lower().replace("_", "-")
                raise KnnlmError(f"cannot listen on {host}:{port} ({option}): {err.strerror or err}") from err


def _greet(settings: Mapping[str, str], store: Path) -> None:
    from knnlm.datastore.catalog import Catalog

    scheme = "https" if settings.get("KNNLM_AGGREGATOR_TLS_CERT_FILE") else "http"
    url = f"{scheme}://{_address(settings, 'AGGREGATOR', 'PORT')}"
    catalog = Catalog(store)
    domain = next((domain for domain in catalog.domains() if catalog.current(domain)), None) if store.is_dir() else None
    knn = f', "knn": {{"domain": "{domain}"}}, "neighbors": 3' if domain else ""
    body = shlex.quote(f'{{"text": "The"{knn}}}')
    print(f"ready: {url} (its API: {url}/docs; Ctrl-C stops all)")
    print(f"  curl -s {url}/v1/next_token -H 'content-type: application/json' -d {body}", flush=True)


def _address(settings: Mapping[str, str], service: str, port: str) -> str:
    """Where a service is reached from this machine."""
    host = settings.get(f"KNNLM_{service}_HOST") or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  listens everywhere
    return f"{f'[{host}]' if ':' in host else host}:{settings[f'KNNLM_{service}_{port}']}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number
