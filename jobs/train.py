"""Run a training as a Ray job.

ray job submit --working-dir . -- python jobs/train.py RECIPE.toml [--run-dir DIR_OR_URL]
"""

import sys

from longrope2_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
