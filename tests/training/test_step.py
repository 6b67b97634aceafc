"""Mixed context window training on tiny models: windows, leaks, loss, splits, checkpoints."""

import itertools
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from tiny_models import (
    FAMILIES,
    SHAPE,
    VOCABULARY,
    WINDOW,
    shape_of,
    some_factors,
    tiny_config,
    tiny_model,
)
from torch import multiprocessing
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from longrope2_ray.data.packing import Segment
from longrope2_ray.recipe.training import TrainSection
from longrope2_ray.rope.factors import RescaleFactors
from longrope2_ray.training.attention import (
    document_attention,
    flash_varlen_inputs,
)
from longrope2_ray.training.batches import (
    IGNORED,
    attention_ranges,
    batch_indices,
    check_parallel,
    learning_rate,
    position_ids_of,
    targets_of,
)
from longrope2_ray.training.checkpoints import is_whole, seal
from longrope2_ray.training.loss import SegmentLoss, require_trainable
from longrope2_ray.training.sharding import without_noise
from longrope2_ray.training.step import MixedTrainer

LENGTH = 96
CUTS = {"short": (0, 30, 61, LENGTH), "long": (0, 70, LENGTH)}


def segment(window: str, seed: int = 0) -> Segment:
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, LENGTH)
    return Segment(ids, np.array(CUTS[window], dtype=np.int32), window)


def settings(**changes) -> TrainSection:
    plain = {
        "dtype": "float32",
        "global_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 2,
        "loss_chunk_tokens": 32,
    }
    return TrainSection(**{**plain, **changes})


def factors_of(model) -> RescaleFactors:
    return some_factors(shape_of(model), 1.1)


def make_trainer(family: str = "llama", **changes) -> MixedTrainer:
    return trainer_of(tiny_model(tiny_config(family)), **changes)


def trainer_of(model, **changes) -> MixedTrainer:
    return MixedTrainer(model, shape_of(model), factors_of(model), settings(**changes), num_steps=6)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------- pure functions


