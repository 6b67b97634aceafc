"""Settings and shared fixtures of the whole suite: no test fails because a machine is slow."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# Torch reads it when it is imported, here and in workers. With two threads the tests of tiny models
# took three times the CPU and on a busy machine five times as long: threads wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

# Ray Train reads these in this process and its workers: how often it looks after workers, and how
# long they may take to start on a slow machine.
os.environ |= {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dashboards first: Ray exports metrics that are new in a process's first session only.

    Seen with Ray 2.60: a gauge that is made after ``ray.shutdown`` and another ``ray.init`` never
    comes out, one that the first session had does.
    """
    items.sort(key=lambda item: item.path.name != "test_dashboards.py")


@pytest.fixture(scope="session")
def ray_train_ends_soon() -> Iterator[None]:
    """Wait a second, not twelve, for Ray Train's cleaner at the end of a training.

    With Ray 2.60 the cleaner's thread never ends when it is told to, and the controller waits for
    it as long as it may.
    """
    from functools import partial

    from ray.train.v2.api import data_parallel_trainer

    cleaner = data_parallel_trainer.PlacementGroupCleanerCallback
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data_parallel_trainer,
            "PlacementGroupCleanerCallback",
            partial(cleaner, stop_timeout=1.0),
        )
        yield


@pytest.fixture(scope="session")
def model_dir(ray_train_ends_soon: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer, for trainings."""
    from tiny_training import save_model_and_tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_model_and_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def until_the_end() -> Iterator[ExitStack]:
    """What is closed when the last test is over."""
    with ExitStack() as stack:
        yield stack


def start_ray(stack: ExitStack) -> None:
    import ray

    from longrope2_ray.workers.connection import ray_session

    if not ray.is_initialized():
        stack.enter_context(ray_session())


@pytest.fixture(scope="module")
def ray_on_this_machine(until_the_end: ExitStack) -> None:
    """One Ray for all tests of this process that need one: starting it takes seconds.

    It is started again for the next module where one has stopped it (``no_ray``).
    """
    start_ray(until_the_end)


@pytest.fixture(scope="module")
def no_ray() -> None:
    """No Ray in this process, for a module whose own Ray has other settings."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def finished_debug_run(until_the_end: ExitStack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a whole debug search with two scorers; copy it to change it."""
    from longrope2_ray.recipe.loading import load_recipe
    from longrope2_ray.search.job import search

    start_ray(until_the_end)
    run_dir = tmp_path_factory.mktemp("debug") / "run"
    search(load_recipe("debug", ["--scorer.num-scorers", "2"]), str(run_dir))
    return run_dir


@pytest.fixture(scope="session", autouse=True)
def bundled_books_are_tokenized_once() -> Iterator[None]:
    """Remember the bundled books' tokens: dozens of tests prepare a search of the reference model,
    and each would tokenize whole books for seconds."""
    from longrope2_ray.storage.assets import ASSETS
    from longrope2_ray.tasks import needle

    encode: Callable[[Any, Any], list[int]] = needle.encode_book
    known: dict[str, list[int]] = {}

    def remembered(tokenizer: Any, book: Any) -> list[int]:
        if getattr(tokenizer, "name_or_path", None) != str(ASSETS / "reference"):
            return encode(tokenizer, book)
        if book.text not in known:
            known[book.text] = encode(tokenizer, book)
        return known[book.text]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(needle, "encode_book", remembered)
        yield
