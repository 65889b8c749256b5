import pytest
import torch


@pytest.fixture
def device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
