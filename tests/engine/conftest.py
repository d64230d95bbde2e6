"""What tests of several rooms begin with: a tokenizer, real data, a random GPT-2."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import GPT2LMHeadModel

from engine.data.tokenizer import Tokenizer, train_sentencepiece
from tests.engine.generation.random_gpt2 import load_gpt2, random_prompts, save_gpt2

settings.register_profile("no deadline", deadline=None)  # other work may hold a core for a while
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A sentencepiece tokenizer of 400 pieces."""
    texts = [
        "The Mill is a cheap pub near the river. It serves French food.\n\nFamilies like it.",
        "The Punter is a moderately priced coffee shop; it serves Indian food.\n",
        "Describe this place. name: The Mill | type: pub | food: French | area: riverside",
    ] * 4
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    return train_sentencepiece(texts, path, vocab_size=400)


@pytest.fixture(scope="session")
def data_pack() -> Path:
    """The folder of real data that may lie beside the project."""
    folder = Path(__file__).parents[2].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data pack is not at {folder}")
    return folder


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


@pytest.fixture(scope="session")
def huggingface_greedy(gpt2_folder):
    """The eight tokens that transformers puts after each of random_prompts(64, 200), by index."""
    model = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval()
    prompts = random_prompts(64, 200)
    rows = torch.zeros(64, 200, dtype=torch.int64)
    mask = torch.zeros_like(rows)
    for row, prompt in enumerate(prompts):  # padded on the left
        rows[row, -len(prompt) :] = torch.from_numpy(prompt)
        mask[row, -len(prompt) :] = 1
    new = model.generate(
        rows, attention_mask=mask, do_sample=False, max_new_tokens=8, pad_token_id=0
    )
    answers = [tokens[200:].tolist() for tokens in new]
    # Up to the end of text, which is 0.
    return {i: tokens[: (tokens + [0]).index(0) + 1] for i, tokens in enumerate(answers)}
