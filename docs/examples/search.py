"""Search for rescale factors from Python, as `longrope2 search debug` does, in a few seconds.

python docs/examples/search.py [RUN_DIR]
"""

import sys

import longrope2_ray

run_dir = sys.argv[1] if len(sys.argv) > 1 else "runs/debug"

recipe = longrope2_ray.load_recipe("debug", ["--search.iterations", "1"])
winner = longrope2_ray.search(recipe, run_dir)
print(f"critical dimension {winner.factors.critical_dim}")
print(f"factors {winner.factors.values.round(3).tolist()}")
