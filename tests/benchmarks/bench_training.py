"""Tokens a second and peak memory of one training step: ours against a plain transformers loop.

    python tests/benchmarks/bench_training.py             # the reference model at 8,192 tokens
    python tests/benchmarks/bench_training.py --model DIR --length 131072 --device cuda

Both train on the same tokens. The plain loop is what one would write: full logits, and for the
documents of a short segment a (T, T) mask with eager attention. Each variant runs in a process of
its own, forward, backward and AdamW; the first step only warms up, times are medians. Peak memory
is what the steps add to the loaded model and its optimizer's state after the first one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from bench_scorer import peak_memory

VARIANTS = ("plain", "ours", "ours, checkpointing")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="bundled:reference", help="as model.path in a recipe")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--document", type=int, default=256, help="tokens of a document in the short segment"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--windows", nargs="*", default=["short", "long"])
    parser.add_argument("--variant", help="run this one here and print JSON (used internally)")
    return parser.parse_args()


def run_variant(options: argparse.Namespace) -> dict[str, float]:
    """Run a variant and window in this process; return a step's median seconds, loss, peak MiB."""
    import numpy as np
    import torch
    import torch.distributed as dist

    from longrope2_ray.data.packing import Segment
    from longrope2_ray.model.loading import load_model
    from longrope2_ray.model.skeleton import DTYPES
    from longrope2_ray.model.spec import read_shape
    from longrope2_ray.recipe.model import ModelSection
    from longrope2_ray.recipe.training import TrainSection
    from longrope2_ray.rope.factors import RescaleFactors
    from longrope2_ray.training.batches import targets_of
    from longrope2_ray.training.step import MixedTrainer

    (window,) = options.windows
    ours = options.variant != "plain"
    section = ModelSection(
        path=options.model,
        dtype="float32",
        device="cpu" if ours else options.device,
        attention="sdpa" if ours else "eager",
    )
    shape = read_shape(section)
    model = load_model(section, threads=options.threads)
    step = options.document if window == "short" else options.length
    ids = np.random.default_rng(0).integers(3, shape.vocab_size, options.length)
    segment = Segment(ids, np.arange(0, options.length + 1, step, dtype=np.int32), window)
    settings = TrainSection(
        global_batch_size=1,
        dtype=options.dtype,
        activation_checkpointing="checkpointing" in options.variant,
    )
    if ours:
        store = tempfile.mkstemp()[1]
        backend = "nccl" if options.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
        factors = RescaleFactors(np.full(shape.rotary_dim // 2, 2.0))
        trainer = MixedTrainer(
            model,
            shape,
            factors,
            settings,
            num_steps=100,
            kernel=options.attention,
            device=torch.device(options.device),
        )

        def run() -> float:
            return trainer.step(0, [segment]).loss
    else:
        model.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=2e-5, betas=(0.9, 0.95), weight_decay=0.0
        )
        input_ids = torch.tensor(ids, device=model.device)[None]
        labels = torch.tensor(targets_of(segment), device=model.device)
        positions = torch.arange(options.length, device=model.device) % step
        document = torch.arange(options.length, device=model.device) // step
        mask = (document[:, None] == document) & torch.ones(
            len(ids), len(ids), dtype=torch.bool
        ).tril().to(model.device)

        def run() -> float:
            with torch.autocast(
                options.device, DTYPES[options.dtype], enabled=options.dtype != "float32"
            ):
                logits = model(
                    input_ids=input_ids,
                    position_ids=positions[None],
                    attention_mask=torch.zeros(mask.shape)
                    .masked_fill(~mask.cpu(), -1e30)
                    .to(model.device)[None, None],
                    use_cache=False,
                ).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return float(loss.detach())

    loss, seconds = run(), []
    with peak_memory(options.device == "cuda") as peak:
        for _ in range(options.repeats):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
        mib = peak()
    return {"loss": loss, "seconds": statistics.median(seconds), "mib": mib}


def main() -> None:
    options = parse_arguments()
    if options.variant:
        print(json.dumps(run_variant(options)))
        return
    print(
        f"{options.model}, {options.length} tokens, {options.dtype}, {options.threads} threads, "
        f"{options.repeats} steps"
    )
    print(f"{'window':<7}{'variant':<22}{'tokens/s':>10}{'peak MiB':>10}{'loss':>9}")
    for window in options.windows:
        for variant in VARIANTS:
            line = [
                sys.executable,
                __file__,
                *sys.argv[1:],
                "--variant",
                variant,
                "--windows",
                window,
            ]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{window:<7}{variant:<22} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            rate = options.length / row["seconds"]
            print(
                f"{window:<7}{variant:<22}{rate:>10.0f}{row['mib']:>10.0f}{row['loss']:>9.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
