"""What a tokenizer's files put before a text, through all stages and against transformers."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from engine.answers.answer import generate_text
from engine.data.batches import pack
from engine.data.beginning_of_text import template
from engine.data.comparisons import Comparison, comparison_examples
from engine.data.examples import Example
from engine.data.prompt_format import Prompt, Reply
from engine.data.tokenizer import load_tokenizer
from engine.generation.generate import generate
from engine.huggingface.convert import load_huggingface, save_huggingface
from engine.huggingface.model_folder import read_size
from engine.losses import last_readings
from engine.ranks.start import start_parallel
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import build_network
from engine.training.passes import forward
from tests.beginnings import EOS, IDS, write_folder, write_json
from tests.engine.answers.answering import answers, assert_same
from tests.engine.huggingface.test_scores import save_scorer
from tests.families import save_family
from tests.ranks import run_ranks
from tests.tiny import (
    ppo_config,
    rm_config,
    sft_config,
    train,
    write_checkpoints,
    write_files,
    write_lines,
)

BOS = 0  # of the tiny recipe below, whose end of text begins texts too, as OPT's does
WINDOW = 32  # tokens of its pretraining sequences
PROMPTS = ["the mill", "theth\n", "a"]
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """The folder of tests/tiny.py with a tokenizer that begins texts."""
    folder = tmp_path_factory.mktemp("begun")
    write_files(folder)
    path = folder / "tokenizer.json"
    processor = template("<|endoftext|>", BOS)
    write_json(path, json.loads(path.read_text()) | {"post_processor": processor})
    write_checkpoints(folder)
    return folder


@pytest.fixture
def made(monkeypatch) -> list[Example]:
    """Every sequence that a stage makes."""
    found: list[Example] = []
    check = Example.__post_init__

    def note(example: Example) -> None:
        check(example)
        found.append(example)

    monkeypatch.setattr(Example, "__post_init__", note)
    return found


def is_window(example: Example) -> bool:
    return example.prompt_length == 1 and len(example.tokens) == WINDOW


def assert_all_begin(made: list[Example]) -> None:
    sequences = [example for example in made if not is_window(example)]
    assert len(sequences) > 20
    for example in sequences:
        prompt = example.tokens[: example.prompt_length].tolist()
        assert prompt[0] == BOS and len(prompt) >= 2 and BOS not in prompt[1:]


@pytest.mark.parametrize("stage", [sft_config, rm_config, ppo_config])
def test_every_sequence_of_a_stage_begins_alike(begun, tmp_path, made, stage):
    train(stage(begun, tmp_path / "run"))
    assert_all_begin(made)
    assert any(map(is_window, made)) == (stage is not rm_config)
    files = list((tmp_path / "run" / "tokens").glob("*.uint16"))
    assert len(files) == {sft_config: 1, rm_config: 0, ppo_config: 2}[stage]
    for path in files:
        stream = np.fromfile(path, np.uint16)
        num_documents = json.loads(path.with_suffix(".json").read_text())["num_read"]
        starts = np.flatnonzero((stream[1:] == BOS) & (stream[:-1] == BOS))  # behind another's end
        assert stream[0] == stream[-1] == BOS
        assert len(starts) == num_documents - 1
        assert (stream == BOS).sum() == 2 * num_documents


def test_a_dialogue_begins_alike(begun, tmp_path, monkeypatch):
    lines, prompts = iter(["the mill", "river"]), []

    def noted(network, given, *arguments, **options):
        prompts.extend(given)
        return generate(network, given, *arguments, **options)

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("engine.answers.dialogue.generate", noted)
    monkeypatch.setattr("builtins.input", typed)
    generate_text(GenerateConfig(source=begun / "policy", sampling=GREEDY))
    assert len(prompts) == 2
    assert all(prompt[0] == BOS and BOS not in prompt[1:] for prompt in prompts)


def write_model(family: str, kind: str, folder: Path) -> Path:
    """Write a random model with a tokenizer that begins texts; return the folder."""
    save_family(family, folder)
    write_folder(kind, folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        write_json(folder / name, content | {"bos_token_id": 1, "eos_token_id": IDS[EOS]})
    return folder


def answer(source: Path, folder: Path, layout: ParallelLayout | None = None) -> list[dict]:
    folder.mkdir(exist_ok=True)
    config = GenerateConfig(
        source=source,
        prompts=write_lines(folder / "prompts.jsonl", ({"prompt": text} for text in PROMPTS)),
        out=folder / "out.jsonl",
        prompt_suffix="",
        sampling=GREEDY,
    )
    if layout is None:
        generate_text(config)
    else:
        run_ranks(generate_text, 2, dataclasses.replace(config, layout=layout))
    return answers(config.out)


MODELS = [("opt", "opt"), ("llama", "llama 3"), ("gpt2", "template")]


@pytest.mark.parametrize(("family", "kind"), MODELS)
def test_greedy_answers_are_those_of_transformers(tmp_path, family, kind):
    folder = write_model(family, kind, tmp_path / "model")
    found = answer(folder, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    absent = list(range(len(IDS), model.config.vocab_size))  # which we never draw
    for text, ours in zip(PROMPTS, found, strict=True):
        given = tokenizer(text, return_tensors="pt")
        length = given["input_ids"].shape[1]
        theirs = model.generate(
            **given,
            max_new_tokens=GREEDY.max_new_tokens,
            do_sample=False,
            suppress_tokens=absent,
            pad_token_id=0,
        )[0, length:]
        assert ours["prompt"] == text and ours["tokens"] == len(theirs)
        assert ours["response"] == tokenizer.decode(theirs, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2)], ids=["dp", "tp"])
def test_two_ranks_answer_the_same(tmp_path, layout):
    folder = write_model("opt", "opt", tmp_path / "model")
    assert_same(answer(folder, tmp_path / "two", layout), answer(folder, tmp_path / "one"))


@pytest.mark.parametrize(("family", "kind"), [*MODELS, ("llama", "around"), ("opt", "opt grown")])
def test_a_score_of_a_raw_text_is_that_of_transformers(tmp_path, family, kind):
    source, out = tmp_path / "source", tmp_path / "out"
    save_scorer(family, source, pad_token_id=0, eos_token_id=IDS[EOS])
    (source / "tokenizer.json").unlink()
    shutil.copytree(write_folder(kind, tmp_path / "tokenizer"), source, dirs_exist_ok=True)
    tokenizer = load_tokenizer(source)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("scalar", read_size(source), parallel, numerics=Numerics())
    load_huggingface(network, source)
    completions = [Reply(text) for text in ("the", "is a mill", "th th")]
    comparison = Comparison(Prompt("the mill", "\n"), completions, [1, 2, 3])
    (unit,), _ = comparison_examples([comparison], tokenizer, max_length=64)
    assert {example.tokens[0] for example in unit} == set(tokenizer.bos_ids)
    assert {example.prompt_length for example in unit} == {8}
    batch = pack(unit, multiple_of=8)
    ours = last_readings(forward(network, [batch])[0], batch.cu_seqlens)[:3]
    save_huggingface(network, out, tokenizer)
    theirs = AutoTokenizer.from_pretrained(out)
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    end = "" if kind == "around" else EOS
    texts = [f"the mill\n{each.text}{end}" for each in completions]
    given = theirs(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        scores = model(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, 0]
    assert scores.std() > 0.02
    torch.testing.assert_close(ours, scores, atol=1e-4, rtol=0)
