from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from longrope2_ray.errors import RecipeError
from longrope2_ray.recipe.fields import field_names, reference
from longrope2_ray.recipe.identity import FREE, SEARCH, TRAINING, PartOf, identity, marker
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.recipe.recipe import Recipe
from longrope2_ray.recipe.search import PRESETS, SearchSection
from longrope2_ray.storage.urls import refuse_credentials

RECIPES = sorted(Path(__file__).parents[2].glob("jobs/recipes/*.toml"))
BASE = 'name = "r"\n[model]\npath = "somewhere"\n[search]\ntarget_length = 1024\n'


def values(recipe: Recipe) -> dict[str, Any]:
    """``section.field`` -> value."""
    body = recipe.model_dump(mode="json")
    inner = {name: value for name, value in body.items() if isinstance(value, dict)}
    flat = {f"{n}.{f}": v for n, section in inner.items() for f, v in section.items()}
    return {"name": recipe.name, **flat}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(text, encoding="utf-8")
    return path


def complaints(tmp_path: Path, text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    """Lines of the error, without the one that names the file."""
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return [line.strip() for line in str(caught.value).removeprefix(f"{path}:\n").splitlines()]


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_path_and_by_name(path: Path) -> None:
    assert load_recipe(path) == load_recipe(path.stem)
    assert load_recipe(path).name == path.stem


def test_a_short_recipe_gets_a_descent_and_the_papers_numbers_where_it_asks_for_them(
    tmp_path: Path,
) -> None:
    recipe = load_recipe(write(tmp_path, BASE))
    search = recipe.search
    assert (search.descent_steps, search.iterations, search.attention_factor) == (30, 0, "search")
    search = load_recipe(write(tmp_path, BASE), ["--search.preset", "paper"]).search
    assert (search.population_size, search.iterations, search.mutation_probability) == (64, 40, 0.3)
    assert (search.tail_bounds, search.attention_factor, search.top_k) == ((1.0, 2.0), 1.0, 32)
    assert (recipe.needles.num_samples, recipe.report.num_samples) == (10, 10)
    # Not the paper's, which looks at the start alone.
    assert recipe.needles.depth == recipe.report.depth == [0.0, 0.25, 0.5, 0.75]


def test_shipped_recipes_search_at_the_start_at_least_and_report_at_several_depths() -> None:
    for path in RECIPES:
        recipe = load_recipe(path)
        assert recipe.report.depth == [0.0, 0.25, 0.5, 0.75]
        depth, of_paper = recipe.needles.depth, recipe.search.preset == "paper"
        assert depth == "start" if of_paper else isinstance(depth, list) and 0.0 in depth, path


@pytest.mark.parametrize(
    ("added", "field", "says"),
    [
        (
            "popluation_size = 3",
            "search.popluation_size",
            "unknown recipe field; did you mean search.population_size?",
        ),
        ("[serach]\nseed = 1", "serach", "unknown recipe field; did you mean search?"),
        (
            "[needles]\nnum_sample = 1",
            "needles.num_sample",
            "unknown recipe field; did you mean needles.num_samples?",
        ),
        ("[model.shap]\na = 1", "model.shap", "unknown recipe field; did you mean model.shape?"),
        ("[zzzzzz]\na = 1", "zzzzzz", "unknown recipe field"),
        ("seed = 'a'", "search.seed", "'a'"),
        ("seed = 1.5", "search.seed", "1.5"),
        ("seed = -1", "search.seed", "-1"),
        ("population_size = 0", "search.population_size", "0"),
        ("preset = 'paper'\ntop_k = 65", "search.top_k", "at most population_size 64, got 65"),
        ("racing = 'off'", "search.racing", "unknown recipe field"),
        ("mutation_probability = 0", "search.mutation_probability", "greater than 0"),
        ("mutation_probability = 1.1", "search.mutation_probability", "1.1"),
        ("tail_bounds = [2, 1]", "search.tail_bounds", "0 < low <= high, got 2.0, 1.0"),
        ("tail_bounds = [0, 1]", "search.tail_bounds", "0 < low <= high, got 0.0, 1.0"),
        ("tail_bounds = [1, 2, 3]", "search.tail_bounds", "got [1, 2, 3]"),
        ("tail_bounds = [1]", "search.tail_bounds", "got [1]"),
        ("tail_bounds = [1, inf]", "search.tail_bounds", "inf"),
        (
            "critical_dims = [0, 1]",
            "search.critical_dims",
            "first <= last, or [0, 0] for every",
        ),
        ("critical_dims = [5, 4]", "search.critical_dims", "every dimension, got (5, 4)"),
        ("attention_factor = -1", "search.attention_factor", "positive number, su, yarn, search"),
        ("descent_steps = 0", "search.descent_steps", "at least 1 with preset 'default'"),
        ("skipped_tokens = 1000000", "search.skipped_tokens", "expected at most target_length"),
        ("attention_factor = 'sue'", "search.attention_factor", "'sue'"),
        ("attention_factor = nan", "search.attention_factor", "nan"),
        ("attention_factor = [1.5, 1]", "search.attention_factor", "two bounds [low, high] with"),
        ("attention_factor = [0, 1]", "search.attention_factor", "0 < low <= high to search it"),
        ("attention_factor = [1, 2, 3]", "search.attention_factor", "got [1, 2, 3]"),
        ("preset = 'paper'\nstarts = ['pi']", "search.starts", "unless critical_dims = [0, 0]"),
        ("preset = 'best'", "search.preset", "'best'"),
        ("[needles]\ndepth = 1.5", "needles.depth", "1.5"),
        ("[needles]\ndepth = 'middle'", "needles.depth", "'middle'"),
        ("[needles]\ndepth = []", "needles.depth", "a list of such numbers, got []"),
        ("[needles]\ndepth = [0, 1.5]", "needles.depth", "number in 0 ... 1 or a list of such"),
        ("[report]\ndepth = [-0.1, 1]", "report.depth", "got [-0.1, 1]"),
        ("[report]\ndepth = [0, 'end']", "report.depth", "got [0, 'end']"),
        ("[needles]\nnum_samples = 3", "needles.num_samples", "one for each depth, got 3"),
        ("[report]\nnum_samples = 3", "report.num_samples", "expected at least 4 needles"),
        (
            "[report]\nnum_samples = 2\ndepth = [0, 0.5, 1]",
            "report.num_samples",
            "expected at least 3 needles, one for each depth, got 2; raise it, or name fewer",
        ),
        ("[needles]\nnum_samples = 0", "needles.num_samples", "0"),
        ("[report]\ntext = ['bundled:search']", "report.text", "held out"),
        ("[report]\nlengths = [0]", "report.lengths", "0"),
        ("[report]\nattention_factors = ['x']", "report.attention_factors", "'x'"),
        (
            "[report]\nattention_factors = [-1]",
            "report.attention_factors",
            "positive numbers, su, yarn or search, got -1.0",
        ),
        ("[needles]\ntext = ['']", "needles.text", "''"),
        ("[scorer]\nthreads = 0", "scorer.threads", "0"),
        ("[scorer]\ngpus_per_scorer = -1", "scorer.gpus_per_scorer", "-1"),
        ("[scorer]\ncpus_per_scorer = 'many'", "scorer.cpus_per_scorer", "'many'"),
        ("needles = 3", "search.needles", "unknown recipe field"),
    ],
)
def test_a_wrong_field_gives_one_line_that_names_it(
    tmp_path: Path, added: str, field: str, says: str
) -> None:
    lines = complaints(tmp_path, BASE + added)
    assert len(lines) == 1
    assert lines[0].startswith(f"{field}:")
    assert says in lines[0]


EVOLUTION = ("paper", "authors", "longrope")


@pytest.mark.parametrize(
    ("presets", "said"),
    [
        (["default"], "iterations = 3"),
        (["default"], "population_size = 32"),
        (["default"], "top_k = 4"),
        (["default"], "num_offspring = 3"),
        (["default"], "mutation_probability = 0.5"),
        (["default"], 'starts = ["yarn"]'),
        (["default"], "start_tokens = [8]"),
        (["default"], "critical_dims = [0, 0]"),
        (EVOLUTION, "descent_steps = 4"),
        (EVOLUTION, "skipped_needles = 4"),
        (EVOLUTION, "skipped_tokens = 64"),
    ],
)
def test_a_field_that_a_preset_does_not_know_is_refused_with_both_names(
    tmp_path: Path, presets: list[str], said: str
) -> None:
    field = said.split()[0]
    for preset in presets:
        lines = complaints(tmp_path, BASE + f'preset = "{preset}"\n{said}\n')
        assert len(lines) == 1
        assert lines[0].startswith(
            f"search.{field}: expected to be left out with preset '{preset}', since"
        )


def test_zero_of_what_a_preset_does_not_do_may_be_said() -> None:
    for preset in ("default", *EVOLUTION):
        field = "iterations" if preset == "default" else "descent_steps"
        search = SearchSection.model_validate({"target_length": 9, "preset": preset, field: 0})
        assert getattr(search, field) == 0


@pytest.mark.parametrize(
    ("text", "field", "says"),
    [
        (BASE.replace('"r"', '"a b"'), "name", "'a b'"),
        (BASE.replace('"r"', '"../up"'), "name", "'../up'"),
        (BASE.replace('"r"', "3"), "name", "3"),
        (BASE.replace('path = "somewhere"\n', ""), "model.path", "missing"),
        (BASE.replace("target_length = 1024\n", ""), "search.target_length", "missing"),
        (BASE.replace("1024", "'long'"), "search.target_length", "'long'"),
        (BASE.replace('path = "somewhere"', 'path = "p"\ndtype = "int8"'), "model.dtype", "'int8'"),
        ('name = "r"\nmodel = 3\n[search]\ntarget_length = 10\n', "model", "3"),
        ('name = "r"\n[model]\npath = "p"\n', "search", "missing"),
    ],
)
def test_a_wrong_head_of_a_recipe_gives_one_line_that_names_the_field(
    tmp_path: Path, text: str, field: str, says: str
) -> None:
    lines = complaints(tmp_path, text)
    assert len(lines) == 1
    assert lines[0].startswith(f"{field}:")
    assert says in lines[0]


def test_every_mistake_has_its_line(tmp_path: Path) -> None:
    lines = complaints(tmp_path, BASE + "sead = 1\ntop_k = 0\n[scorer]\nthreads = 'a'\n")
    assert {line.split(":")[0] for line in lines} == {
        "search.sead",
        "search.top_k",
        "scorer.threads",
    }
    assert len(lines) == 3


def test_a_file_that_is_not_toml_or_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^recipe: expected TOML in .*r.toml"):
        load_recipe(write(tmp_path, "name = = 3"))
    binary = tmp_path / "b.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"^recipe: expected TOML in .*b.toml"):
        load_recipe(binary)
    with pytest.raises(
        RecipeError,
        match=r"^recipe: expected a TOML file or one of .*, got 'nowhere', which does not exist",
    ):
        load_recipe("nowhere")
    with pytest.raises(RecipeError, match="which does not exist"):
        load_recipe("x" * 300)


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        (["--search.seed", "3"], "search.seed", 3),
        (["--search.seed=3"], "search.seed", 3),
        (["--search.descent-steps", "8"], "search.descent_steps", 8),
        (["--search.descent_steps", "8"], "search.descent_steps", 8),
        (["--search.tail-bounds", "[1, 3]"], "search.tail_bounds", [1.0, 3.0]),
        (["--search.critical-dims", "3,5"], "search.critical_dims", [3, 5]),
        (["--search.attention-factor", "su"], "search.attention_factor", "su"),
        (["--search.attention-factor", "1.2"], "search.attention_factor", 1.2),
        (["--search.attention-factor", "[1, 1.4]"], "search.attention_factor", [1.0, 1.4]),
        (["--needles.depth", "0.5"], "needles.depth", 0.5),
        (["--needles.depth", "stratified"], "needles.depth", "stratified"),
        (["--needles.depth", "[0.5]"], "needles.depth", 0.5),
        (["--report.depth", "[0, 0.5]"], "report.depth", [0.0, 0.5]),
        (["--report.depth", "0,1"], "report.depth", [0.0, 1.0]),
        (["--needles.text", "a.txt"], "needles.text", ["a.txt"]),
        (["--report.lengths", "[2048,4096]"], "report.lengths", [2048, 4096]),
        (["--name", "other"], "name", "other"),
        (["--search.seed", "3", "--search.seed", "4"], "search.seed", 4),
    ],
)
def test_the_command_line_overrides_a_field(
    tmp_path: Path, overrides: list[str], field: str, value: Any
) -> None:
    changed = values(load_recipe(write(tmp_path, BASE + "seed = 1\n"), overrides))
    plain = values(load_recipe(write(tmp_path, BASE + "seed = 1\n")))
    assert changed[field] == value
    assert {key for key in plain if plain[key] != changed[key]} <= {field}


