"""The study file: its trials, and one clear message for every mistake."""

from pathlib import Path

import pytest

from longrope2_ray.errors import RecipeError
from longrope2_ray.study.spec import load_study

ROOT = Path(__file__).parents[2]
STUDY = """
name = "small"
recipe = "debug"
seeds = [3, 5]
settings.search.iterations = 3
settings.needles.seed = 7

[[variants]]
name = "paper"

[[variants]]
name = "authors"
settings.search.preset = "authors"
settings.search.iterations = 4
"""


@pytest.fixture
def write(tmp_path: Path):
    """Writes a study's file, with replacements in it, and returns its path."""

    def write_study(*replaced: str) -> Path:
        text = STUDY
        for old, new in zip(replaced[::2], replaced[1::2], strict=True):
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "study.toml"
        path.write_text(text)
        return path

    return write_study


def test_every_variant_is_searched_with_every_seed(write) -> None:
    study = load_study(write(), ["--search.top-k", "1"])
    folders = ["paper/seed-3", "authors/seed-3", "paper/seed-5", "authors/seed-5"]
    assert [trial.folder for trial in study.trials] == folders
    for trial in study.trials:
        recipe = trial.recipe
        seeds = recipe.search.seed, recipe.train.seed, recipe.needles.seed
        assert seeds == (trial.seed, trial.seed, 7)
        assert recipe.search.top_k == 1
        assert recipe.search.preset == trial.variant
        assert recipe.search.iterations == {"paper": 3, "authors": 4}[trial.variant]


def test_a_recipe_beside_the_study_is_found(write, tmp_path: Path) -> None:
    debug = (ROOT / "jobs" / "recipes" / "debug.toml").read_text()
    (tmp_path / "mine.toml").write_text(debug.replace('name = "debug"', 'name = "mine"'))
    study = load_study(write('recipe = "debug"', 'recipe = "mine.toml"'))
    assert {trial.recipe.name for trial in study.trials} == {"mine"}


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (("seeds", "seed"), r"seed: unknown study field; did you mean seeds\?"),
        (("seeds = [3, 5]", ""), r"seeds: missing"),
        (("[3, 5]", "[]"), r"seeds: .* at least 1"),
        (("[3, 5]", "[3, 3]"), r"seeds: expected different numbers, got \[3, 3\]"),
        (("[3, 5]", "[-1]"), r"seeds: .* greater than or equal to 0, got -1"),
        (('name = "paper"', 'nam = "paper"'), r"variants\.nam: unknown study field"),
        (('"paper"', '"authors"'), r"variants: expected different names, got authors more than"),
        (('"paper"', '"a/b"'), r"variants\.name: .* pattern .* got 'a/b'"),
        (('"paper"', '"drivers"'), r"variants\.name: expected a folder of its own"),
        (('"paper"', '"study.md"'), r"variants\.name: expected a folder of its own"),
        (('"small"', '"../small"'), r"name: .* pattern .* got '\.\./small'"),
        (("preset", "presett"), r"variant authors in .*\n  search\.presett: unknown recipe field; "
         r"did you mean search\.preset\?"),
        (('preset = "authors"', 'preset = "none"'),
         r"variant authors in .*study\.toml:\n  search\.preset: expected .* got 'none'"),
        (("needles.seed", "search.seed"), r"settings: expected no search\.seed, which seeds sets"),
        (("needles.seed", "train.seed"), r"settings: expected no train\.seed, which seeds sets"),
        (('recipe = "debug"', 'recipe = "bug"'), r"recipe: expected a TOML file or one of"),
        (('recipe = "debug"', 'recipe = "debug"\nmax_concurrent_trials = 2'),
         r"max_concurrent_trials: expected 1 or a number of scorers in settings\.scorer"),
        (('recipe = "debug"', "recipe = debug"), r"study: expected TOML in .*study\.toml"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file_and_field(write, replaced, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_study(write(*replaced))


def test_mistakes_on_the_command_line_are_refused(write) -> None:
    with pytest.raises(RecipeError, match=r"--search\.seed: expected none"):
        load_study(write(), ["--search.seed", "4"])
    with pytest.raises(RecipeError, match=r"--search\.iteration: unknown recipe field"):
        load_study(write(), ["--search.iteration", "4"])
    with pytest.raises(RecipeError, match=r"study: expected a TOML file, got 'none\.toml'"):
        load_study("none.toml")


def test_a_training_needs_data(write, tmp_path: Path) -> None:
    (tmp_path / "plain.toml").write_text(
        'name = "plain"\nmodel.path = "bundled:reference"\nsearch.target_length = 1024\n'
        'search.preset = "paper"\n'
    )
    plain = ('recipe = "debug"', 'recipe = "plain.toml"')
    with pytest.raises(RecipeError, match=r"variants\.train: expected a recipe with a \[data\]"):
        load_study(write(*plain, 'name = "paper"', 'name = "paper"\ntrain = true'))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "jobs" / "studies").glob("*.toml")), ids=lambda path: path.stem
)
def test_shipped_studies_load_and_have_a_command(path: Path) -> None:
    study = load_study(path)
    assert study.spec.name == path.stem
    assert len(study.trials) == len(study.spec.variants) * len(study.spec.seeds)
    script = (ROOT / "jobs" / "reproduce" / f"{path.stem}.sh").read_text()
    assert f"longrope2 study jobs/studies/{path.name}" in script
