"""Serve what the demo built with `knnlm serve`, in the background, its log in build/demo.

python -m demo.services up      start it if it does not run, wait until it is ready, print the addresses
python -m demo.services down    stop what was started here: SIGTERM, wait for accepted work, SIGKILL after that
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "build" / "demo"
STORE = RUN / "store"
MODEL = ROOT / "models" / "pocket"
PID = RUN / "serve.pid"
LOG = RUN / "serve.log"
AGGREGATOR = "http://127.0.0.1:8000"
PORTS = (8000, 8001, 8002, 9001, 9002)
READY_SECONDS = 120
STOP_SECONDS = 70
MEMORY = RUN / "memories" / "numpy"


def command() -> list[str]:
    """What serves the store, and the memory where it was trained."""
    serve = [sys.executable, "-m", "knnlm.cli.main", "serve", "--model", str(MODEL), "--store", str(STORE)]
    return [*serve, "--memory", f"{MEMORY.name}={MEMORY}"] if MEMORY.is_dir() else serve


def up() -> None:
    """Raises SystemExit with the end of the log when the services do not become ready."""
    if not any(STORE.glob("*/CURRENT")):
        raise SystemExit(f"there is no domain in {STORE}: run `make demo` first")
    if _running() is not None:
        return
    for port in PORTS:
        _refuse_taken_port(port)
    with LOG.open("wb") as log:
        process = subprocess.Popen(command(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    PID.write_text(str(process.pid))
    deadline = time.monotonic() + READY_SECONDS
    while "\nready: " not in LOG.read_text(errors="replace"):
        if not _alive(process.pid) or time.monotonic() > deadline:
            tail = LOG.read_text(errors="replace").strip().splitlines()[-12:]
            raise SystemExit("the services did not become ready; the end of their log:\n" + "\n".join(tail))
        time.sleep(0.1)


def down() -> None:
    pid = _running()
    PID.unlink(missing_ok=True)
    if pid is None:
        print("nothing was running")
        return
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    if _alive(pid):
        os.kill(pid, signal.SIGKILL)
    print("stopped the services")


def addresses() -> str:
    return (
        f"  aggregator  {AGGREGATOR}/docs\n"
        "  lm          http://127.0.0.1:8001/docs   gRPC 127.0.0.1:9001\n"
        "  datastore   http://127.0.0.1:8002/docs   gRPC 127.0.0.1:9002\n"
        f"  log         {LOG.relative_to(ROOT)}   stop with `make down`, start again with `make up`"
    )


def _refuse_taken_port(port: int) -> None:
    """Another program's answers must not be taken for ours."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SystemExit(f"127.0.0.1:{port} is in use by a program that was not started here; stop it first")


def _running() -> int | None:
    """The process started here, if it still runs. An id may have been reused: the command line must be ours."""
    if not PID.exists():
        return None
    pid = int(PID.read_text())
    listing = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return pid if _alive(pid) and "knnlm.cli.main serve" in listing.stdout else None


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