def test_learning_rate_warms_up_to_its_peak_and_falls_to_zero() -> None:
    chosen = settings(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(step, 20, chosen) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.02


def test_an_epoch_takes_every_segment_at_most_once_and_epochs_differ() -> None:
    chosen = settings(global_batch_size=3)
    first = [i for step in range(3) for i in batch_indices(step, 10, chosen)]
    second = [i for step in range(3, 6) for i in batch_indices(step, 10, chosen)]
    assert len(set(first)) == len(first) == 9
    assert len(set(second)) == 9
    assert first != second
    assert set(first) | set(second) <= set(range(10))


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    for window in ("short", "long"):
        one = segment(window)
        targets = targets_of(one)
        ends = np.array(CUTS[window][1:]) - 1
        assert (targets[ends] == IGNORED).all()
        rest = np.setdiff1d(np.arange(LENGTH), ends)
        assert (targets[rest] == one.input_ids[rest + 1]).all()


def test_positions_restart_in_short_segments_only() -> None:
    short, long = position_ids_of(segment("short")), position_ids_of(segment("long"))
    assert list(np.flatnonzero(short == 0)) == list(CUTS["short"][:-1])
    assert short.max() == max(np.diff(CUTS["short"])) - 1
    assert (long == np.arange(LENGTH)).all()
    assert list(attention_ranges(segment("long"))) == [0, LENGTH]


def test_an_uneven_split_is_refused_by_field() -> None:
    check_parallel(4, 2, settings(sequence_parallel=2))
    for world, heads, changes, field in (
        (4, 3, {"sequence_parallel": 2}, "train.sequence_parallel"),
        (3, 2, {"sequence_parallel": 2}, "train.sequence_parallel"),
        (4, 2, {"global_batch_size": 6}, "train.global_batch_size"),
    ):
        with pytest.raises(ValueError, match=field):
            check_parallel(world, heads, settings(**changes))


# ---------------------------------------------------------------------------------------- attention


def kernels() -> list:
    return [
        pytest.param("sdpa", "cpu", torch.float32),
        pytest.param("sdpa", "cpu", torch.bfloat16),
        pytest.param("sdpa", "cuda", torch.float32, marks=pytest.mark.gpu),
        pytest.param("sdpa", "cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("flash_attention_2", "cuda", torch.bfloat16, marks=pytest.mark.gpu),
    ]


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize(("kernel", "device", "dtype"), kernels())
def test_documents_do_not_see_each_other(
    kernel: str, device: str, dtype: torch.dtype, window: int | None
) -> None:
    """Perturb one document: nothing changes in the others, neither forward nor in the gradient."""
    if kernel == "flash_attention_2":
        pytest.importorskip("flash_attn")
    torch.manual_seed(0)
    ranges = attention_ranges(segment("short"))
    q, k, v = (torch.randn(1, heads, LENGTH, 16, device=device, dtype=dtype) for heads in (4, 2, 2))
    v.requires_grad_(True)
    options = {"scaling": 0.25, "window": window, "kernel": kernel}
    out = document_attention(q, k, v, ranges, **options)
    first, last = ranges[1], ranges[2]
    (grad,) = torch.autograd.grad(out[:, :, first:last].sum(), v)
    assert not grad[:, :, :first].any()
    assert not grad[:, :, last:].any()
    assert grad[:, :, first:last].any()
    with torch.no_grad():
        k[:, :, first:last] += 1
        v[:, :, first:last] -= 1
        changed = document_attention(q, k, v, ranges, **options)
    same = torch.ones(LENGTH, dtype=torch.bool)
    same[first:last] = False
    assert torch.equal(changed[:, :, same], out[:, :, same])
    assert not torch.equal(changed[:, :, first:last], out[:, :, first:last])


@pytest.mark.parametrize("window", [None, 12])
def test_document_attention_is_attention_under_the_documents_mask(window: int | None) -> None:
    torch.manual_seed(0)
    ranges = attention_ranges(segment("short"))
    q, k, v = (torch.randn(1, heads, LENGTH, 16) for heads in (4, 2, 2))
    at = torch.arange(LENGTH)
    owner = torch.bucketize(at, torch.tensor(ranges[1:]), right=True)
    mask = (owner[:, None] == owner) & (at[:, None] >= at)
    if window:
        mask &= at[:, None] - at < window
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True
    )
    found = document_attention(q, k, v, ranges, scaling=0.25, window=window)
    assert torch.allclose(found, wanted, atol=1e-6)


def test_flash_varlen_gets_the_documents_as_int32_bounds() -> None:
    made = flash_varlen_inputs(attention_ranges(segment("short")), torch.device("cpu"), window=12)
    assert made["cu_seqlens_q"].dtype == torch.int32
    assert made["cu_seqlens_q"].tolist() == list(CUTS["short"])
    assert made["max_seqlen_q"] == made["max_seqlen_k"] == 35
    assert made["window_size"] == (11, 0)
    assert made["causal"] is True


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "family", ["llama", "phi3_partial", "qwen3", "mistral_windowed", "gpt_neox"]
)
def test_short_segments_keep_the_models_own_loss_and_do_not_leak(family: str) -> None:
    """A short segment's NLL is the sum over its documents, each alone under the original RoPE."""
    trainer = make_trainer(family)
    one = segment("short")
    own = tiny_model(tiny_config(family))
    wanted = 0.0
    for first, last in zip(CUTS["short"][:-1], CUTS["short"][1:], strict=True):
        ids = torch.tensor(one.input_ids[first:last])[None]
        wanted += float(own(input_ids=ids, labels=ids, use_cache=False).loss) * (last - first - 1)
    with trainer.window(one), torch.no_grad():
        found = float(trainer._loss(*trainer._inputs(one)))
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("mixed", [True, False])
def test_long_segments_take_the_rescaled_rope_and_short_ones_only_without_mixing(
    mixed: bool,
) -> None:
    trainer = make_trainer("llama", mixed=mixed)
    model = tiny_model(tiny_config("llama"))
    vector = factors_of(model)
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": vector.values.tolist(),
        "original_max_position_embeddings": WINDOW,
        "factor": 2.0,
        "attention_factor": 1.1,
    }
    extended = tiny_model(tiny_config("llama", rope, max_position_embeddings=LENGTH))
    long = segment("long")
    ids = torch.tensor(long.input_ids)[None]
    logits = extended(input_ids=ids, use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(
        logits, torch.tensor(targets_of(long)), reduction="sum"
    )
    with trainer.window(long), torch.no_grad():
        assert float(trainer._loss(*trainer._inputs(long))) == pytest.approx(
            float(wanted), rel=1e-5
        )
    short = segment("short")
    angles = [
        buffer
        for name, buffer in trainer._loss.named_buffers()
        if name.endswith("rotary_emb.inv_freq")
    ]
    before = [buffer.clone() for buffer in angles]
    with trainer.window(short):
        assert all(torch.equal(a, b) for a, b in zip(angles, before, strict=True)) == mixed
    assert all(torch.equal(a, b) for a, b in zip(angles, before, strict=True))


@pytest.mark.usefixtures("one_process")
def test_families_with_a_loss_of_their_own_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Cohere"):
        make_trainer("cohere")
    assert "cohere" in FAMILIES


RECURRENT = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            "Qwen3NextConfig",
            RECURRENT,
            "carries something from one document of a segment into the next",
        ),
        ("FalconConfig", {}, r"FalconForCausalLM cannot be trained here: TypeError"),
        ("SeedOssConfig", {"residual_dropout": 0.3, "attention_dropout": 0.3}, None),
        ("MixtralConfig", {"num_local_experts": 4, "router_jitter_noise": 0.3}, None),
    ],
)
def test_a_few_tokens_tell_what_can_be_trained(
    config: str, changes: dict, message: str | None
) -> None:
    made = getattr(transformers, config)(**SHAPE | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(made).train()
    kernel = model.config._attn_implementation
    if message:
        with pytest.raises(ValueError, match=message):
            require_trainable(SegmentLoss(model, 32), VOCABULARY)
    else:
        require_trainable(SegmentLoss(model, 32), VOCABULARY)
        without_noise(model)
        ids = torch.arange(20)[None]
        assert model.training
        assert torch.equal(model(ids).logits, model.eval()(ids).logits)  # no dropout, no jitter
    assert model.config._attn_implementation == kernel


# -------------------------------------------------------------------------------------- whole steps


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_lowers_the_loss_of_both_windows(checkpointing: bool) -> None:
    trainer = make_trainer(activation_checkpointing=checkpointing, learning_rate=3e-3)
    batch = [segment("short", 1), segment("long", 2)]
    results = [trainer.step(step, batch) for step in range(6)]
    for window in ("short", "long"):
        assert results[-1].window_losses[window] < results[0].window_losses[window] - 0.3
    assert results[0].num_tokens == 2 * LENGTH - 3 - 2
    assert results[0].num_positions == 2 * LENGTH
    assert results[0].num_pairs == (30**2 + 31**2 + 35**2 + LENGTH**2) / 2
    assert results[0].learning_rate == 1.5e-3
    total = sum(results[0].window_losses[w] * (LENGTH - n) for w, n in (("short", 3), ("long", 2)))
    assert results[0].loss == pytest.approx(total / results[0].num_tokens)


# (name, processes, how many of them share a segment)
SPLITS = (("one", 1, 1), ("data", 2, 1), ("sequence", 2, 2))


def _train_in_every_split(rank: int, folder: str) -> None:
    """What each of two processes does: starting them takes longer than all these trainings."""
    torch.set_num_threads(1)
    for tied in (False, True):
        for name, world, degree in SPLITS:
            if rank < world:
                place = f"{folder}/{name}-{tied}"
                _losses_and_weights(rank, world, degree, place, tied)


def _losses_and_weights(rank: int, world: int, degree: int, place: str, tied: bool) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{place}.store", rank=rank, world_size=world
    )
    config = tiny_config("llama", tie_word_embeddings=tied)
    with torch.device("meta" if rank else "cpu"):  # weights come from the first rank
        model = tiny_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(model, sequence_parallel=degree)
    found = trainer.weights()
    assert set(found) == (set() if rank else set(before))
    assert all(torch.equal(before[name], tensor) for name, tensor in found.items())
    losses = []
    for step in range(3):
        batch = [segment("short", 2 * step), segment("long", 2 * step + 1)]
        if step == 2:  # a rank of two then has no target at all
            batch[0] = Segment(batch[0].input_ids, np.arange(LENGTH + 1, dtype=np.int32), "short")
        losses.append(trainer.step(step, [batch[i] for i in trainer.share([0, 1])]).loss)
    weights = trainer.weights()
    if rank == 0:
        torch.save((losses, weights), f"{place}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with losses and weights of the same training under every split."""
    folder = tmp_path_factory.mktemp("splits")
    multiprocessing.spawn(_train_in_every_split, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_weights_do_not_depend_on_the_split(splits: Path, tied: bool) -> None:
    """One process, two data-parallel ones, and two that share each segment (Ulysses)."""
    results = {name: torch.load(splits / f"{name}-{tied}.pt") for name, *_ in SPLITS}
    losses, weights = results.pop("one")
    for name, (other_losses, other_weights) in results.items():
        assert other_losses == pytest.approx(losses, abs=1e-5), name
        assert set(other_weights) == set(weights)
        assert all(
            torch.allclose(weights[key], other_weights[key], atol=1e-4) for key in weights
        ), name
    assert not torch.equal(
        weights["lm_head.weight"], tiny_model(tiny_config("llama")).lm_head.weight
    )
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]) is tied


