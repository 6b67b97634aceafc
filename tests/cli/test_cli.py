"""The commands as a user meets them: what they print, and one clear line for every mistake."""

import json
import math
import shlex
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray
from tiny_models import save_tiny

import longrope2_ray
from longrope2_ray.cli import command_line, main
from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.search import job as search_job
from longrope2_ray.search.preparation import open_run, prepare
from longrope2_ray.search.scores import NeedleSummary
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.workers import connection

PUBLISHED = json.loads((Path(__file__).parents[1] / "published_factors.json").read_text())[
    "vectors"
]
SEARCHED = json.dumps([str(Path(longrope2_ray.__file__).parent / "assets" / "text" / "search")])
LLAMA3 = (
    "--head-dim",
    "128",
    "--base",
    "500000",
    "--original-length",
    "8192",
    "--target-length",
    "131072",
)

# Starting a scorer takes longer than all that it scores here.
ONE_SCORER = ("--scorer.num-scorers", "1")

REFERENCE = ("--model", "bundled:reference", "--target-length", "2048")


def factors_json(capsys, *arguments: str) -> dict:
    assert main(["factors", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def mistake(capsys, *arguments: str) -> str:
    """Exit code 2, nothing on stdout, no stack trace; the message."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def model_dir(folder: Path, **config) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_factors_from_geometry_alone(capsys):
    body = factors_json(capsys, "--method", "longrope2", *LLAMA3, "--critical-dim", "33")
    assert list(body) == [
        "method", "factors", "critical_dim", "theoretical_critical_dim", "ten_period_dim",
        "periods_tokens", "attention_factor",
    ]  # fmt: skip
    assert (body["critical_dim"], body["theoretical_critical_dim"], body["ten_period_dim"]) == (
        33,
        35,
        24,
    )
    assert len(body["factors"]) == len(body["periods_tokens"]) == 64
    assert body["factors"][33:] == [16.0] * 31
    assert body["factors"][0] == 1.0


@pytest.mark.parametrize(
    "method",
    ["pi", "ntk", "ntk-aware", "abf", "yarn", "llama3", "cope", "ntk-rcd", "yarn-rcd", "longrope2"],
)
def test_every_method_gives_a_vector_for_a_model(capsys, method):
    body = factors_json(
        capsys, "--method", method, "--model", "bundled:reference", "--target-length", "2048"
    )
    assert len(body["factors"]) == 32
    assert min(body["factors"]) >= 1.0
    assert max(body["factors"]) > 1.0


def test_an_original_length_overrides_the_models(capsys):
    assert (
        factors_json(capsys, "--method", "pi", *REFERENCE, "--original-length", "1024")["factors"]
        == [2.0] * 32
    )


def test_an_override_with_an_equals_sign_may_come_before_the_recipe(capsys):
    assert main(["plan", "--search.seed=3", "--json", "debug", "--search.iterations", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == "debug"


def test_attention_factor_is_explicit(capsys):
    assert factors_json(capsys, "--method", "pi", *LLAMA3)["attention_factor"] == 1.0
    su = factors_json(capsys, "--method", "pi", *LLAMA3, "--attention-factor", "su")[
        "attention_factor"
    ]
    assert su == pytest.approx(1.1435, abs=1e-4)


@pytest.mark.parametrize("name", ["llama3_8b_128k", "phi3_mini_128k", "qwen3_8b_128k"])
def test_plan_needs_no_model(capsys, name):
    assert main(["plan", name, "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["fits"]
    assert 0 < cost["gpu_hours_likely"] < cost["gpu_hours_most"]
    if name == "qwen3_8b_128k":  # a descent
        assert 0 < cost["units"] < 1000
        assert 0 < cost["proposing"] < cost["proposing_most"]
    else:
        assert (cost["units"], cost["proposing"]) == (13440, 0)


COMMANDS = (
    "recipe", "plan", "search", "monitor", "report", "factors", "score", "data", "train", "study",
)  # fmt: skip


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([*words, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_help_has_one_line_for_each_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = help_of(capsys).splitlines()
    found = [line.split()[0] for line in lines if line.startswith("    ") and line.endswith(".")]
    assert tuple(found) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_has_an_example(capsys, command):
    said = help_of(capsys, command)
    assert f"\n  longrope2 {command}" in said.partition("\nexample")[2]


def test_examples_in_the_help_are_command_lines_that_parse(capsys):
    for command in COMMANDS:
        for line in help_of(capsys, command).partition("\nexample")[2].splitlines()[1:]:
            words = shlex.split(line)[1:]
            assert command_line._parse(words).run, line


def test_plan_says_when_a_scorer_does_not_fit(capsys):
    assert main(["plan", "llama3_8b_128k", "--accelerator", "rtx4090"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_recipe_reference_names_every_section(capsys):
    assert main(["recipe"]) == 0
    out = capsys.readouterr().out
    assert all(
        f"[{section}]" in out for section in ("model", "search", "needles", "report", "scorer")
    )
    assert "mutation_probability" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["search", "no-such-recipe"], ["recipe: expected", "demo"]),
        (
            ["search", "debug", "--search.populatoin-size", "3"],
            ["did you mean --search.population-size"],
        ),
        (["search", "debug", "--search.top-k", "many"], ["search.top_k", "'many'"]),
        (
            ["search", "debug", "--search.mutation-probability", "3"],
            ["search.mutation_probability", "less than or equal"],
        ),
        (["search", "debug", "--search.target-length", "256"], ["search.target_length", "256"]),
        (
            ["search", "debug", "--search.population-size", "4"],
            ["search.population_size", "at least 9"],
        ),
        (["search", "debug", "--search.target-length", "400000"], ["needles.text", "400000"]),
        (["search", "debug", "--search.critical-dims", "[3,99]"], ["search.critical_dims"]),
        (["search", "debug", "--search.starts", '["pi"]'], ["starts", "critical_dims = [0, 0]"]),
        (
            ["search", "debug", "--search.critical-dims", "0,0", "--search.starts", '["magic"]'],
            ["search.starts", "'magic'"],
        ),
        (
            ["search", "debug", "--search.start-tokens", "[300]"],
            ["search.start_tokens", "256, got 300"],
        ),
        (["search", "debug", "--search.start-tokens", "[-1]"], ["search.start_tokens", "-1"]),
        (
            ["search", "demo", "--search.population-size", "16"],
            ["search.population_size: expected to be left out with preset 'default'"],
        ),
        (["search", "debug", "--model.path", "/no/such/model"], ["model.path", "/no/such/model"]),
        (
            ["search", "debug", "--model.attention", "flash_attention_2"],
            ["model.attention", "sdpa"],
        ),
        (["search", "debug", "--needles.text", '["/no/such/*.txt"]'], ["text", "/no/such/*.txt"]),
        (["search", "debug", "--report.methods", '["magic"]'], ["report.methods", "magic"]),
        (
            ["search", "debug", "--report.text", '["/no/such/*.txt"]'],
            ["report.text", "/no/such/*.txt"],
        ),
        (["search", "debug", "--report.lengths", "[32]"], ["report.lengths", "got 32"]),
        (["search", "debug", "--report.text", SEARCHED], ["report.text", "in both"]),
        (
            ["score", "debug", "--factors", "ntk", "--report.text", SEARCHED],
            ["report.text", "in both"],
        ),
        (["search", "debug", "--run-dir", "foo://x"], ["--run-dir", "foo://x"]),
        (["search", "debug", "--train.betas", "[2, 3]"], ["train.betas", "less than 1"]),
        (["plan", "debug", "--report.methods", '["magic"]'], ["report.methods", "magic"]),
        (
            ["plan", "llama3_8b_128k", "--train.num-workers", "10"],
            ["train.global_batch_size", "multiple of 10"],
        ),
        (
            ["plan", "llama3_8b_128k", "--train.sequence-parallel", "3"],
            ["train.sequence_parallel", "divisor of 8"],
        ),
        (["plan", "llama3_8b_128k", "--data.num-shards", "100000"], ["data.num_shards", "100000"]),
        (["plan", "llama3_8b_128k", "--accelerator", "abacus"], ["--accelerator", "abacus"]),
        (["plan", "llama3_8b_128k", "--utilization", "2"], ["--utilization: expected", "got 2"]),
        (["monitor", "runs/x", "--every", "0"], ["--every: expected seconds above 0, got 0"]),
        (["factors", "--method", "magic", *LLAMA3], ["--method", "yarn"]),
        (["factors", "--method", "pi", "--target-length", "8192"], ["--head-dim", "--model"]),
        (["factors", "--method", "pi", *LLAMA3[:-1], "4096"], ["--target-length", "8192"]),
        (
            ["factors", "--method", "longrope2", *LLAMA3, "--critical-dim", "64"],
            ["--critical-dim", "63"],
        ),
        (
            ["factors", "--method", "pi", *LLAMA3, "--critical-dim", "33"],
            ["--critical-dim", "ntk-rcd", "'pi'"],
        ),
        (["factors", "--method", "pi", *REFERENCE, "--base", "777"], ["--base", "--model"]),
        (["factors", "--method", "pi", *REFERENCE, "--head-dim", "128"], ["--head-dim", "--model"]),
        (
            ["factors", "--method", "pi", *REFERENCE, "--rotary-dim", "64"],
            ["--rotary-dim", "--model"],
        ),
        (
            ["search", "--run-dir", "d", "--search.iterations", "0", "debug"],
            ["RECIPE", "--search.iterations", "'0'"],
        ),
        (["search", "--search.seed=1", "--name", "demo", "debug"], ["RECIPE", "--name", "'demo'"]),
        (
            ["search", "debug", "--search.critical-dims", "[3]"],
            ["search.critical_dims: expected two numbers, got [3]"],
        ),
        (
            ["search", "debug", "--search.critical-dims", "[]"],
            ["search.critical_dims: expected two numbers, got []\n"],
        ),
        (
            ["score", "debug", "--factors", "/no/such/file.json"],
            ["--factors", "/no/such/file.json"],
        ),
        (["report", "/no/such/run"], ["RUN_DIR", "/no/such/run"]),
    ],
)
def test_a_mistake_gives_one_clear_message(capsys, arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = mistake(capsys, *arguments)
    for part in parts:
        assert part in message
    assert not list(tmp_path.glob("runs/*/scores/*")), "nothing may have been scored"


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "causal language model"),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            "rotary position embeddings",
        ),
    ],
)
def test_a_model_that_cannot_be_searched_is_refused_by_name(capsys, tmp_path, config, part):
    message = mistake(capsys, "search", "debug", "--model.path", model_dir(tmp_path, **config))
    assert part in message
    assert config["architectures"][0] in message or config["model_type"] in message


@pytest.mark.parametrize(
    ("factors", "part"),
    [
        ([1.0] * 31, "expected 32 numbers"),
        ([1.0] * 31 + [-1.0], "finite positive"),
        ([1.0] * 31 + [float("nan")], "finite positive"),
        ({"something": "else"}, "long_factor"),
        (["a"] * 32, "expected numbers"),
    ],
)
def test_a_bad_vector_is_refused(capsys, tmp_path, factors, part):
    (tmp_path / "factors.json").write_text(json.dumps(factors))
    assert part in mistake(capsys, "score", "debug", "--factors", str(tmp_path / "factors.json"))


def test_a_run_directory_of_another_recipe_is_refused_by_field(capsys, tmp_path):
    open_run(prepare(load_recipe("debug")), RunDir(str(tmp_path / "run")))
    there = ("--run-dir", str(tmp_path / "run"))
    assert "search.seed is 0 there and 5 now" in mistake(
        capsys, "search", "debug", "--search.seed", "5", *there
    )
    message = mistake(capsys, "search", "debug", "--needles.seed", "5", *there)
    assert "needles.seed is 0 there and 5 now" in message


def test_an_unreachable_ray_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    message = mistake(capsys, "search", "debug", "--run-dir", str(tmp_path / "run"))
    assert "RAY_ADDRESS: expected a reachable Ray cluster at '127.0.0.1:1'" in message


def test_something_else_that_listens_at_the_address_is_given_up(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        message = mistake(capsys, "search", "debug", "--run-dir", str(tmp_path / "run"))
    expected = f"RAY_ADDRESS: expected a Ray cluster at '{address}', got no answer of one in 2 s"
    assert expected in message


@pytest.mark.usefixtures("ray_on_this_machine")
def test_more_gpus_than_there_are_says_so(capsys, tmp_path):
    there = ("--run-dir", str(tmp_path / "run"))
    message = mistake(capsys, "search", "debug", *there, "--scorer.cpus-per-scorer", "1000")
    assert "scorer.cpus_per_scorer" in message


def test_a_model_that_cannot_see_as_far_is_refused_before_its_weights(capsys, tmp_path):
    path = save_tiny("mistral_windowed", tmp_path)
    options = [
        "--run-dir",
        str(tmp_path / "run"),
        "--search.target-length",
        "96",
        "--model.path",
        path,
    ]
    capsys.readouterr()
    said = mistake(capsys, "search", "debug", *options)
    assert "model.sliding_window: expected 96 tokens" in said
    assert "window of 40" in said


@pytest.mark.usefixtures("ray_on_this_machine")
def test_score_reads_a_published_vector_and_says_that_it_is_not_monotone(capsys, tmp_path):
    vector = next(v for v in PUBLISHED if v["id"] == "mistral-7b_256k_on-128k-ft")["long_factor"]
    (tmp_path / "config.json").write_text(
        json.dumps({"rope_scaling": {"long_factor": vector[:32]}})
    )
    options = ["--factors", str(tmp_path / "config.json"), "--report.num-samples", "4", "--json"]
    assert main(["score", "debug", *options, *ONE_SCORER]) == 0
    said = capsys.readouterr()
    body = json.loads(said.out)
    assert not body["monotone"]
    assert "not monotone" in said.err
    assert len(body["nll_per_sample"]) == 4
    assert list(body["by_depth"]) == ["0", "0.25", "0.5", "0.75"]
    for sample, scores in enumerate(body["by_depth"].values()):
        ppl = math.exp(body["nll_per_sample"][sample] / body["tokens_per_sample"][sample])
        right = float(body["correct_per_sample"][sample])
        assert scores == {"ppl": pytest.approx(ppl), "accuracy": right, "num_needles": 1}
    assert body["ppl"] > 1


def fake_scores(monkeypatch) -> dict:
    """Let `score` do without Ray, every score not finite; the vectors that it asks to score."""
    seen = {}

    def not_finite(prepared, vectors, progress):
        seen.update(vectors)
        return dict.fromkeys(vectors, NeedleSummary((None,), (8,), (False,), (0.0,)))

    monkeypatch.setattr("longrope2_ray.workers.connection.ray_session", nullcontext)
    monkeypatch.setattr(search_job, "score_vectors", not_finite)
    return seen


def test_a_method_is_scored_as_in_the_tables_and_a_score_may_be_not_finite(capsys, monkeypatch):
    seen = fake_scores(monkeypatch)
    options = [
        "--report.lengths",
        "[256, 2048]",
        "--report.num-samples",
        "4",
        "--attention-factor",
        "1.2",
    ]
    assert main(["score", "debug", "--factors", "pi", *options]) == 0
    assert "pi on report@2048, attention factor 1.2: needle perplexity not finite" in (
        out := capsys.readouterr().out
    )
    assert "  depth 0: needle perplexity not finite, accuracy 0%, needles 1\n" in out
    first = {name: vector.values[0] for name, vector in seen.items()}
    # The length is at least the target's ratio, which is what would be served.
    assert first == {
        "report@256": 4.0,
        "report@2048": 8.0,
    }
    assert {vector.attention_factor for vector in seen.values()} == {1.2}
    for number in ("nan", "0", "-1", "inf", "x", "search"):
        said = mistake(capsys, "score", "debug", "--factors", "pi", "--attention-factor", number)
        assert f"--attention-factor: expected a positive number, su or yarn, got '{number}'" in said


def test_a_model_that_carries_factors_is_scored_with_them(capsys, monkeypatch, tmp_path):
    """An exported model needs no second file; its config says the factors."""
    reference = Path(longrope2_ray.__file__).parent / "assets" / "reference"
    for path in reference.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((reference / "config.json").read_text())
    carried = [1 + 3 * i / 31 for i in range(32)]
    config["rope_parameters"] |= {
        "rope_type": "longrope",
        "short_factor": [1.0] * 32,
        "long_factor": carried,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.05,
    }
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    seen = fake_scores(monkeypatch)
    assert main(["score", "debug", "--model.path", str(tmp_path)]) == 0
    assert f"{tmp_path} on report@1024, attention factor 1.05" in capsys.readouterr().out
    [vector] = seen.values()
    assert vector.values.tolist() == carried


def test_a_model_without_factors_is_not_scored_without_any(capsys):
    message = mistake(capsys, "score", "debug")
    assert "--factors: expected a file, a URL or one of unscaled, pi, " in message
    assert "got none, and the model at bundled:reference carries no factors" in message


@pytest.mark.usefixtures("ray_on_this_machine")
def test_a_short_window_is_searched_from_a_given_vector_and_its_winner_scores_the_same(
    capsys, tmp_path
):
    trained, run_dir = [1 + 3 * i / 31 for i in range(32)], str(tmp_path / "run")
    search = [
        "search", "debug", "--run-dir", run_dir, "--search.preset", "longrope",
        "--search.target-length", "128", "--search.starts", json.dumps(["unscaled", trained]),
        "--search.tail-bounds", "[1, 4]", "--search.start-tokens", "[8]",
        "--search.population-size", "4", "--search.iterations", "0",
        "--report.methods", '["unscaled", "longrope2"]', *ONE_SCORER,
    ]  # fmt: skip
    assert main(search) == 0
    assert "The first 8 positions keep the original RoPE." in capsys.readouterr().out
    winner = json.loads((tmp_path / "run" / "winner.json").read_text())
    assert (winner["start_tokens"], winner["target_length"], winner["original_length"]) == (
        8,
        128,
        256,
    )
    winner_file = f"{run_dir}/winner.json"
    options = ["--report.lengths", "[128, 256]", "--factors", winner_file, "--json", *ONE_SCORER]
    assert main(["score", "debug", *options]) == 0
    reported = next(row for row in winner["report"] if row["method"] == "longrope2")
    # One line for each length of the report, in its order.
    at_128, at_256 = map(json.loads, capsys.readouterr().out.splitlines())
    assert at_128["nll_per_sample"] == pytest.approx(reported["nll_per_sample"], rel=1e-4)
    assert (at_128["needle_set"], at_256["needle_set"]) == ("report@128", "report@256")
    assert at_256["nll_per_sample"] != at_128["nll_per_sample"]
