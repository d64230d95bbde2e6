from pathlib import Path

import pytest
from hypothesis import settings

from engine.data.tokenizer import Tokenizer, train_sentencepiece

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
    folder = Path(__file__).parents[3].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data pack is not at {folder}")
    return folder
