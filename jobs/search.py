"""Run a search as a Ray job.

ray job submit --working-dir . -- python jobs/search.py RECIPE.toml [--run-dir DIR_OR_URL]
"""

import sys

from longrope2_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
