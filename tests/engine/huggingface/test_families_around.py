"""Every family the whole way that users go, from transformers' folder and back to transformers.

One model each, tiny and random, with the keys of a public config.json: a stage of SFT straight from
the folder, greedy answers before and after it, its export in AutoModel and AutoTokenizer, a reward
model from it, that one's export in AutoModelForSequenceClassification, and both imported again.
`make families` writes what is seen here into README.md.
"""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from benchmarks.records import append_line, read_records
from engine.answers.answer import generate_text
from engine.answers.load import load_model
from engine.checkpoints.found import size_of
from engine.checkpoints.weights import load_weights
from engine.generation.generate import generate
from engine.huggingface.convert import convert
from engine.ranks.start import start_parallel
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network, build_network
from models.huggingface.families import FAMILIES
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.engine.huggingface.test_scores import our_scores, their_scores
from tests.families import CONFIGS, CONTEXT, VOCAB, save_talker, save_tokenizer
from tests.ranks import run_ranks
from tests.sources import ROOT
from tests.tiny import ADAM, rm_config, sft_config, train, weights_of, write_lines

RESULTS = ROOT / "benchmarks" / "results" / "families.jsonl"
PROMPTS = ("the mill", "a cheap pub near the river", "fish", "the river serves fish and the pub is")
NUM_NEW = 20
NO_TIE = 1e-4  # of the two best logits: what rounding cannot turn around
# Of differences in fp32. That of two ranks is behind three steps of Adam, which makes a part of
# a step of what a gradient near 0 is rounded by.
LIMITS = {"logits": 1e-4, "export": 1e-4, "scores": 1e-4, "two_ranks": 1e-3}
SLOW_ADAM = dataclasses.replace(ADAM, lr=1e-4)
LAYOUTS = {"tp 2": ParallelLayout(tp=2), "pp 2": ParallelLayout(pp=2)}


@dataclass(frozen=True)
class Row:
    """A family in the table."""

    config: str
    """Its name in tests/families.py."""
    models: str
    """Public models of this form."""
    apart: str
    """What sets it apart from GPT-3's form."""


ROWS = {
    "GPT-2": Row(
        "gpt2", "gpt2 to gpt2-xl, distilgpt2, DialoGPT, rinna's", "nothing: it is GPT-3's"
    ),
    "Cerebras-GPT": Row("cerebras", "Cerebras-GPT 111M to 13B", "gelu without approximation"),
    "OPT": Row("opt", "OPT 125M, 1.3B to 66B", "relu, positions from row 2"),
    "OPT 350M": Row("opt_350m", "OPT 350M", "norms after, embeddings of another width"),
    "Pythia": Row(
        "pythia",
        "Pythia 14M to 12B, GPT-NeoX-20B",
        "a quarter rotary, MLP beside attention, own head",
    ),
    "Llama": Row(
        "llama",
        "Llama 1 and 2",
        "RMSNorm, gated silu, rotary, no biases, own head",
    ),
    "Llama 3.1": Row(
        "llama_31", "Llama 3 to 3.3, TinyLlama, SmolLM2", "query groups, rotary scaled by frequency"
    ),
    "Mistral": Row("mistral", "Mistral 7B", "query groups, a window of attention"),
    "Qwen2": Row(
        "qwen2", "Qwen1.5, Qwen2, Qwen2.5", "query groups, biases of queries, keys, values"
    ),
    "Qwen3": Row("qwen3", "Qwen3 0.6B to 32B", "norms of queries and keys, wide heads"),
}
QUICK = ("OPT", "Llama 3.1")


@dataclass
class Around:
    """One family's way: its folder of Hugging Face's, and what was made from it."""

    folder: Path
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def theirs(self) -> Path:
        return self.folder / "theirs"

    @property
    def sft(self) -> Path:
        return self.folder / "sft"

    def out(self, source: Path) -> Path:
        """Export a run, and return where."""
        out = source.with_name(f"{source.name}_out")
        convert(ConvertConfig(direction="export", source=source, out=out))
        return out

    def back(self, source: Path) -> Path:
        run = source.with_name(f"{source.name}_back")
        convert(ConvertConfig(direction="import", source=source, out=run))
        return run


def write_folder(name: str, folder: Path) -> Path:
    """Write a family's folder, model and tokenizer as transformers saves them."""
    save_talker(ROWS[name].config, folder)
    save_tokenizer(folder)
    return folder


