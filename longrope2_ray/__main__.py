"""``python -m longrope2_ray``: the command line."""

import sys

from longrope2_ray.cli import main

sys.exit(main())
