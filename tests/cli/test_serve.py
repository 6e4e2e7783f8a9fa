"""`knnlm serve` as its users run it: three real processes, one command; and over stand-ins for the services, where only
what the command itself does with its children is in question.
"""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from knnlm import Client, MemoryOptions
from knnlm.cli import serve
from knnlm.cli.serve import environment, home
from knnlm.errors import KnnlmError
from tests.services.processes import ROOT

SECONDS = 120  # for any step: far more than it takes
COMMAND = ["-m", "knnlm.cli.main"]
ELSEWHERE = """
from pathlib import Path
from knnlm.cli import main, serve
serve.home = Path.cwd
main.main()
"""
STAND_IN = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("event=ready", flush=True)
signal.sigwait([signal.SIGTERM])
print("event=stopped", flush=True)
"""


class Serving:
    """A running `knnlm serve` whose lines are kept."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            with self._changed:
                self.lines.append(line)
                self._changed.notify_all()

    def line(self, matches: Callable[[str], bool]) -> str:
        """The first line that matches; waits for it."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(matches, self.lines)), SECONDS), "".join(self.lines)
            return next(filter(matches, self.lines))

    def end(self) -> int:
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError("it does not end:\n" + "".join(self.lines)) from None
        self._reader.join()
        return code

    def children(self) -> dict[str, int]:
        """Process ids by service."""
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
        rows = (line.split(None, 2) for line in listing.stdout.splitlines())
        mine = [(int(pid), args) for pid, parent, args in rows if int(parent) == self.process.pid]
        return {found[1]: pid for pid, args in mine if (found := re.search(r"-m services\.(\w+)$", args))}


@contextmanager
def serving(
    model: object, store: Path, folder: Path, *flags: str, command: Sequence[str] = COMMAND, **variables: str
) -> Iterator[Serving]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    ports = [word for name in ("port", "lm-port", "lm-grpc-port", "datastore-port", "datastore-grpc-port")
             for word in (f"--{name}", "0")]  # fmt: skip
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as nohup may have set it for the tests
    process = subprocess.Popen(
        [sys.executable, *command, "serve", "--model", str(model), "--store", str(store), *ports, *flags],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    signal.signal(signal.SIGHUP, ignored)
    running = Serving(process)
    try:
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        running.end()
        if process.stdout is not None:
            process.stdout.close()


def serving_stand_ins(folder: Path) -> AbstractContextManager[Serving]:
    """Children that are ready at once, say what the services say, and end when they are told to."""
    for name, text in (
        *((f"{service}/__main__", STAND_IN) for service in ("lm", "datastore", "aggregator")), ("runtime/probe", ""),
    ):  # fmt: skip
        path = folder / "services" / f"{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    (folder / "services" / "__init__.py").touch()
    return serving("any", folder / "store", folder, command=["-c", ELSEWHERE])


@pytest.mark.slow
def test_one_command_serves_a_model_and_a_store_until_it_is_told_to_end(
    model: Path, built: Path, tmp_path: Path
) -> None:
    flags = ["--device", "cpu", "--memory", f"mine={model}"]  # a model may be its own memory
    with serving(model, built, tmp_path, *flags, KNNLM_AGGREGATOR_API_KEYS="secret") as running:
        running.line(lambda line: line.startswith("ready: http://127.0.0.1:"))
        command = running.line(lambda line: line.startswith("  curl "))
        request = [*shlex.split(command), "-H", "Authorization: Bearer secret", "-w", "%{http_code}"]
        asked = subprocess.run(request, capture_output=True, text=True, check=True)
        assert asked.stdout.endswith("200"), asked.stdout
        assert '"domain":"toy"' in asked.stdout
        assert set(running.children()) == {"lm", "datastore", "aggregator"}
        url = running.line(lambda line: line.startswith("ready: ")).split()[1]
        with Client(url, api_key="secret") as client:
            mixed = client.next_token("the cat", memory=MemoryOptions("mine", 0.5))
            alone = client.next_token("the cat")
        assert [(m.name, m.lmbda) for m in mixed.memories] == [("mine", 0.5)]
        assert [t.p for t in mixed.results[0].top] == pytest.approx([t.p for t in alone.results[0].top])
        running.process.send_signal(signal.SIGTERM)
        assert running.end() == 0
        stopped = [line.split("|")[0].strip() for line in running.lines if "event=stopped" in line]
        assert stopped == ["aggregator", "memory mine", "datastore", "lm"]


def test_a_memory_that_is_no_folder_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(KnnlmError, match=f"--memory law=nowhere: there is no folder {Path.cwd() / 'nowhere'}"):
        serve._memories(["law=nowhere"])
    targets, decoders = serve._memories([str(tmp_path)])
    port = decoders[f"memory {tmp_path.name}"]["KNNLM_LM_GRPC_PORT"]
    assert targets == [f"{tmp_path.name}=127.0.0.1:{port}"]


def test_a_service_that_dies_ends_the_others_and_its_last_words_are_shown(tmp_path: Path) -> None:
    with serving_stand_ins(tmp_path) as running:
        running.line(lambda line: line.startswith("ready: "))
        os.kill(running.children()["datastore"], signal.SIGKILL)
        assert running.end() == 1
        told = running.lines.index("error: the datastore service ended by signal 9; the end of its log:\n")
        assert any(line.startswith("  ") and "event=ready" in line for line in running.lines[told:])
        assert not running.children()


@pytest.mark.parametrize("signals", [[signal.SIGHUP] * 2, [signal.SIGINT], [signal.SIGTERM]])
def test_a_signal_or_a_closed_terminal_ends_all(tmp_path: Path, signals: list[signal.Signals]) -> None:
    """SIGHUP comes from the shell and from the system."""
    with serving_stand_ins(tmp_path) as running:
        running.line(lambda line: line.startswith("ready: "))
        assert set(running.children()) == {"lm", "datastore", "aggregator"}
        for number in signals:
            running.process.send_signal(number)
            time.sleep(0.2)
        assert running.end() == 0
        stopped = [line.split("|")[0].strip() for line in running.lines if "event=stopped" in line]
        assert stopped == ["aggregator", "datastore", "lm"]


def test_what_services_say_is_taken_from_them_when_nobody_can_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> None:
        raise OSError(5, text)

    monkeypatch.setattr(serve, "remark", gone)
    serve._say("x")


def test_services_end_when_the_command_was_killed(model: Path, built: Path, tmp_path: Path) -> None:
    def alive(pid: int) -> bool:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        return bool(state) and not state.startswith("Z")

    with serving(model, built, tmp_path) as running:
        running.line(lambda line: line.startswith("lm") and "event=ready" in line)
        children = running.children()
        assert {"lm", "datastore"} <= set(children)
        running.process.kill()
        assert running.end() == -signal.SIGKILL
        until = time.monotonic() + SECONDS
        while any(map(alive, children.values())):
            assert time.monotonic() < until, children
            time.sleep(0.02)


def test_a_port_that_is_taken_is_the_error_of_the_command_before_anything_is_started(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving("model", tmp_path, tmp_path, "--lm-grpc-port", str(port)) as running:
            assert running.end() == 1
            assert len(running.lines) == 1
            said = f"error: cannot listen on 127.0.0.1:{port} (--lm-grpc-port): Address already in use"
            assert running.lines[0].startswith(said)


def test_two_services_cannot_have_one_port() -> None:
    port = serve._free_port()
    with pytest.raises(KnnlmError, match=rf"127\.0\.0\.1:{port} \(--port\)"):
        serve._check_ports(environment({"KNNLM_LM_PORT": str(port), "KNNLM_AGGREGATOR_PORT": str(port)}, {
            "KNNLM_LM_GRPC_PORT": "0", "KNNLM_DATASTORE_PORT": "0", "KNNLM_DATASTORE_GRPC_PORT": "0",
        }))  # fmt: skip


def test_what_a_service_cannot_start_with_is_the_error_of_the_command(tmp_path: Path) -> None:
    with serving("nowhere/model", tmp_path / "store", tmp_path, KNNLM_LM_MAX_TOKENS="many") as running:
        assert running.end() == 2  # as the service itself ends for a bad setting
        assert "error: the lm service ended with 2; the end of its log:\n" in running.lines
        assert any(line.startswith("  ") and "KNNLM_LM_MAX_TOKENS" in line for line in running.lines)


def test_options_win_over_the_environment_and_that_over_what_fits_together() -> None:
    given = {"KNNLM_LM_GRPC_PORT": "7001", "KNNLM_DATASTORE_GRPC_PORT": "0"}
    said = {
        "KNNLM_LM_GRPC_PORT": "1", "KNNLM_LM_HOST": "::", "KNNLM_AGGREGATOR_PORT": "7000", "OTHER": "x",
    }  # fmt: skip
    found = environment(given, said)
    assert found["KNNLM_AGGREGATOR_LM_TARGET"] == found["KNNLM_DATASTORE_LM_TARGET"] == "[::1]:7001"
    assert found["KNNLM_DATASTORE_GRPC_PORT"] not in ("0", "9002")
    assert found["KNNLM_AGGREGATOR_DATASTORE_TARGET"] == f"127.0.0.1:{found['KNNLM_DATASTORE_GRPC_PORT']}"
    assert (found["KNNLM_AGGREGATOR_PORT"], found["KNNLM_LM_PORT"], found["OTHER"]) == ("7000", "8001", "x")
    assert environment({}, {"KNNLM_AGGREGATOR_LM_TARGET": "far:1"})["KNNLM_AGGREGATOR_LM_TARGET"] == "far:1"


def test_default_ports_are_those_of_the_services() -> None:
    from services.aggregator.settings import AggregatorSettings
    from services.datastore.settings import DatastoreSettings
    from services.lm.settings import LmSettings

    found = environment({}, {})
    for cls in (LmSettings, DatastoreSettings, AggregatorSettings):
        for name, field in cls.model_fields.items():
            if name in ("port", "grpc_port"):
                assert found[f"{cls.model_config['env_prefix']}{name.upper()}"] == str(field.default)


def test_the_services_are_found_beside_the_library() -> None:
    assert home() == ROOT
