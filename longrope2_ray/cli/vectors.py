"""The commands about one vector of rescale factors: ``factors`` and ``score``."""

import argparse
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from longrope2_ray.cli.arguments import add_command, add_recipe
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.rope.baselines import (
    METHODS,
    PLAIN,
    WITH_CRITICAL_DIM,
    baseline,
    su_attention_factor,
    yarn_attention_factor,
)
from longrope2_ray.rope.factors import RescaleFactors, factors_from_json
from longrope2_ray.rope.geometry import RopeGeometry

if TYPE_CHECKING:
    from longrope2_ray.cli.arguments import Commands
    from longrope2_ray.recipe.recipe import Recipe
    from longrope2_ray.search.scores import NeedleSummary


def add_commands(commands: "Commands") -> None:
    """Declare ``factors`` and ``score``."""
    _add_factors(commands)
    _add_score(commands)


def _add_factors(commands: "Commands") -> None:
    factors = add_command(
        commands,
        "factors",
        factors_command,
        "Print the rescale factors of a method.",
        details="The geometry is read from a model, or given by --head-dim, --base and "
        "--original-length.",
        example="--method yarn --model bundled:reference --target-length 2048\n"
        "--method longrope2 --critical-dim 33 --head-dim 128 --base 500000 --original-length 8192 "
        "--target-length 131072",
    )
    factors.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    factors.add_argument("--model", help="model whose geometry is used")
    factors.add_argument("--head-dim", type=int, help="size of an attention head")
    factors.add_argument(
        "--rotary-dim", type=int, help="rotated dimensions of a head (default: all)"
    )
    factors.add_argument("--base", type=float, help="base of the RoPE")
    factors.add_argument(
        "--original-length", type=int, help="pre-trained window in tokens; overrides the model's"
    )
    factors.add_argument(
        "--target-length", type=int, required=True, help="extended window in tokens"
    )
    factors.add_argument(
        "--critical-dim", type=int, help=f"critical dimension of {', '.join(WITH_CRITICAL_DIM)}"
    )
    factors.add_argument(
        "--attention-factor", default="1.0", help="a number, su or yarn (default: %(default)s)"
    )
    factors.add_argument("--json", action="store_true", help="print the factors as JSON")


def _add_score(commands: "Commands") -> None:
    score = add_command(
        commands,
        "score",
        score_command,
        "Score one vector of rescale factors on a recipe's needles.",
        details="The factors come from a file, from a method by name or, without --factors, from "
        "the configuration of the model, where exported models carry them.",
        example="demo --factors runs/demo/winner.json\n"
        "demo --factors yarn --attention-factor yarn\n"
        "demo --model.path runs/demo/train/model",
    )
    add_recipe(score)
    score.add_argument(
        "--factors",
        metavar="FILE_OR_METHOD",
        help="file or URL of a JSON list, a winner.json or a transformers config with long_factor, "
        f"or one of {', '.join(METHODS)} (default: the factors that the model carries)",
    )
    score.add_argument(
        "--set",
        choices=("search", "report"),
        default="report",
        help="needles of the search, or the held-out ones of the report (default: %(default)s)",
    )
    score.add_argument(
        "--attention-factor", help="a number, su or yarn (default: that of the factors)"
    )
    score.add_argument(
        "--json", action="store_true", help="print one JSON object a line for each needle set"
    )


def factors_command(arguments: argparse.Namespace) -> int:
    """Print a method's factors with the dimensions and periods that explain them."""
    if arguments.critical_dim is not None and arguments.method in PLAIN:
        raise ValueError(
            f"--critical-dim: expected one of {', '.join(WITH_CRITICAL_DIM)} as --method, "
            f"got {arguments.method!r}"
        )
    geometry = _geometry(arguments)
    target = arguments.target_length
    if target <= geometry.original_length:
        raise ValueError(
            f"--target-length: expected more than the original length {geometry.original_length}, "
            f"got {target}"
        )
    factors = baseline(
        arguments.method,
        geometry,
        target,
        critical_dim=arguments.critical_dim,
        attention_factor=_attention_factor(arguments.attention_factor, geometry, target),
    )
    _note_that_longrope2_is_a_start(arguments.method)
    if arguments.json:
        print(json.dumps(_factors_json(arguments.method, factors, geometry), indent=1))
    else:
        print(_factors_table(arguments.method, factors, geometry))
    return 0


def _factors_json(method: str, factors: RescaleFactors, geometry: RopeGeometry) -> dict[str, Any]:
    return {
        "method": method,
        "factors": factors.values.tolist(),
        "critical_dim": factors.critical_dim,
        "theoretical_critical_dim": geometry.theoretical_critical_dim,
        "ten_period_dim": geometry.ten_period_dim,
        "periods_tokens": geometry.periods_tokens.tolist(),
        "attention_factor": factors.attention_factor,
    }


def _factors_table(method: str, factors: RescaleFactors, geometry: RopeGeometry) -> str:
    lines = [
        f"{method}: critical dimension {factors.critical_dim}, "
        f"theoretical {geometry.theoretical_critical_dim}, ten-period {geometry.ten_period_dim}, "
        f"attention factor {factors.attention_factor:.6g}",
        f"{'dim':>4} {'period (tokens)':>16} {'factor':>12}",
    ]
    rows = zip(geometry.periods_tokens, factors.values, strict=True)
    lines += [
        f"{dim:>4} {period:>16.1f} {factor:>12.6g}" for dim, (period, factor) in enumerate(rows)
    ]
    return "\n".join(lines)


def _note_that_longrope2_is_a_start(method: str | None) -> None:
    if method == "longrope2":
        print(
            "note: longrope2 by name is a vector that a search starts from, not what one found; "
            "that is in its winner.json",
            file=sys.stderr,
        )


