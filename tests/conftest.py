"""Settings of the whole suite: no test fails because a machine is slow."""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer, for trainings."""
    from tiny_training import save_model_and_tokenizer

    folder = tmp_path_factory.mktemp("model")
    save_model_and_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def ray_on_this_machine() -> Iterator[None]:
    """One Ray for all tests of this process that need one: starting it takes seconds."""
    from longrope2_ray.workers.connection import ray_session

    with ray_session():
        yield
