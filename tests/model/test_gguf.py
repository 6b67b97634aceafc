"""GGUF files as ordinary models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import WINDOW, rotary_of, section, tiny_config, tiny_model

from longrope2_ray.model.fingerprint import model_fingerprint
from longrope2_ray.model.loading import load_model
from longrope2_ray.model.spec import read_shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_loads_as_an_ordinary_model(dtype: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", tie_word_embeddings=False))
    write_gguf(model, tmp_path / "tiny.gguf")
    shape = read_shape(section(tmp_path))
    assert (shape.rotary_dim, shape.original_length, shape.num_parameters) == (
        16, WINDOW, sum(p.numel() for p in model.parameters())
    )  # fmt: skip
    loaded = load_model(section(tmp_path, dtype=dtype))
    assert not hasattr(loaded.config, "quantization_config")
    assert rotary_of(loaded).inv_freq.dtype == torch.float32
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(loaded.get_parameter(name), parameter.to(loaded.dtype))
    loaded.save_pretrained(tmp_path / "again")
    assert model_fingerprint(section(tmp_path)) != model_fingerprint(section(tmp_path / "again"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            "got scaling 'yarn' in .*un-extended base model",
        ),
        (
            lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
            "got scaling 'none', rope_freqs.weight in",
        ),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.NONE), None),
    ],
)
def test_gguf_files_whose_rope_transformers_would_drop_are_refused(
    change: Any, message: str | None, tmp_path: Path
) -> None:
    write_gguf(
        tiny_model(tiny_config("llama", tie_word_embeddings=False)), tmp_path / "tiny.gguf", change
    )
    if message is None:
        assert read_shape(section(tmp_path)).rotary_dim == 16
        return
    with pytest.raises(ValueError, match=message):
        read_shape(section(tmp_path))


def test_a_gguf_that_rotates_less_than_transformers_would_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "phi3")
    for add, value in (
        (writer.add_context_length, WINDOW), (writer.add_embedding_length, 64),
        (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, 32064),
        (writer.add_rope_freq_base, 1e4),
        (writer.add_rope_dimension_count, 12),
    ):  # fmt: skip
        add(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"expected 16 rotated dimensions, .*got 12"):
        read_shape(section(tmp_path))


def write_gguf(
    model: torch.nn.Module, path: Path, change: Callable[[Any], None] = lambda writer: None
) -> None:
    """Write a Llama as llama.cpp lays it out: its own names, query and key rows interleaved.

    ``change`` adds to the file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        rows = tensor
        for projection, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if projection in name:
                halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
                rows = halves.swapaxes(1, 2).reshape(tensor.shape)
        stem, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", rows.contiguous().numpy())
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
