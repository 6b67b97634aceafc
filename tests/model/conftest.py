"""Fixtures of the tests of models."""

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, WINDOW, save_tiny


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every family on disk, as a user's model is."""
    root = tmp_path_factory.mktemp("models")
    return {family: save_tiny(family, root / family) for family in FAMILIES}


@pytest.fixture
def input_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, VOCABULARY, (1, 2 * WINDOW), generator=generator)
