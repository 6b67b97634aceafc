"""How a refactor proves itself: the same winners and the same trained weights as another commit.

    python tests/same_results.py COMMIT          # debug and demo searches, and the training of
    debug

Both versions run the recipes of their own checkout, one after the other, on this machine. The exit
status is 1 if a file differs.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (("search", "debug"), ("search", "demo"), ("data", "debug"), ("train", "debug"))
RESULTS = (
    "debug/winner.json",
    "demo/winner.json",
    "debug/train/model/model.safetensors",
    "debug/train/model/config.json",
)


def results(checkout: Path, work: Path) -> dict[str, str]:
    """Run the commands with the code of a checkout; file -> SHA-256 of what came out."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(checkout)
    for command, recipe in COMMANDS:
        line = [sys.executable, "-m", "longrope2_ray", command, recipe]
        line += ["--run-dir", str(work / recipe)]
        print(f"{checkout.name}: {command} {recipe}", file=sys.stderr, flush=True)
        done = subprocess.run(
            line, cwd=checkout, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
    found = {name: work / name for name in RESULTS}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "missing"
        for name, path in found.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="the version to compare this checkout with")
    commit = parser.parse_args().commit
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder, "before")
        subprocess.run([*git, "add", "--quiet", "--detach", str(before), commit], check=True)
        try:
            theirs = results(before, Path(folder, "theirs"))
        finally:
            subprocess.run([*git, "remove", "--force", str(before)], check=True)
        ours = results(ROOT, Path(folder, "ours"))
    for name in RESULTS:
        same = ours[name] == theirs[name] != "missing"
        print(
            f"{'same     ' if same else 'DIFFERENT'} {name} {ours[name][:16]} {theirs[name][:16]}"
        )
    return 0 if ours == theirs and "missing" not in ours.values() else 1


if __name__ == "__main__":
    sys.exit(main())
