import pytest
import torch

from tests.engine.generation.random_gpt2 import load_gpt2, save_gpt2


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random_gpt2")
    save_gpt2(folder)
    return folder


@pytest.fixture
def network(gpt2_folder):
    """The random GPT-2 on this rank alone; a test may change its weights."""
    torch.set_num_threads(1)
    return load_gpt2(gpt2_folder)
