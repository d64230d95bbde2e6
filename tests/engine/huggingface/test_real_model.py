"""A pretrained model with a chat template, straight from its folder through all stages.

TRIDENT_REAL_MODEL names the folder: a small instruction-tuned model in Hugging Face's form, such as
SmolLM2-135M-Instruct. Without it these tests are skipped: no model comes with the project.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.answers.answer import generate_text
from engine.data.tokenizer import load_tokenizer
from engine.generation.generate import generate
from engine.huggingface.convert import convert, load_huggingface
from engine.huggingface.model_folder import read_size
from engine.ranks.start import start_parallel
from engine.settings.adam import AdamConfig
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig, PPOData
from engine.settings.rm import RMConfig, RMData
from engine.settings.sampling import SamplingConfig
from engine.settings.sft import SFTConfig, SFTData
from engine.training.network import build_network
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.tiny import rows_of, train, write_lines

FOLDER = os.environ.get("TRIDENT_REAL_MODEL", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="TRIDENT_REAL_MODEL names no folder"),
]
QUESTION = "What is the capital of France? Answer in one sentence."
PAIRS = [
    ("What color is the sky?", "It is blue."),
    ("How many legs has a spider?", "Eight."),
    ("What do bees make?", "Honey."),
    ("Which river flows through Tours?", "The Loire."),
]
SMALL = AdamConfig(lr=1e-5, warmup=1)


def test_it_says_what_transformers_has_it_say():
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    theirs = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"][0]
    length = len(prompt)
    parallel = start_parallel(ParallelLayout(), seed=0)
    size = read_size(Path(FOLDER))
    network = build_network("language", size, parallel, numerics=Numerics())
    load_huggingface(network, Path(FOLDER))
    module = network.modules[0].eval()
    with torch.no_grad(), parallel.active():
        wanted = theirs(prompt[None]).logits[0]
        bounds = torch.tensor([0, length], dtype=torch.int32)
        rows = Logits(torch.arange(length))
        sequences = PackedSequences.of(bounds, length)
        found = module(prompt, torch.arange(length), sequences, rows)[:, : size.vocab_size]
        answer = theirs.generate(prompt[None], max_new_tokens=24, do_sample=False)[0, length:]
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.0)
    (ours,) = generate(network, [prompt.numpy()], sampling, eos_id=tokenizer.eos_token_id, seed=0)
    assert ours.tokens.tolist() == answer.tolist()
    assert "Paris" in tokenizer.decode(ours.tokens)


def test_a_dialogue_straight_from_its_folder_answers_the_question(monkeypatch, capsys):
    lines = iter([QUESTION])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or end_of_input())
    sampling = SamplingConfig(max_new_tokens=24, temperature=0.0)
    generate_text(GenerateConfig(source=Path(FOLDER), sampling=sampling))
    assert "The capital of France is Paris." in capsys.readouterr().out


def end_of_input() -> str:
    raise EOFError


def test_stages_train_it_and_what_they_write_loads_back(tmp_path: Path):
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in PAIRS
    ]
    ranked = [{"prompt": q, "chosen": a, "rejected": "I do not know."} for q, a in PAIRS]
    sft = SFTConfig(
        directory=tmp_path / "sft",
        init_from=Path(FOLDER),
        data=SFTData(train=write_lines(tmp_path / "chats.jsonl", chats), valid_fraction=0.0),
        epochs=1.0,
        batch_size=4,
        adam=SMALL,
    )
    train(sft)
    rm = RMConfig(
        directory=tmp_path / "rm",
        init_from=sft.directory,
        data=RMData(
            train=write_lines(tmp_path / "ranked.jsonl", ranked),
            demonstrations=None,
            valid_fraction=0.0,
        ),
        epochs=1.0,
        batch_size=4,
        adam=SMALL,
    )
    train(rm)
    prompts = write_lines(tmp_path / "prompts.jsonl", ({"prompt": q} for q, _ in PAIRS))
    ppo = PPOConfig(
        directory=tmp_path / "ppo",
        policy=sft.directory,
        reward_model=rm.directory,
        data=PPOData(prompts=prompts, pretraining=None, valid_fraction=0.0),
        sampling=SamplingConfig(max_new_tokens=8),
        ptx_coef=0.0,
        iterations=1,
        rollout_batch_size=4,
        minibatch_size=4,
        adam=SMALL,
        critic_adam=SMALL,
    )
    train(ppo)
    (row,) = rows_of(ppo.directory)
    assert np.isfinite(list(row.values())).all() and abs(row["score/kl"]) < 1e-3
    out = tmp_path / "out"
    convert(ConvertConfig(direction="export", source=ppo.directory, out=out))
    theirs = AutoModelForCausalLM.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["model_type"] == theirs.config.model_type
    ours, before, after = (
        load_tokenizer(ppo.directory / "tokenizer").encode(QUESTION),
        AutoTokenizer.from_pretrained(FOLDER)(QUESTION)["input_ids"],
        AutoTokenizer.from_pretrained(out)(QUESTION)["input_ids"],
    )
    assert list(ours) == before == after