@pytest.mark.parametrize(
    ("preset", "size", "top_k"), [("authors", 8, 8), ("paper", 16, 16), ("paper", 64, 32)]
)
def test_a_small_population_lowers_its_survivors(
    tmp_path: Path, preset: str, size: int, top_k: int
) -> None:
    said = (f"--search.preset={preset}", f"--search.population-size={size}")
    assert load_recipe(write(tmp_path, BASE), said).search.top_k == top_k
    written = load_recipe(
        write(tmp_path, BASE + f"preset = '{preset}'\npopulation_size = {size}\n")
    )
    assert written.search.top_k == top_k


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("--search.sead", "3"),
            "--search.sead: unknown recipe field; did you mean --search.seed?",
        ),
        (
            ("--search.seed", "x"),
            "search.seed: expected a valid integer, unable to parse string as an integer, got 'x'",
        ),
        (
            ("--search.seed",),
            "command line: error parsing CLI: argument --search.seed: expected one argument",
        ),
        (("stray",), "command line: error parsing CLI: unrecognized arguments: stray"),
    ],
)
def test_a_wrong_override_gives_one_line(
    tmp_path: Path, overrides: tuple[str, ...], says: str
) -> None:
    assert complaints(tmp_path, BASE, overrides) == [says]


def test_the_mistaken_file_can_be_put_right_from_the_command_line(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, BASE + "seed = -1\n"), ["--search.seed", "2"])
    assert recipe.search.seed == 2


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_defaults_and_explicit_fields_win(preset: str) -> None:
    filled = SearchSection.model_validate({"target_length": 1024, "preset": preset})
    assert {name: getattr(filled, name) for name in PRESETS[preset]} == PRESETS[preset]
    mine = SearchSection.model_validate(
        {"target_length": 1024, "preset": preset, "tail_bounds": (1, 3), "attention_factor": 1.2}
    )
    assert (mine.tail_bounds, mine.attention_factor) == ((1.0, 3.0), 1.2)
    assert mine.model_fields_set == {"target_length", "preset", "tail_bounds", "attention_factor"}
    assert SearchSection.model_validate(mine.model_dump(exclude_unset=True)) == mine


