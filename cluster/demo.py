"""A cluster on one machine: a search is submitted, stopped half way, submitted again, and ends in the same bytes.

    python cluster/demo.py [--recipe demo] [--run-dir DIR] [--screenshot FILE] [--section.field VALUE ...]

A Ray head without CPUs and two worker nodes of one CPU each run as processes of their own, with token authentication as in
the manifests. A first job runs undisturbed and says how many units there are; a second one is stopped after half of
them and submitted again. Exit status 0 means that both ended in the same winner.json, 1 that something went wrong, 130
an interruption. Whatever happens, all processes that were started here are stopped, and no others.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil

from longrope2_ray.report.progress import format_seconds
from longrope2_ray.report.tables import format_table
from longrope2_ray.storage.rundir import RunDir

ROOT = Path(__file__).resolve().parent.parent
RAY = str(Path(sys.executable).with_name("ray"))
START_SECONDS, STOP_SECONDS, PRINT_SECONDS = 300, 60, 10


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def local_cluster(num_workers: int = 2) -> Iterator[Any]:
    """A head and worker nodes for the time of a block; yields a client of the head's job API.

    The cluster's token stands in ``os.environ``, where every Ray command that is started here finds it.

    Raises:
        RuntimeError: if a node ends or does not come up; with the end of its log.
    """
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # whose python the jobs run
    )
    from ray.job_submission import JobSubmissionClient  # after the above: it reads the environment
    from ray.util.state import list_nodes

    if (
        sys.platform == "linux"
    ):  # PR_SET_CHILD_SUBREAPER: what loses its parent becomes ours, so none is missed below
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    folder = Path(
        tempfile.mkdtemp(prefix="r", dir="/tmp")
    )  # short: paths of sockets may have 107 bytes
    nodes: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> None:
        """One node, out of reach of the terminal's Ctrl-C. Nodes on one machine share neither folder nor agent's port."""
        temp_dir = folder / str(len(nodes))
        temp_dir.mkdir()
        command = [RAY, "start", *options, "--block", f"--temp-dir={temp_dir}", "--object-store-memory=100000000",
                   f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats"]  # fmt: skip
        with open(temp_dir / "start.log", "wb") as log:
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))

    def wait_for(condition: Callable[[], Any]) -> Any:
        """The first true answer; a head that is still starting answers with errors."""
        answer = None
        for _ in range(START_SECONDS):
            for i, node in enumerate(nodes):
                if node.poll() is not None:
                    raise RuntimeError(
                        f"node {i} ended: {(folder / str(i) / 'start.log').read_text()[-2000:]}"
                    )
            try:
                if answer := condition():
                    return answer
            except Exception as error:
                answer = error
            time.sleep(1)
        raise RuntimeError(f"the cluster did not come up within {START_SECONDS} s: {answer}")

    try:
        gcs, dashboard = free_port(), free_port()
        address = f"http://127.0.0.1:{dashboard}"
        start("--head", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={dashboard}",
              f"--ray-client-server-port={free_port()}")  # fmt: skip
        client = wait_for(lambda: JobSubmissionClient(address))
        for _ in range(num_workers):
            start(f"--address=127.0.0.1:{gcs}", "--num-cpus=1")
        wait_for(
            lambda: sum(node.state == "ALIVE" for node in list_nodes(address=address)) == len(nodes)
        )
        print(
            f"dashboard {address}, token authentication, {num_workers} worker nodes of one CPU",
            flush=True,
        )
        yield client
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.SIG_IGN
            )  # a second Ctrl-C must not leave half of it behind
        for node in reversed(nodes):
            node.terminate()
        psutil.wait_procs(psutil.Process().children(), timeout=STOP_SECONDS)
        while left := psutil.Process().children(recursive=True):
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        shutil.rmtree(folder, ignore_errors=True)


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
    """Submit a search that has time to flush what was scored when it is stopped; Ray's own default is 3 s."""
    environment = json.dumps({"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}})
    ray_job(client, "submit", "--no-wait", "--submission-id", job, "--working-dir", ".", "--runtime-env-json", environment,
            "--", "python", "jobs/search.py", *recipe, "--run-dir", str(run_dir))  # fmt: skip


def follow(
    client: Any, job: str, run_dir: Path, expected: str, until_units: float = float("inf")
) -> None:
    """Print where a job stands until it has ended, or has scored ``until_units``.

    Raises:
        RuntimeError: if its status is another one than ``expected`` then; with the end of its log.
    """
    shown, printed = None, 0.0
    while True:
        state, status = client.get_job_status(job), RunDir(str(run_dir)).status() or {}
        now = (state, status.get("state"), status.get("generation"))
        if now != shown or time.monotonic() - printed > PRINT_SECONDS:
            shown, printed = now, time.monotonic()
            print(f"{job}: {state}", _progress(status), sep=", ", flush=True)
        if state.is_terminal() or status.get("units_done", 0) >= until_units:
            break
        time.sleep(0.5)
    if state != expected:
        raise RuntimeError(
            f"{job}: expected {expected}, got {state}; its log ends with\n{client.get_job_logs(job)[-3000:]}"
        )


def _progress(status: dict[str, Any]) -> str:
    if not status:
        return "nothing scored yet"
    best = (
        f"best {status['best_ppl']:.4g} at d_rcd {status['best_critical_dim']}, "
        if status["best_ppl"]
        else ""
    )
    return (
        f"{status['state']}, generation {status['generation']} of {status['iterations']}, {best}"
        f"{status['units_done']} units, ETA {format_seconds(status['eta_seconds'])}"
    )


def demo(
    client: Any, recipe: Sequence[str], run_dir: Path, picture: Callable[[Any], None] | None
) -> bool:
    """Search undisturbed, search with a stop, compare; True if nothing was lost and the winners are the same bytes."""
    whole, stopped = run_dir / "undisturbed", run_dir / "stopped"
    submit(client, "undisturbed", recipe, whole)
    follow(client, "undisturbed", whole, "SUCCEEDED")
    units = len(RunDir(str(whole)).load_scores())

    submit(client, "attempt-1", recipe, stopped)
    follow(client, "attempt-1", stopped, "RUNNING", until_units=units / 2)
    ray_job(client, "stop", "attempt-1")
    follow(client, "attempt-1", stopped, "STOPPED")
    if "what is done is kept" not in (output := client.get_job_logs("attempt-1")):
        raise RuntimeError(f"attempt-1: expected a clean end, got\n{output[-3000:]}")
    kept = RunDir(str(stopped)).load_scores()
    print(f"attempt-1 ended cleanly, {len(kept)} of {units} units are in its ledger", flush=True)

    submit(client, "attempt-2", recipe, stopped)
    if picture:
        follow(client, "attempt-2", stopped, "RUNNING", until_units=len(kept) + 1)
        picture(client)
    follow(client, "attempt-2", stopped, "SUCCEEDED")
    ledger = RunDir(str(stopped)).load_scores()
    lost = sum(
        ledger.get(key) != score for key, score in kept.items()
    )  # a row says who scored it, and when
    same = (stopped / "winner.json").read_bytes() == (whole / "winner.json").read_bytes()
    print(f"\n{format_table(RunDir(str(stopped)).winner() or {})}\n")
    print(
        f"{len(kept)} units before the stop and {len(ledger) - len(kept)} after it; lost or scored again: {lost}"
    )
    print(
        f"winner.json: {'the same bytes as' if same else 'NOT the bytes of'} the undisturbed run's\n{whole}\n{stopped}"
    )
    return same and not lost


def screenshot(browser: str, file: Path, client: Any) -> None:
    """A picture of the actors in the dashboard, logged in.

    The dashboard takes its token from a cookie, and cookies do not look at ports: a server beside it sets one and sends
    the browser on, so the token is on no command line.
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
        command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", "--window-size=1400,900",
                   "--virtual-time-budget=20000", f"--user-data-dir={profile}", f"--screenshot={file.resolve()}",
                   f"http://127.0.0.1:{server.server_port}/"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=START_SECONDS)
        server.shutdown()
    print(f"picture of the dashboard: {file}", flush=True)


def main() -> int:
    """Run the demo; its exit status."""
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
    run_dir = (
        arguments.run_dir or ROOT / "runs/cluster-demo" / time.strftime("%Y%m%d-%H%M%S")
    ).resolve()
    if run_dir.exists():
        parser.error(f"--run-dir: expected a new directory, {run_dir} is there")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if arguments.screenshot and not browser:
        parser.error("--screenshot: expected chromium on the PATH")
    picture = (
        partial(screenshot, str(browser), arguments.screenshot) if arguments.screenshot else None
    )

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        with local_cluster() as client:
            return 0 if demo(client, [arguments.recipe, *overrides], run_dir, picture) else 1
    except KeyboardInterrupt:
        print("interrupted; all that was started is stopped", file=sys.stderr)
        return 130
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
