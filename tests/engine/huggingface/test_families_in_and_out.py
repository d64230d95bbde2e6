"""Every family from transformers' folder through our trunk and back, on one rank and on two."""

import dataclasses
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.data.batches import pack
from engine.data.examples import Example
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.generation.generate import generate
from engine.huggingface.convert import load_huggingface, save_huggingface
from engine.huggingface.model_folder import read_size
from engine.ranks.start import start_parallel
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.training.network import Network, build_network
from engine.training.passes import forward
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.families import CONFIGS, CONTEXT, VOCAB, save_family, save_talker
from tests.ranks import run_ranks

LAYOUTS = {"tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2)}
# One of ours is exported as the other: they compute the same.
RENAMED = {"gpt2_relu": "OPTForCausalLM"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all families, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("zoo")
    for name in CONFIGS:
        save_family(name, folder / name)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=byte_level.alphabet()
    )
    tokenizer.train_from_iterator(["the mill is a cheap pub"] * 8, trainer)
    for name in CONFIGS:
        tokenizer.save(str(folder / name / "tokenizer.json"))
    return folder


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(1))


def load(folder: Path, layout: ParallelLayout | None = None) -> Network:
    parallel = start_parallel(layout or ParallelLayout(), seed=1)
    network = build_network("language", read_size(folder), parallel, numerics=Numerics())
    load_huggingface(network, folder)
    return network


def their_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens()[None]).logits[0]


def assert_same_tensors(name: str, exported: dict[str, Tensor], folder: Path) -> None:
    theirs = load_file(folder / "model.safetensors")
    if name in RENAMED:
        assert len(exported) > len(theirs)  # queries, keys and values in three
        return
    assert exported.keys() == theirs.keys()
    for key, tensor in theirs.items():
        first = 2 if key.endswith("embed_positions.weight") else 0  # OPT's rows of padding
        assert torch.equal(exported[key][first:], tensor[first:]), key


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_and_come_back(zoo, tmp_path, name):
    network = load(zoo / name)
    (module,) = network.modules
    sequences = PackedSequences.of(torch.tensor([0, CONTEXT], dtype=torch.int32), CONTEXT)
    everywhere = torch.arange(CONTEXT)
    with torch.no_grad():
        logits = module(tokens(), everywhere, sequences, Logits(everywhere))[:, :VOCAB]
    theirs = their_logits(zoo / name)
    assert theirs.std() > 0.3
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=0)
    save_huggingface(network, tmp_path / "out", load_tokenizer(zoo / name))
    assert read_size(tmp_path / "out") == network.size
    assert_same_tensors(name, load_file(tmp_path / "out" / "model.safetensors"), zoo / name)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(back).__name__ == RENAMED.get(name, type(back).__name__)
    torch.testing.assert_close(their_logits(tmp_path / "out"), theirs, atol=3e-6, rtol=0)


NUM_NEW = 20
NO_TIE = 3e-5  # of the two best logits: what rounding cannot turn around
IN_PARTS = ("gpt2_by_layer", "opt_norm_after", "neox_serial", "mistral", "qwen2_yarn")


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of all families, of models whose greedy answers vary."""
    folder = tmp_path_factory.mktemp("talkers")
    for name in CONFIGS:
        save_talker(name, folder / name)
    return folder


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in (1, 4, 9, 30)]


def our_answers(network: Network) -> list[list[int]]:
    sampling = SamplingConfig(
        max_new_tokens=NUM_NEW, temperature=0.0, num_slots=3, block_size=8, cache_gib=0.01
    )
    texts = [prompt.numpy() for prompt in prompts()]
    found = generate(network, texts, sampling, eos_id=0, seed=0)
    answers = {response.sample_index: response.tokens.tolist() for response in found}
    return [answers[index] for index in range(len(texts))]


def their_answers(folder: Path) -> list[list[int]]:
    """Of transformers, one prompt at a time; no step has a tie."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answers = []
    for prompt in prompts():
        made = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            do_sample=False,
            max_new_tokens=NUM_NEW,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best, second = torch.stack(made.logits)[:, 0].topk(2).values.T
        assert (best - second).min() > NO_TIE
        answers.append(made.sequences[0, len(prompt) :].tolist())
    assert sum(map(len, answers)) > 2 * NUM_NEW and len({t for a in answers for t in a}) > 1
    return answers


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_are_those_of_transformers_token_for_token(talkers, name):
    assert our_answers(load(talkers / name)) == their_answers(talkers / name)