def test_presets_name_known_fields_only() -> None:
    assert {name for preset in PRESETS.values() for name in preset} <= set(
        SearchSection.model_fields
    )


def test_a_recipe_is_frozen() -> None:
    recipe = Recipe(name="x", model={"path": "p"}, search={"target_length": 10})
    with pytest.raises(ValueError, match="frozen"):
        recipe.search.seed = 3  # type: ignore[misc]


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A section and all that it is made of, lists of sections too."""
    yield model
    for info in model.model_fields.values():
        for inner in (info.annotation, *get_args(info.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from sections(inner)


def test_every_field_says_which_results_depend_on_it() -> None:
    for section in set(sections(Recipe)):
        for name, info in section.model_fields.items():
            types = (info.annotation, *get_args(info.annotation))
            is_section = any(isinstance(t, type) and issubclass(t, BaseModel) for t in types)
            said = marker(section, name)
            assert is_section or said, f"{section.__name__}.{name} has no PartOf and is not FREE"


def test_what_makes_another_search_and_what_does_not(tmp_path: Path) -> None:
    base = identity(load_recipe(write(tmp_path, BASE)), "search")
    assert base["search.seed"] == 0
    for override in ("--search.seed=1", "--model.dtype=float32", "--needles.depth=0.5", "--name=s",
                     "--scorer.threads=2", "--model.sliding-window=9"):  # fmt: skip
        assert identity(load_recipe(write(tmp_path, BASE), [override]), "search") != base
    for override in ("--report.lengths=[512]", "--report.num-samples=4", "--scorer.num-scorers=7",
                     "--storage.patience-seconds=1", "--train.max-steps=5", "--model.device=cpu",
                     "--report.seed=9", "--report.depth=[0, 0.5]"):  # fmt: skip
        assert identity(load_recipe(write(tmp_path, BASE), [override]), "search") == base


def test_what_makes_another_training_and_what_does_not(tmp_path: Path) -> None:
    base = identity(load_recipe(write(tmp_path, BASE)), "training")
    for override in ("--train.seed=1", "--train.mixed=false", "--model.sliding-window=9"):
        assert identity(load_recipe(write(tmp_path, BASE), [override]), "training") != base
    for override in ("--train.num-workers=2", "--train.checkpoint-steps=1", "--search.seed=1"):
        assert identity(load_recipe(write(tmp_path, BASE), [override]), "training") == base


def test_a_kind_of_result_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="expected some of search, tokens, segments, training"):
        PartOf("serach")
    assert (SEARCH.kinds, TRAINING.kinds, FREE.kinds) == ({"search"}, {"training"}, frozenset())


@pytest.mark.parametrize("name", ["data", "drivers", "scores", "generations", "winner.json"])
def test_a_training_may_not_take_a_name_of_the_run_directory(tmp_path: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"train\.name: expected a folder of its own.*'{name}'"):
        load_recipe(write(tmp_path, BASE), [f"--train.name={name}"])


def test_the_reference_lists_every_field() -> None:
    text = reference()
    lines = [line.split()[0] for line in text.splitlines() if line]
    for name in field_names(Recipe):
        assert name.rsplit(".", 1)[-1] in lines or f"[{name}]" in lines


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.path", "s3://key:secret@bucket/model"),
        ("needles.text", '["s3://key:secret@bucket/books"]'),
        ("report.text", '["https://token@host/books.txt"]'),
        ("model.path", "abfs://container:secret@account.dfs.core.windows.net/model"),
        ("model.path", "s3://key:sec/secret@bucket/model"),
        ("model.path", "s3://key:sec@secret@bucket/model"),
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(
    tmp_path: Path, field: str, value: str
) -> None:
    (line,) = complaints(tmp_path, BASE, (f"--{field}", value))
    assert line.startswith(f"{field}: expected a URL without credentials")
    assert "secret" not in line
    assert "token" not in line


@pytest.mark.parametrize(
    "key",
    [
        "sig",
        "SIG",
        "X-Amz-Signature",
        "x-amz-credential",
        "X-Amz-Security-Token",
        "X-Goog-Signature",
        "token",
        "access_token",
        "key",
        "secret",
        "password",
        "AWSAccessKeyId",
        "Signature",
        "X%2DAmz%2DSignature",
    ],
)
@pytest.mark.parametrize("before", ["?", "?se=2030&sp=r&", "#", "?a;"])
def test_a_secret_in_a_query_is_refused_and_not_repeated(before: str, key: str) -> None:
    with pytest.raises(
        ValueError, match=r"without credentials, got https://host/a\?\*\*\*;"
    ) as caught:
        refuse_credentials(f"https://host/a{before}{key}=hidden&se=1")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "wasb", "ABFS", "simplecache::abfs"])
def test_the_container_of_an_azure_url_is_no_secret(scheme: str) -> None:
    url = f"{scheme}://container@account.dfs.core.windows.net/path"
    assert refuse_credentials(url) == url
    for secret in (url.replace("@", ":hidden@"), f"{url}?sig=hidden"):
        with pytest.raises(ValueError, match="without credentials") as caught:
            refuse_credentials(secret)
        assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "runs/a@b",
        "s3://bucket/a@b",
        "https://host:8080/a@b",
        "http://[::1]:80/a@b",
        "https://host/a?se=1&page=2",
        "https://host/key=1/a",
        "org/model",
    ],
)
def test_a_url_without_a_secret_is_left_alone(url: str) -> None:
    assert refuse_credentials(url) == url


@pytest.mark.parametrize("preset", ["default", "paper", "authors", "longrope"])
def test_a_recipe_that_names_every_field_is_read_back(preset: str) -> None:
    """As the recipe in a run directory does; only other values than its own are refused."""
    recipe = load_recipe("demo", [f"--search.preset={preset}"])
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
