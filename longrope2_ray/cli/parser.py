"""The command ``longrope2``: search, plan, factors, score, report, monitor, recipe.

Heavy imports stay inside the commands.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope2_ray.errors import StoppedError
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.rope.geometry import RopeGeometry

USAGE_ERROR, FENCED = 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 is success, 1 a run that could not go on, 2 a mistake of the user, 3 a run that a newer driver has
    taken over, 130 an interruption."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(words)
    if rest and not getattr(arguments, "overrides_allowed", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("longrope2").setLevel(logging.INFO)
    try:
        if rest:
            _require_recipe_first(words, arguments.recipe, rest)
        return int(arguments.command(arguments) or 0)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        return 0
    except KeyboardInterrupt:
        kept = getattr(arguments, "overrides_allowed", False) and hasattr(arguments, "run_dir")
        advice = "; what is done is kept, run the same command again to resume" if kept else ""
        print(f"interrupted{advice}", file=sys.stderr)
        return 130
    except StoppedError as error:
        from longrope2_ray.errors import FencedError

        fenced = isinstance(error, FencedError)
        advice = "" if fenced else "\nwhat is done is kept, run again to resume"
        print(f"stopped: {error}{advice}", file=sys.stderr)
        return FENCED if fenced else 1


def _require_recipe_first(words: Sequence[str], recipe: str, overrides: Sequence[str]) -> None:
    """Refuse ``--section.field VALUE`` before RECIPE: the value would be taken for the recipe."""
    early = [word for word in words[: words.index(recipe)] if word in overrides and "=" not in word]
    if early:
        raise ValueError(f"RECIPE: expected before {early[0]}, got {recipe!r} after it")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longrope2", description="Extend a model's context window with LongRoPE2."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, function: Any, help: str, recipe: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.set_defaults(command=function, overrides_allowed=recipe)
        if recipe:
            sub.add_argument(
                "recipe",
                help="recipe file, or the name of a shipped one; --section.field VALUE after it overrides it",
            )
        return sub

    search = command("search", _search, "Search for the factors; run again to resume.")
    search.add_argument("--run-dir", help="directory or URL (default runs/<recipe name>)")
    search.add_argument(
        "--dashboard", action="store_true", help="start Ray's dashboard on this machine"
    )

    train = command(
        "train",
        _train,
        "Train with mixed context windows from the winning factors; run again to resume.",
    )
    train.add_argument(
        "--run-dir", help="directory or URL of the search and the data (default runs/<recipe name>)"
    )
    train.add_argument(
        "--dashboard", action="store_true", help="start Ray's dashboard on this machine"
    )

    plan = command("plan", _plan, "Say what a search will cost, without loading a model.")
    plan.add_argument("--accelerator", default="h100")
    plan.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of the accelerator's peak that is reached",
    )
    plan.add_argument("--json", action="store_true")

    factors = command("factors", _factors, "Print a method's factor vector.", recipe=False)
    factors.add_argument("--method", required=True)
    factors.add_argument(
        "--model", help="take the geometry from this model instead; --original-length overrides it"
    )
    factors.add_argument("--head-dim", type=int)
    factors.add_argument(
        "--rotary-dim", type=int, help="rotated dimensions of a head, head-dim unless given"
    )
    factors.add_argument("--base", type=float)
    factors.add_argument("--original-length", type=int)
    factors.add_argument("--target-length", type=int, required=True)
    factors.add_argument("--critical-dim", type=int, help="for a method that has one")
    factors.add_argument("--attention-factor", default="1.0", help="a number, su or yarn")
    factors.add_argument("--json", action="store_true")

    score = command("score", _score, "Score one factor vector on a recipe's needles.")
    score.add_argument(
        "--factors",
        required=True,
        help="JSON list, winner.json, HF config with long_factor, or a method",
    )
    score.add_argument(
        "--set",
        choices=("search", "report"),
        default="report",
        help="which needles (held-out: report)",
    )
    score.add_argument(
        "--attention-factor", help="a number, su or yarn (default: the vector's own)"
    )
    score.add_argument(
        "--json", action="store_true", help="one JSON object for each needle set, a line each"
    )

    data = command(
        "data",
        _data,
        "Make training data: tokenise, choose and pack documents; run again to resume.",
    )
    data.add_argument("--run-dir", help="directory or URL (default runs/<recipe name>)")

    report = command("report", _report, "Write report.html and figures of a run.", recipe=False)
    report.add_argument("run_dir")

    monitor = command(
        "monitor", _monitor, "Show where a run stands, until it is finished.", recipe=False
    )
    monitor.add_argument("run_dir", help="directory or URL")
    monitor.add_argument("--once", action="store_true", help="print it once")
    monitor.add_argument(
        "--every", type=float, default=2.0, metavar="SECONDS", help="between two looks (default 2)"
    )

    fields = command(
        "recipe",
        _recipe,
        "Print the recipe reference: every field, its default and meaning.",
        recipe=False,
    )
    fields.set_defaults(overrides_allowed=False)
    return parser


def _search(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.report.metrics import RayMetrics
    from longrope2_ray.report.page import ReportWriter, is_final
    from longrope2_ray.report.progress import ProgressBar, format_seconds, log_generation
    from longrope2_ray.report.tables import format_table
    from longrope2_ray.search import job as search_job
    from longrope2_ray.search.status import Observer
    from longrope2_ray.storage.rundir import RunDir
    from longrope2_ray.workers.connection import ray_session

    run_dir = RunDir(arguments.run_dir or str(Path("runs") / recipe.name))
    prepared = search_job.prepare(recipe)
    resumed = search_job.open_run(prepared, run_dir)
    winner = run_dir.winner()
    if winner is not None:
        print(format_table(winner))
        if not is_final(run_dir):  # the driver died before its last line
            ReportWriter(run_dir).finish()
        print(f"\n{run_dir.url} holds this finished run; nothing was changed")
        for name in ("winner.json", "report.html"):
            print(run_dir.path / name)
        return 0
    if resumed:
        print(f"resuming {run_dir.url}", file=sys.stderr)
    bar, writer = ProgressBar(), ReportWriter(run_dir)
    try:
        with ray_session(arguments.dashboard):
            observers: list[Observer] = [bar, log_generation, RayMetrics(recipe.name), writer]
            winner = search_job.run_search(prepared, run_dir, observers)
    finally:
        bar.stop()
    writer.finish()
    status = run_dir.status() or {}
    print(format_table(winner))
    print(f"\n{status.get('units_done')} units scored, {status.get('units_raced_out')} saved by racing, "
          f"in {format_seconds(status.get('elapsed_seconds'))}")  # fmt: skip
    for name in ("winner.json", "report.html"):
        print(run_dir.path / name)
    return 0


def _train(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.report.page import ReportWriter
    from longrope2_ray.report.training_observer import TrainObserver
    from longrope2_ray.storage.rundir import RunDir
    from longrope2_ray.training.job import MODEL_FOLDER, prepare_training, run_training
    from longrope2_ray.workers.connection import ray_session

    run_dir = RunDir(arguments.run_dir or str(Path("runs") / recipe.name))
    job, train_dir, resumed = prepare_training(recipe, run_dir)
    result = train_dir.read_or_skip("result.json")
    if result is not None:
        print(
            f"{train_dir.path / MODEL_FOLDER}: trained for {result['step']} steps, loss {result['loss']:.4f}"
        )
        print(f"{train_dir.url} holds this finished training; nothing was changed")
        return 0
    if resumed:
        print(f"resuming {train_dir.url}", file=sys.stderr)
    with ray_session(arguments.dashboard):
        observer = TrainObserver(recipe.name, recipe.train.checkpoint_steps)
        try:
            result = run_training(job, train_dir, observer)
        finally:
            observer.stop()
    ReportWriter(run_dir).finish()
    print(f"trained for {result['step']} steps, loss {result['loss']:.4f}")
    for path in (train_dir.path / MODEL_FOLDER, run_dir.path / "report.html"):
        print(path)
    return 0


def _plan(arguments: argparse.Namespace) -> None:
    from longrope2_ray.plan import format_plan, plan

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    cost = plan(recipe, _shape(recipe), arguments.accelerator, arguments.utilisation)
    print(json.dumps(cost, indent=1) if arguments.json else format_plan(cost))


def _shape(recipe: Recipe) -> Any:
    """The recipe's own shape, else the model's configuration."""
    if recipe.model.shape is not None:
        return recipe.model.shape
    from longrope2_ray.model.spec import read_spec

    model = recipe.model
    return read_spec(model.path, original_length=model.original_length, **model.reading)


def _factors(arguments: argparse.Namespace) -> None:
    from longrope2_ray.rope.baselines import PLAIN, WITH_CRITICAL_DIM, baseline

    if arguments.critical_dim is not None and arguments.method in PLAIN:
        raise ValueError(
            f"--critical-dim: expected one of {', '.join(WITH_CRITICAL_DIM)} as --method, got {arguments.method!r}"
        )
    geometry = _geometry(arguments)
    if arguments.target_length <= geometry.original_length:
        raise ValueError(
            f"--target-length: expected more than the original length {geometry.original_length}, got {arguments.target_length}"
        )
    vector = baseline(
        arguments.method,
        geometry,
        arguments.target_length,
        critical_dim=arguments.critical_dim,
        attention_factor=_temperature(
            arguments.attention_factor, geometry, arguments.target_length
        ),
    )
    _say_what_longrope2_is(arguments.method)
    body = {
        "method": arguments.method,
        "factors": vector.values.tolist(),
        "critical_dim": vector.critical_dim,
        "theoretical_critical_dim": geometry.theoretical_critical_dim,
        "ten_period_dim": geometry.ten_period_dim,
        "periods_tokens": geometry.periods_tokens.tolist(),
        "attention_factor": vector.attention_factor,
    }
    if arguments.json:
        print(json.dumps(body, indent=1))
        return
    print(f"{arguments.method}: critical dimension {vector.critical_dim}, theoretical {geometry.theoretical_critical_dim}, "
          f"ten-period {geometry.ten_period_dim}, attention factor {vector.attention_factor:.6g}")  # fmt: skip
    print(f"{'dim':>4} {'period (tokens)':>16} {'factor':>12}")
    for dim, (period, factor) in enumerate(
        zip(geometry.periods_tokens, vector.values, strict=True)
    ):
        print(f"{dim:>4} {period:>16.1f} {factor:>12.6g}")


def _say_what_longrope2_is(method: str) -> None:
    if method == "longrope2":
        print("note: longrope2 by name is a vector that a search starts from, not what one found; that is in its winner.json",
              file=sys.stderr)  # fmt: skip


def _geometry(arguments: argparse.Namespace) -> RopeGeometry:
    if arguments.model:
        for name in ("head_dim", "rotary_dim", "base"):
            if getattr(arguments, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected none beside --model, which has its own"
                )
        from longrope2_ray.model.spec import read_spec

        geometry: RopeGeometry = read_spec(
            arguments.model, original_length=arguments.original_length
        ).geometry
        return geometry
    for name in ("head_dim", "base", "original_length"):
        if getattr(arguments, name) is None:
            raise ValueError(
                f"--{name.replace('_', '-')}: missing; give it, or --model to read it from a model"
            )
    rotary = arguments.head_dim if arguments.rotary_dim is None else arguments.rotary_dim
    return RopeGeometry(arguments.head_dim, rotary, arguments.base, arguments.original_length)


def _temperature(text: str, geometry: RopeGeometry, target_length: int) -> float:
    """The number behind ``--attention-factor``."""
    from longrope2_ray.rope.baselines import su_attention_factor, yarn_attention_factor

    ratio = max(target_length / geometry.original_length, 1.0)
    rules = {
        "su": su_attention_factor(ratio, geometry.original_length),
        "yarn": yarn_attention_factor(ratio),
    }
    with suppress(ValueError):
        number = rules[text] if text in rules else float(text)
        if 0 < number < math.inf:
            return number
    raise ValueError(f"--attention-factor: expected a positive number, su or yarn, got {text!r}")


def _score(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from upath import UPath

    from longrope2_ray.rope.baselines import METHODS, baseline
    from longrope2_ray.rope.factors import factors_from_json
    from longrope2_ray.search import job as search_job
    from longrope2_ray.search.comparison import rescaled_length
    from longrope2_ray.search.scores import SEARCH_SET, report_set
    from longrope2_ray.workers.connection import ray_session

    length = recipe.search.target_length
    given = None
    if arguments.factors not in METHODS:
        try:
            text = UPath(arguments.factors).read_text(encoding="utf-8")
        except Exception as error:  # each storage client has errors of its own
            raise ValueError(
                f"--factors: expected a file, a URL or one of {', '.join(METHODS)}, got {arguments.factors!r}: {error}"
            ) from error
        given = factors_from_json(text, arguments.factors)
    prepared = search_job.prepare(recipe)
    geometry = prepared.spec.geometry
    if given is not None and not given.require_length(geometry.num_cosines).monotone:
        print(
            "note: the factors are not monotone, as some published LongRoPE vectors; scored as they are",
            file=sys.stderr,
        )
    if arguments.set == "search":
        lengths = {SEARCH_SET: length}
    else:
        lengths = {report_set(length): length for length in recipe.report.lengths or [length]}
    vectors = {
        name: given
        or baseline(
            arguments.factors, geometry, rescaled_length(at, length, geometry.original_length)
        )
        for name, at in lengths.items()
    }
    if arguments.attention_factor is not None:
        number = _temperature(arguments.attention_factor, geometry, length)
        vectors = {
            name: replace(vector, attention_factor=number) for name, vector in vectors.items()
        }
    _say_what_longrope2_is(arguments.factors)
    with ray_session():
        results = search_job.score_vectors(prepared, vectors)
    for needle_set, result in results.items():
        vector = vectors[needle_set]
        if arguments.json:
            print(json.dumps({"factors": arguments.factors, "needle_set": needle_set,
                              "attention_factor": vector.attention_factor, "monotone": vector.monotone, **result}))  # fmt: skip
            continue
        ppl = "not finite" if result["ppl"] is None else f"{result['ppl']:.4g}"
        print(f"{arguments.factors} on {needle_set}, attention factor {vector.attention_factor:.4g}: needle perplexity "
              f"{ppl}, accuracy {result['accuracy']:.0%}")  # fmt: skip
        for sample, nll in enumerate(result["nll_per_sample"]):
            print(f"  sample {sample}: NLL {'not finite' if nll is None else f'{nll:.4f}'}")


def _data(arguments: argparse.Namespace) -> None:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.data.job import build_data, finished, format_manifest, prepare_data
    from longrope2_ray.data.shards import MANIFEST
    from longrope2_ray.workers.connection import ray_session

    plan = prepare_data(recipe, arguments.run_dir or str(Path("runs") / recipe.name))
    manifest = finished(plan)
    if manifest is None:
        with ray_session():
            manifest = build_data(plan)
    print(format_manifest(manifest))
    print(plan.run_dir.path / MANIFEST)


def _report(arguments: argparse.Namespace) -> None:
    from longrope2_ray.report.page import write_report
    from longrope2_ray.storage.rundir import RunDir

    run_dir = RunDir(arguments.run_dir)
    if run_dir.read_json("run.json") is None:
        raise ValueError(
            f"RUN_DIR: expected the directory of a run, got {arguments.run_dir!r}, which has no run.json"
        )
    for path in write_report(run_dir):
        print(path)


def _monitor(arguments: argparse.Namespace) -> int:
    from longrope2_ray.report.monitor import monitor

    if arguments.every <= 0:
        raise ValueError(f"--every: expected seconds above 0, got {arguments.every:g}")
    try:
        monitor(arguments.run_dir, arguments.once, arguments.every)
    except KeyboardInterrupt:  # whoever looks away interrupts nothing
        return 130
    return 0


def _recipe(arguments: argparse.Namespace) -> None:
    from longrope2_ray.recipe.fields import reference

    print(reference())


if __name__ == "__main__":
    sys.exit(main())
