"""Make training data as a Ray job.

ray job submit --working-dir . -- python jobs/data.py RECIPE.toml [--run-dir DIR_OR_URL]
"""

import sys

from longrope2_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