def _geometry(arguments: argparse.Namespace) -> RopeGeometry:
    """The geometry of ``--model``, or the one that the other options give."""
    if arguments.model:
        for name in ("head_dim", "rotary_dim", "base"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"{_flag(name)}: expected none beside --model, which has its own")
        return _geometry_of_model(arguments.model, arguments.original_length)
    for name in ("head_dim", "base", "original_length"):
        if getattr(arguments, name) is None:
            raise ValueError(f"{_flag(name)}: missing; give it, or --model to read it from a model")
    rotary = arguments.head_dim if arguments.rotary_dim is None else arguments.rotary_dim
    return RopeGeometry(arguments.head_dim, rotary, arguments.base, arguments.original_length)


def _geometry_of_model(path: str, original_length: int | None) -> RopeGeometry:
    from longrope2_ray.model.spec import read_shape
    from longrope2_ray.recipe.loading import model_section

    return read_shape(model_section(path, original_length=original_length)).geometry


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _attention_factor(text: str, geometry: RopeGeometry, target_length: int) -> float:
    """The number that ``--attention-factor`` gives, or that its rule gives at the target length."""
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


def score_command(arguments: argparse.Namespace) -> int:
    """Score the factors on every needle set asked for and print the results."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from longrope2_ray.cli.progress import ProgressLine
    from longrope2_ray.search.job import score_vectors
    from longrope2_ray.search.preparation import prepare
    from longrope2_ray.workers.connection import ray_session

    given = None
    if arguments.factors not in METHODS:
        given = _read_factors(arguments.factors, recipe)
    prepared = prepare(recipe)
    geometry = prepared.shape.geometry
    if given is not None and not given.require_length(geometry.num_cosines).monotone:
        print(
            "note: the factors are not monotone, as some published LongRoPE vectors; "
            "scored as they are",
            file=sys.stderr,
        )
    vectors = _vectors_by_needle_set(arguments, recipe, geometry, given)
    _note_that_longrope2_is_a_start(arguments.factors)
    with ray_session(), ProgressLine() as line:
        summaries = score_vectors(
            prepared, vectors, lambda done, total: line.show("scored", f"{done} of {total}")
        )
    source = arguments.factors or recipe.model.path
    for needle_set, summary in summaries.items():
        if arguments.json:
            print(json.dumps(_score_json(source, needle_set, vectors[needle_set], summary)))
        else:
            print(_score_text(source, needle_set, vectors[needle_set], summary))
    return 0


def _read_factors(place: str | None, recipe: "Recipe") -> RescaleFactors:
    """Read the factors in a file or at a URL; without one, those that the model carries."""
    expected = f"--factors: expected a file, a URL or one of {', '.join(METHODS)}"
    if place is None:
        from longrope2_ray.model.spec import read_factors

        carried = read_factors(recipe.model)
        if carried is None:
            raise ValueError(
                f"{expected}, got none, and the model at {recipe.model.path} carries no factors"
            )
        return carried
    from upath import UPath

    try:
        text = UPath(place).read_text(encoding="utf-8")
    except Exception as error:  # each storage client has errors of its own
        raise ValueError(f"{expected}, got {place!r}: {error}") from error
    return factors_from_json(text, place)


def _vectors_by_needle_set(
    arguments: argparse.Namespace,
    recipe: "Recipe",
    geometry: RopeGeometry,
    given: RescaleFactors | None,
) -> dict[str, RescaleFactors]:
    """Needle set -> factors: the given ones, or the method's for the set's length."""
    from longrope2_ray.search.comparison import rescaled_length
    from longrope2_ray.search.scores import SEARCH_SET, report_set

    target = recipe.search.target_length
    if arguments.set == "search":
        lengths = {SEARCH_SET: target}
    else:
        lengths = {report_set(length): length for length in recipe.report.lengths or [target]}
    original = geometry.original_length
    vectors = {
        name: given
        or baseline(arguments.factors, geometry, rescaled_length(length, target, original))
        for name, length in lengths.items()
    }
    if arguments.attention_factor is None:
        return vectors
    number = _attention_factor(arguments.attention_factor, geometry, target)
    return {name: replace(vector, attention_factor=number) for name, vector in vectors.items()}


def _score_json(
    source: str, needle_set: str, factors: RescaleFactors, summary: "NeedleSummary"
) -> dict[str, Any]:
    return {
        "factors": source,
        "needle_set": needle_set,
        "attention_factor": factors.attention_factor,
        "monotone": factors.monotone,
        **summary.to_json(),
        "by_depth": {
            depth: {"ppl": needles.ppl, "accuracy": needles.accuracy, "num_needles": len(needles)}
            for depth, needles in summary.by_depth().items()
        },
    }


def _score_text(
    source: str, needle_set: str, factors: RescaleFactors, summary: "NeedleSummary"
) -> str:
    lines = [
        f"{source} on {needle_set}, attention factor {factors.attention_factor:.4g}: "
        f"{_score(summary)}"
    ]
    for depth, needles in summary.by_depth().items():
        lines.append(f"  depth {depth}: {_score(needles)}, needles {len(needles)}")
    for sample, nll in enumerate(summary.nll_per_sample):
        place = summary.depth_per_sample[sample]
        lines.append(f"  sample {sample}: NLL {_finite(nll, '.4f')}, depth {place:.3g}")
    return "\n".join(lines)


def _score(needles: "NeedleSummary") -> str:
    ppl = _finite(needles.ppl, ".4g")
    return f"needle perplexity {ppl}, accuracy {needles.accuracy:.0%}"


def _finite(number: float | None, form: str) -> str:
    return "not finite" if number is None else format(number, form)