def our_logits(network: Network, tokens: Tensor) -> Tensor:
    """[tokens, vocabulary] of one rank."""
    length = len(tokens)
    everywhere = torch.arange(length)
    sequences = PackedSequences.of(torch.tensor([0, length], dtype=torch.int32), length)
    (module,) = network.modules
    module.eval()
    with torch.no_grad(), network.parallel.active():
        logits = module(tokens, everywhere, sequences, Logits(everywhere))
    return logits[:, : network.size.vocab_size]


def their_logits(folder: Path, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens[None]).logits[0]


def any_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (CONTEXT,), generator=generator)


def farthest(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def our_answers(source: Path, layout: ParallelLayout | None = None) -> list[list[int]]:
    """The greedy tokens of a folder or run for each of PROMPTS."""
    config = GenerateConfig(source=source, layout=layout or ParallelLayout())
    network, tokenizer = load_model(config)
    prompts = [np.array(tokenizer.encode(text + "\n")) for text in PROMPTS]
    sampling = SamplingConfig(max_new_tokens=NUM_NEW, temperature=0.0, num_slots=3, cache_gib=0.01)
    found: dict[int, list[int]] = {}
    for response in generate(
        network, prompts, sampling, eos_id=tokenizer.eos_id, seed=0, tokenizer=tokenizer
    ):
        found[response.sample_index] = response.tokens.tolist()
    return [found[index] for index in range(len(prompts))]


def their_answers(folder: Path) -> list[list[int]]:
    """The same of transformers, one prompt at a time; no step has a tie."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for text in PROMPTS:
        ids = tokenizer(text + "\n", return_tensors="pt")["input_ids"]
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            pad_token_id=tokenizer.eos_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best, second = torch.stack(made.logits)[:, 0].topk(2).values.T
        assert (best - second).min() > NO_TIE
        answers.append(made.sequences[0, ids.shape[1] :].tolist())
    return answers


def say_alike(source: Path, folder: Path) -> int:
    """Hold a source's greedy answers, as ids and in a file, to those of transformers; return how
    many tokens they have."""
    ours, theirs = our_answers(source), their_answers(folder)
    assert ours == theirs
    assert len({token for answer in ours for token in answer}) > 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = write_lines(source.with_name("prompts.jsonl"), [{"prompt": text} for text in PROMPTS])
    out = source.with_name(f"{source.name}_answers.jsonl")
    sampling = SamplingConfig(max_new_tokens=NUM_NEW, temperature=0.0)
    generate_text(GenerateConfig(source=source, prompts=prompts, out=out, sampling=sampling))
    texts = [json.loads(line)["response"] for line in out.read_text().splitlines()]
    assert texts == [tokenizer.decode(answer, skip_special_tokens=True) for answer in theirs]
    return sum(map(len, ours))


def read_alike(run: Path, folder: Path, tiny: Path) -> int:
    """Hold AutoTokenizer to a run's tokenizer; return how many texts both read."""
    _, ours = load_model(GenerateConfig(source=run))
    theirs = AutoTokenizer.from_pretrained(folder)
    lines = (tiny / "demonstrations.jsonl").read_text().splitlines()
    texts = [json.loads(line)["response"] for line in lines]
    assert [theirs(text)["input_ids"] for text in texts] == [ours.encode(text) for text in texts]
    assert theirs.eos_token_id == ours.eos_id
    return len(texts)


def scorer_of(run: Path) -> Network:
    parallel = start_parallel(ParallelLayout(), seed=0)
    size = size_of(run, "reward_model")
    network = build_network("scalar", size, parallel, numerics=Numerics())
    load_weights(network, run, role="reward_model")
    return network


def assert_same_weights(run: Path, other: Path, role: str) -> None:
    ours, theirs = weights_of(run, role), weights_of(other, role)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def go_with_policy(way: Around, tiny: Path) -> None:
    """Logits and answers of the folder; SFT; those of its export; the import of that."""
    tokens = any_tokens()
    logits = their_logits(way.theirs, tokens)
    assert logits.std() > 0.3
    network, _ = load_model(GenerateConfig(source=way.theirs))
    way.seen["logits"] = farthest(our_logits(network, tokens), logits)
    way.seen["greedy"] = say_alike(way.theirs, way.theirs)
    train(sft_config(tiny, way.sft, init_from=way.theirs, adam=SLOW_ADAM))
    out = way.out(way.sft)
    trained, _ = load_model(GenerateConfig(source=way.sft))
    exported = their_logits(out, tokens)
    assert farthest(exported, logits) > 0.01  # it has learnt
    way.seen["export"] = farthest(our_logits(trained, tokens), exported)
    way.seen["greedy"] += say_alike(way.sft, out)
    way.seen["texts"] = read_alike(way.sft, out, tiny)
    assert_same_weights(way.back(out), way.sft, "policy")


def go_with_reward_model(way: Around, tiny: Path) -> None:
    """A reward model from the SFT run, its export's scores, and the import of that."""
    run = way.folder / "rm"
    train(rm_config(tiny, run, init_from=way.sft))
    out = way.out(run)
    left = json.loads((out / "config.json").read_text()).get("score_bias", 0.0)
    ours = our_scores(scorer_of(run), VOCAB)
    theirs = their_scores(out, VOCAB) + left
    assert ours is not None and ours.std() > 0.01
    way.seen["scores"] = farthest(ours, theirs)
    again = our_scores(scorer_of(way.back(out)), VOCAB)
    way.seen["scores"] = max(way.seen["scores"], farthest(again, ours))


def train_on_two(folder: Path, tiny: Path) -> dict[str, list[list[int]]]:
    """Train, answer and export under every layout; return the answers of the folder."""
    answers = {}
    for name, layout in LAYOUTS.items():
        run = folder / name
        source = folder / "theirs"
        train(sft_config(tiny, run, init_from=source, layout=layout, adam=SLOW_ADAM))
        out = run.with_name(f"{name}_out")
        convert(ConvertConfig(direction="export", source=run, out=out, layout=layout))
        answers[name] = our_answers(folder / "theirs", layout)
    return answers


def go_on_two_ranks(way: Around, tiny: Path) -> None:
    tokens, expected = any_tokens(), their_answers(way.theirs)
    ours = their_logits(way.sft.with_name("sft_out"), tokens)
    for answers in run_ranks(train_on_two, 2, way.folder, tiny):
        assert answers == dict.fromkeys(LAYOUTS, expected)
    outs = [way.folder / f"{name}_out" for name in LAYOUTS]
    way.seen["two_ranks"] = max(farthest(their_logits(out, tokens), ours) for out in outs)
    way.seen["layouts"] = list(LAYOUTS)


def go_around(name: str, tiny: Path, folder: Path, *, on_two_ranks: bool) -> dict[str, Any]:
    """Go a family's way; return what is seen, within LIMITS."""
    way = Around(folder)
    write_folder(name, way.theirs)
    go_with_policy(way, tiny)
    go_with_reward_model(way, tiny)
    if on_two_ranks:
        go_on_two_ranks(way, tiny)
    for what, limit in LIMITS.items():
        assert way.seen.get(what, 0.0) < limit, what
    shutil.rmtree(folder)
    return way.seen


@pytest.mark.parametrize("name", QUICK)
def test_a_family_goes_around(tiny, tmp_path, name):
    go_around(name, tiny, tmp_path / "way", on_two_ranks=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_every_family_goes_around_on_one_rank_and_on_two(tiny, tmp_path, name, pytestconfig):
    seen = go_around(name, tiny, tmp_path / "way", on_two_ranks=True)
    record = {"benchmark": "families", "family": name, "models": ROWS[name].models}
    record |= {"apart": ROWS[name].apart, **seen, "torch": torch.__version__}
    record |= {"transformers": transformers.__version__}
    if path := pytestconfig.getoption("--record"):
        append_line(Path(path), json.dumps(record))


def test_the_table_has_every_family_within_the_limits():
    records = read_records(RESULTS)
    told = [(record["family"], record["models"], record["apart"]) for record in records]
    rows = [(name, row.models, row.apart) for name, row in ROWS.items()]
    assert told == rows, "make families"
    for record in records:
        assert all(0.0 <= record[what] < limit for what, limit in LIMITS.items())
        assert record["greedy"] > 100 and record["texts"] > 10
        assert record["layouts"] == list(LAYOUTS)
    types = {CONFIGS[row.config]["model_type"] for row in ROWS.values()}
    assert types == {family.model_type for family in FAMILIES}
