import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.engine.generation.random_gpt2 import load_gpt2, random_prompts, save_gpt2


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
