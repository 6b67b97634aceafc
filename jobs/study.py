"""Run a study as a Ray job.

ray job submit --working-dir . -- python jobs/study.py STUDY.toml [--run-dir DIR_OR_URL]
"""

import sys

from longrope2_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
