import torch

from engine.huggingface.export_files import Exported, index_of, plan_files
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from models.huggingface.families import GPT2
from models.huggingface.tensors import EMBEDDING, SCORE, parameter_names
from models.sizes import GPTSize

SIZE = GPTSize(num_layers=2, hidden_size=8, num_heads=2, vocab_size=100, context_length=16)
EXPORTED = Exported(family=GPT2, size=SIZE, dtype=torch.float16)


def test_files_hold_every_parameter_once_and_no_more_bytes_than_they_may():
    parallel = start_parallel(ParallelLayout(), seed=0)
    names = list(parameter_names(SIZE, "scalar"))
    assert plan_files(names, EXPORTED, 10**9, parallel) == {"model.safetensors": (0, names)}
    files = plan_files(names, EXPORTED, 1000, parallel)
    assert [*files][0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 2
    assert [name for _, held in files.values() for name in held] == names
    totals = [index_of({"": one}, EXPORTED)["metadata"]["total_size"] for one in files.values()]
    assert [*files.values()][0] == (0, [EMBEDDING])  # 1,600 bytes
    assert totals[0] == 100 * 8 * 2 and max(totals[1:]) <= 1000
    index = index_of(files, EXPORTED)
    assert index["metadata"]["total_size"] == sum(totals)
    (file_of_scores,) = (file for file, (_, held) in files.items() if SCORE in held)
    assert index["weight_map"]["score.weight"] == file_of_scores
    assert index["weight_map"]["transformer.wte.weight"] == [*files][0]