def answer_in_parts(folder: Path) -> dict[tuple[str, str], list[list[int]]]:
    return {
        (name, layout): our_answers(load(folder / name, LAYOUTS[layout]))
        for layout in LAYOUTS
        for name in IN_PARTS
    }


@pytest.mark.slow
def test_two_ranks_answer_as_transformers_does(talkers):
    expected = {name: their_answers(talkers / name) for name in IN_PARTS}
    for answers in run_ranks(answer_in_parts, 2, talkers):
        assert answers == {key: expected[key[0]] for key in answers}


def our_logprobs(network: Network) -> Tensor:
    batch = pack([Example(tokens=tokens().numpy(), prompt_length=1)], multiple_of=1)
    return forward(network, [batch])[0]


def go_around(zoo: Path, out: Path) -> dict[tuple[str, str], Tensor]:
    """Load and export every family under every layout; return the tokens' log-probs."""
    answers = {}
    for layout_name, layout in LAYOUTS.items():
        for name in CONFIGS:
            network = load(zoo / name, layout)
            answers[name, layout_name] = our_logprobs(network)
            tokenizer = load_tokenizer(zoo / name)
            save_huggingface(network, out / f"{name}-{layout_name}", tokenizer, file_bytes=100_000)
    return answers


@pytest.fixture(scope="module")
def two_ranks(zoo, tmp_path_factory) -> tuple[Path, list[dict[tuple[str, str], Tensor]]]:
    out = tmp_path_factory.mktemp("out")
    return out, run_ranks(go_around, 2, zoo, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_say_the_same_and_write_the_same(zoo, two_ranks, name, layout):
    out, answers = two_ranks
    folder = out / f"{name}-{layout}"
    logprobs = their_logits(zoo / name).double().log_softmax(-1)[:-1]
    expected = logprobs.gather(1, tokens()[1:, None])[:, 0].float()
    found = next(a[name, layout] for a in reversed(answers) if a[name, layout] is not None)
    torch.testing.assert_close(found[1:], expected, atol=1e-4, rtol=0)
    exported: dict[str, Tensor] = {}
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2
    for path in files:
        exported |= load_file(path)
    assert_same_tensors(name, exported, zoo / name)
    torch.testing.assert_close(their_logits(folder), their_logits(zoo / name), atol=3e-6, rtol=0)


def test_a_network_of_another_form_is_refused_by_the_field(zoo):
    network = load(zoo / "gpt2")
    with pytest.raises(UserError, match=r"activation is gelu, this run's model has gelu_tanh"):
        load_huggingface(network, zoo / "cerebras")
    with pytest.raises(UserError, match="rotary is Rotary.* this run's model has Rotary"):
        load_huggingface(load(zoo / "qwen2"), zoo / "qwen2_yarn")


def test_a_size_of_no_family_is_not_exported(zoo, tmp_path):
    gpt2, llama = read_size(zoo / "gpt2"), read_size(zoo / "llama")
    banded = dataclasses.replace(gpt2, form=dataclasses.replace(gpt2.form, window=8))
    projected = dataclasses.replace(llama, embedding_width=32)
    parallel = start_parallel(ParallelLayout(), seed=1)
    for size, field in ((banded, "window 8"), (projected, "embedding_width=32")):
        network = build_network("language", size, parallel, numerics=Numerics())
        said = f"cannot be exported: no family of Hugging Face's has all of this: .*{field}"
        with pytest.raises(UserError, match=said):
            save_huggingface(network, tmp_path / "out", load_tokenizer(zoo / "gpt2"))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["opt", "opt_350m", "opt_wide_embedding"])
def test_greedy_answers_are_those_of_transformers(zoo, name):
    prompts = [tokens()[:length] for length in (1, 5, 19)]
    model = AutoModelForCausalLM.from_pretrained(zoo / name).eval()
    sampling = SamplingConfig(max_new_tokens=20, temperature=0.0, block_size=8, cache_gib=0.01)
    mine = [prompt.numpy() for prompt in prompts]
    for response in generate(load(zoo / name), mine, sampling, eos_id=-1, seed=0):
        prompt = prompts[response.sample_index]
        with torch.no_grad():
            theirs = model.generate(
                prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None
            )[0, len(prompt) :]
        assert response.tokens.tolist() == theirs.tolist()
