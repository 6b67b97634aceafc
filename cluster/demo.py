"""A cluster on one machine: a search is submitted, stopped half way, and submitted again.

    python cluster/demo.py [--recipe demo] [--run-dir DIR] [--screenshot FILE]
                           [--section.field VALUE ...]

A Ray head without CPUs and two worker nodes of one CPU each run as processes of their own, with
token authentication as in the manifests. A first job runs undisturbed and says how many units there
are; a second one is stopped after half of them and submitted again. Exit status 0 means that both
ended in the same bytes of winner.json, 1 that something went wrong, 130 an interruption. Whatever
happens, all processes that were started here are stopped, and no others.
"""

import argparse
import ctypes
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from longrope2_ray.report.progress import format_best, format_seconds
from longrope2_ray.report.tables import format_table
from longrope2_ray.search.scores import Score, scores_of
from longrope2_ray.search.status import Status, read_status
from longrope2_ray.search.winner import WINNER_FILE, read_winner
from longrope2_ray.storage.ledger import Ledger
from longrope2_ray.storage.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS, STOP_SECONDS, PRINT_SECONDS = 300, 60, 10


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """Ray nodes on this machine, each a process of its own with a folder of its own."""

    def __init__(self) -> None:
        # A short path: those of sockets may have 107 bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __len__(self) -> int:
        return len(self._processes)

    def start(self, *options: str) -> None:
        """Start one node, out of reach of the terminal's Ctrl-C.

        Nodes on one machine share neither folder nor port of the agent.
        """
        temp_dir = self._folder / str(len(self))
        temp_dir.mkdir()
        command = [
            RAY,
            "start",
            *options,
            "--block",
            f"--temp-dir={temp_dir}",
            "--object-store-memory=100000000",
            f"--dashboard-agent-listen-port={free_port()}",
            "--disable-usage-stats",
        ]
        with open(temp_dir / "start.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._processes.append(process)

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Return the first true answer; a head that is still starting answers with errors.

        Raises:
            RuntimeError: if a node ends or there is no true answer; with the end of its log.
        """
        answer = None
        for _ in range(START_SECONDS):
            for i, process in enumerate(self._processes):
                if process.poll() is not None:
                    log = (self._folder / str(i) / "start.log").read_text()
                    raise RuntimeError(f"node {i} ended: {log[-2000:]}")
            try:
                if answer := condition():
                    return answer
            except Exception as error:
                answer = error
            time.sleep(1)
        raise RuntimeError(f"the cluster did not come up within {START_SECONDS} s: {answer}")

    def stop(self) -> None:
        """Stop all nodes and what they have started."""
        for process in reversed(self._processes):
            process.terminate()
        psutil.wait_procs(psutil.Process().children(), timeout=STOP_SECONDS)
        while left := psutil.Process().children(recursive=True):
            for child in left:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def local_cluster(num_workers: int = 2) -> Iterator[Any]:
    """Keep a head and worker nodes for a ``with`` block, and yield a client of the head's job API.

    The cluster's token stands in ``os.environ``, where every Ray command that is started here finds
    it.

    Raises:
        RuntimeError: if a node ends or does not come up; with the end of its log.
    """
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    # The jobs run with this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Imported only now, since Ray reads the environment when it is imported.
    from ray.job_submission import JobSubmissionClient
    from ray.util.state import list_nodes

    if sys.platform == "linux":
        # PR_SET_CHILD_SUBREAPER: a process whose parent ends becomes a child of this one, so that
        # none is missed at the end.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    nodes = Nodes()
    gcs, dashboard, client_server = free_port(), free_port(), free_port()
    address = f"http://127.0.0.1:{dashboard}"
    try:
        nodes.start(
            "--head",
            "--num-cpus=0",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client_server}",
        )
        client = nodes.wait_for(lambda: JobSubmissionClient(address))
        for _ in range(num_workers):
            nodes.start(f"--address=127.0.0.1:{gcs}", "--num-cpus=1")
        nodes.wait_for(
            lambda: sum(node.state == "ALIVE" for node in list_nodes(address=address)) == len(nodes)
        )
        print(
            f"dashboard {address}, token authentication, {num_workers} worker nodes of one CPU",
            flush=True,
        )
        yield client
    finally:
        # A second Ctrl-C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        nodes.stop()


def ray_job(client: Any, *arguments: str) -> None:
    """Show and run one ``ray job`` command."""
    print("\n$ ray job", shlex.join(arguments), flush=True)
    environment = {**os.environ, "RAY_ADDRESS": client.get_address()}
    done = subprocess.run(
        [RAY, "job", *arguments], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(
            f"ray job {arguments[0]} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )


def submit(client: Any, job: str, recipe: Sequence[str], run_dir: Path) -> None:
    """Submit a search that has time to commit what was scored when it is stopped.

    Ray's own default is 3 seconds.
    """
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}})
    options = ["--no-wait", "--submission-id", job, "--working-dir", "."]
    command = ["python", "jobs/search.py", *recipe, "--run-dir", str(run_dir)]
    ray_job(client, "submit", *options, "--runtime-env-json", environment, "--", *command)


def follow(
    client: Any, job: str, run_dir: Path, expected: str, until_units: float = float("inf")
) -> None:
    """Print where a job stands until it has ended, or has scored ``until_units``.

    Raises:
        RuntimeError: if its status is another one than ``expected`` then; with the end of its log.
    """
    shown, printed = None, 0.0
    while True:
        state, status = client.get_job_status(job), read_status(RunDir(str(run_dir)))
        now = (state, status and status.state, status and status.generation)
        if now != shown or time.monotonic() - printed > PRINT_SECONDS:
            shown, printed = now, time.monotonic()
            print(f"{job}: {state}", _progress(status), sep=", ", flush=True)
        if state.is_terminal() or (status and status.units_done >= until_units):
            break
        time.sleep(0.5)
    if state != expected:
        raise RuntimeError(
            f"{job}: expected {expected}, got {state}; its log ends with\n"
            f"{client.get_job_logs(job)[-3000:]}"
        )


def _progress(status: Status | None) -> str:
    if status is None:
        return "nothing scored yet"
    parts = [
        status.state,
        f"generation {status.generation} of {status.iterations}",
        format_best(status),
        f"{status.units_done} units",
        f"ETA {format_seconds(status.eta_seconds)}",
    ]
    return ", ".join(filter(None, parts))


def demo(
    client: Any, recipe: Sequence[str], run_dir: Path, picture: Callable[[Any], None] | None
) -> bool:
    """Search undisturbed, search with a stop, and compare.

    Args:
        picture: is called with the client in the middle of the second search.

    Returns:
        Whether no unit was lost and the winners are the same bytes.
    """
    whole, stopped = run_dir / "undisturbed", run_dir / "stopped"
    submit(client, "undisturbed", recipe, whole)
    follow(client, "undisturbed", whole, "SUCCEEDED")
    units = len(ledger_of(whole))

    submit(client, "attempt-1", recipe, stopped)
    follow(client, "attempt-1", stopped, "RUNNING", until_units=units / 2)
    ray_job(client, "stop", "attempt-1")
    follow(client, "attempt-1", stopped, "STOPPED")
    if "what is done is kept" not in (output := client.get_job_logs("attempt-1")):
        raise RuntimeError(f"attempt-1: expected a clean end, got\n{output[-3000:]}")
    kept = ledger_of(stopped)
    print(f"attempt-1 ended cleanly, {len(kept)} of {units} units are in its ledger", flush=True)

    submit(client, "attempt-2", recipe, stopped)
    if picture:
        follow(client, "attempt-2", stopped, "RUNNING", until_units=len(kept) + 1)
        picture(client)
    follow(client, "attempt-2", stopped, "SUCCEEDED")
    return compare(whole, stopped, kept)


def compare(whole: Path, stopped: Path, kept: Mapping[Hashable, Score]) -> bool:
    """Print the result of both searches.

    Args:
        kept: the ledger at the stop.

    Returns:
        Whether no unit was lost and the winners are the same bytes.
    """
    # A row says who scored it and when, so one that was scored again is another row.
    ledger = ledger_of(stopped)
    lost = sum(ledger.get(key) != score for key, score in kept.items())
    same = (stopped / WINNER_FILE).read_bytes() == (whole / WINNER_FILE).read_bytes()
    if winner := read_winner(RunDir(str(stopped))):
        print(f"\n{format_table(winner)}\n")
    after = len(ledger) - len(kept)
    print(f"{len(kept)} units before the stop and {after} after it; lost or scored again: {lost}")
    verdict = "the same bytes as" if same else "NOT the bytes of"
    print(f"{WINNER_FILE}: {verdict} the undisturbed run's\n{whole}\n{stopped}")
    return same and not lost


def ledger_of(run_dir: Path) -> Ledger[Score]:
    """Read what a run has committed."""
    return scores_of(RunDir(str(run_dir))).load()


def screenshot(browser: str, file: Path, client: Any) -> None:
    """Write a picture of the actors in the dashboard, logged in.

    The dashboard takes its token from a cookie, and cookies do not look at ports: a server beside
    it sets one and sends the browser on, so the token is on no command line.
    """

    class Login(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header(
                "Set-Cookie", f"ray-authentication-token={os.environ['RAY_AUTH_TOKEN']}; Path=/"
            )
            self.send_header("Location", f"{client.get_address()}/#/actors")
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Login) as server, tempfile.TemporaryDirectory() as profile:
        Thread(target=server.serve_forever, daemon=True).start()
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--hide-scrollbars",
            "--window-size=1400,900",
            "--virtual-time-budget=20000",
            f"--user-data-dir={profile}",
            f"--screenshot={file.resolve()}",
            f"http://127.0.0.1:{server.server_port}/",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=START_SECONDS)
        server.shutdown()
    print(f"picture of the dashboard: {file}", flush=True)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, with ``run_dir`` and ``picture`` ready to use, and the overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--recipe", default="demo", help="a recipe; --section.field VALUE overrides a field of it"
    )
    parser.add_argument(
        "--run-dir", type=Path, help="a new directory (default runs/cluster-demo/TIME)"
    )
    parser.add_argument(
        "--screenshot", type=Path, metavar="FILE", help="a picture of the dashboard, with Chromium"
    )
    arguments, overrides = parser.parse_known_args()
    default = ROOT / "runs/cluster-demo" / time.strftime("%Y%m%d-%H%M%S")
    arguments.run_dir = (arguments.run_dir or default).resolve()
    if arguments.run_dir.exists():
        parser.error(f"--run-dir: expected a new directory, {arguments.run_dir} is there")
    arguments.picture = None
    if arguments.screenshot:
        browser = shutil.which("chromium") or shutil.which("google-chrome")
        if not browser:
            parser.error("--screenshot: expected chromium on the PATH")
        arguments.picture = partial(screenshot, browser, arguments.screenshot)
    return arguments, overrides


def main() -> int:
    """Run the demo and return its exit status."""
    arguments, overrides = parse_arguments()
    recipe = [arguments.recipe, *overrides]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with local_cluster() as client:
            return 0 if demo(client, recipe, arguments.run_dir, arguments.picture) else 1
    except KeyboardInterrupt:
        print("interrupted; all that was started is stopped", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
