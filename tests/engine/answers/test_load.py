import shutil

from engine.answers.answer import generate_text
from tests.engine.answers.answering import answers, config
from tests.tiny import write_tokenizer


def test_a_huggingface_folder_answers_too(gpt2_folder, tmp_path):
    folder = shutil.copytree(gpt2_folder, tmp_path / "gpt2")
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)
    generate_text(config(folder, tmp_path))
    assert len(answers(tmp_path / "out.jsonl")) == 3  # its context is longer
