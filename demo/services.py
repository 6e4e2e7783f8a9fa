"""Start and stop the three services on this machine, each its own process, with logs in build/demo.

python -m demo.services up      start what is not running, wait until it is ready, print the addresses
python -m demo.services down    stop what was started here: SIGTERM, wait for accepted work, SIGKILL after that
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "build" / "demo"
STORE = RUN / "store"
MODEL = ROOT / "models" / "pocket"
PIDS = RUN / "services.json"
AGGREGATOR = "http://127.0.0.1:8000"
READY_SECONDS = 120
STOP_SECONDS = 40

COMMANDS = {
    "lm": ["services.lm", "--model", str(MODEL)],
    "datastore": ["services.datastore", "--store", str(STORE)],
    "aggregator": ["services.aggregator", "--lm-target", "127.0.0.1:9001", "--datastore-target", "127.0.0.1:9002"],
}
HTTP = {"lm": "http://127.0.0.1:8001", "datastore": "http://127.0.0.1:8002", "aggregator": AGGREGATOR}


def up() -> None:
    """Raises SystemExit with the end of a service's log when it does not become ready."""
    if not any(STORE.glob("*/CURRENT")):
        raise SystemExit(f"there is no domain in {STORE}: run `make demo` first")
    RUN.mkdir(parents=True, exist_ok=True)
    pids = _running()
    for name, command in COMMANDS.items():
        if name not in pids:
            _refuse_taken_port(name)
            with (RUN / f"{name}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", *command],
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            pids[name] = process.pid
            PIDS.write_text(json.dumps(pids))
    deadline = time.monotonic() + READY_SECONDS
    for name in COMMANDS:
        while not _ready(name):
            if not _alive(pids[name]) or time.monotonic() > deadline:
                tail = (RUN / f"{name}.log").read_text(errors="replace").strip().splitlines()[-5:]
                raise SystemExit(f"the {name} service did not become ready; the end of its log:\n" + "\n".join(tail))
            time.sleep(0.1)


def down() -> None:
    pids = _running()
    for name in reversed(COMMANDS):  # the aggregator first: it depends on the others
        if name not in pids:
            continue
        os.kill(pids[name], signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while _alive(pids[name]) and time.monotonic() < deadline:
            time.sleep(0.05)
        if _alive(pids[name]):
            os.kill(pids[name], signal.SIGKILL)
        print(f"stopped {name}")
    PIDS.unlink(missing_ok=True)
    if not pids:
        print("nothing was running")


def addresses() -> str:
    return (
        f"  aggregator  {AGGREGATOR}/docs\n"
        f"  lm          {HTTP['lm']}/docs   gRPC 127.0.0.1:9001\n"
        f"  datastore   {HTTP['datastore']}/docs   gRPC 127.0.0.1:9002\n"
        f"  logs        {RUN.relative_to(ROOT)}/*.log   stop with `make down`, start again with `make up`"
    )


def _refuse_taken_port(name: str) -> None:
    """Another program's answers must not be taken for ours."""
    address = HTTP[name].removeprefix("http://")
    host, port = address.split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))) == 0:
            raise SystemExit(f"{address} is in use by a program that was not started here; stop it first")


def _running() -> dict[str, int]:
    """The services started here that still run. A process id may have been reused: the command line must be ours."""
    if not PIDS.exists():
        return {}
    return {name: pid for name, pid in json.loads(PIDS.read_text()).items() if _alive(pid) and _is_ours(pid, name)}


def _is_ours(pid: int, name: str) -> bool:
    listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return COMMANDS[name][0] in listing.stdout


def _alive(pid: int) -> bool:
    try:
        finished, _ = os.waitpid(pid, os.WNOHANG)  # our own child would stay a zombie otherwise
        if finished:
            return False
    except ChildProcessError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _ready(name: str) -> bool:
    try:
        return httpx.get(f"{HTTP[name]}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    if sys.argv[1:] == ["up"]:
        up()
        print("the services are ready:\n" + addresses())
    elif sys.argv[1:] == ["down"]:
        down()
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