@pytest.mark.usefixtures("one_process")
def test_a_resumed_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    batches = [[segment("short", 2 * step), segment("long", 2 * step + 1)] for step in range(4)]
    whole = make_trainer()
    losses = [whole.step(step, batch).loss for step, batch in enumerate(batches)]
    first = make_trainer()
    for step in range(2):
        first.step(step, batches[step])
    first.save(str(tmp_path / "checkpoint"), 2)
    second = make_trainer()
    assert second.load(str(tmp_path / "checkpoint")) == 2
    assert [second.step(step, batches[step]).loss for step in (2, 3)] == losses[2:]
    ends = whole.weights()
    assert all(torch.equal(ends[name], tensor) for name, tensor in second.weights().items())


class Evil:
    """Pickled, it is a call of os.system that touches a file."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.touched}",)


def forge(checkpoint: Path, touched: Path, where: str) -> None:
    """Put code into a checkpoint, and make its checksums those of an honest one."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    if where == "metadata":
        metadata.planner_data = Evil(touched)
    else:
        name = "model.model.model.norm.weight"
        (index,) = (index for index in metadata.storage_data if index.fqn == name)
        info = metadata.storage_data.pop(index)
        with (checkpoint / info.relative_path).open("ab") as file:
            info.offset = file.tell()
            torch.save(Evil(touched), file)
            info.length = file.tell() - info.offset
        if where == "bytes":
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            index = MetadataIndex(name)
        metadata.storage_data[index] = info
    path.write_bytes(pickle.dumps(metadata))
    next(checkpoint.glob("whole-*")).unlink()
    seal(str(checkpoint), 1, 0, 1)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("metadata", r"checkpoint/\.metadata is no checkpoint of a training.*\(posix\.system\)"),
        ("tensor", r"checkpoint is no checkpoint of a training.*posix\.system"),
        ("bytes", r"checkpoint is no checkpoint of a training.*norm\.weight is no tensor"),
    ],
)
def test_a_forged_checkpoint_is_refused_and_its_code_not_run(
    tmp_path: Path, where: str, message: str
) -> None:
    trainer, checkpoint, touched = make_trainer(), tmp_path / "checkpoint", tmp_path / "touched"
    trainer.step(0, [segment("short", 0), segment("long", 1)])
    trainer.save(str(checkpoint), 1)
    seal(str(checkpoint), 1, 0, 1)
    assert trainer.load(str(checkpoint)) == 1
    forge(checkpoint, touched, where)
    assert is_whole(str(checkpoint), 0, 1)
    with pytest.raises(ValueError, match=message):
        trainer.load(str(checkpoint))
    assert not touched.exists()


@pytest.mark.usefixtures("one_process")
def test_metadata_of_other_pythons_is_read_and_other_content_refused(tmp_path: Path) -> None:
    """3.11.2 pickles enums by getattr, 3.13 paths under another name; no name leaves a class."""
    metadata = "torch.distributed.checkpoint.metadata"
    for text, message in (
        (
            f"cbuiltins\ngetattr\n(c{metadata}\n_MEM_FORMAT_ENCODING\n"
            "VTORCH_CONTIGUOUS_FORMAT\ntR.",
            "_MEM_FORMAT_ENCODING",
        ),
        ("cpathlib._local\nPosixPath\n(V/\nVtmp\ntR.", "NoneType"),
        ("cbuiltins\ngetattr\n(ctorch\nSize\nV__class__\ntR.", "__class__"),
        ("ctorch\nload\n.", "torch.load"),
        (f"c{metadata}\nMetadata.__init__\n.", "Metadata.__init__"),
        ("garbage", "pickle"),
        ("", "input"),
    ):
        (tmp_path / ".metadata").write_text(text)
        with pytest.raises(ValueError, match=rf"\.metadata is no checkpoint .*{message}"):
            make_trainer().load(str(tmp_path))
