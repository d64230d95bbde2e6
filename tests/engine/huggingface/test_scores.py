"""Reward models and critics as transformers' sequence classifiers, of every family, both ways."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from engine.checkpoints.checkpointer import Checkpointer
from engine.checkpoints.found import network_at, size_of
from engine.checkpoints.weights import load_weights
from engine.data.batches import pack
from engine.data.examples import Example
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.huggingface.convert import convert, load_huggingface, save_huggingface
from engine.huggingface.model_folder import read_size
from engine.huggingface.scores import fold_bias
from engine.losses import last_readings
from engine.ranks.start import start_parallel
from engine.settings.convert import ConvertConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.passes import forward
from models.huggingface.families import FAMILIES
from models.huggingface.tensors import SCORE, SCORE_BIAS
from models.sizes import GPTSize
from tests.families import CONFIGS, CONTEXT, VOCAB, save_family
from tests.ranks import run_ranks
from tests.tiny import SIZE, ppo_config, rows_of, train

LENGTHS = (1, 33, 2, CONTEXT, 17)
END = 0
BIASLESS = {name for name in CONFIGS if name.startswith(("llama", "mistral", "qwen"))}
LAYOUTS = {"tp2": ParallelLayout(tp=2), "pp2": ParallelLayout(pp=2)}


def write_tokenizer(folder: Path, num_ids: int = 280) -> None:
    """Write a tokenizer of bytes and of pieces that no text becomes."""
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces = ["<|endoftext|>", *sorted(byte_level.alphabet())]
    pieces += [f"piece {n}" for n in range(num_ids - len(pieces))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def save_scorer(name: str, folder: Path, num_labels: int = 1, **settings: object) -> None:
    """Write a random sequence classifier of the family as transformers does, and a tokenizer."""
    config = AutoConfig.for_model(**CONFIGS[name], num_labels=num_labels)
    config.pad_token_id = 299
    for field, value in settings.items():
        setattr(config, field, value)
    model = AutoModelForSequenceClassification.from_config(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
        if parameter.dim() == 1:
            parameter.data += 0.5
    model.score.weight.data.normal_(generator=generator)
    model.save_pretrained(folder)
    write_tokenizer(folder)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorers")
    for name in CONFIGS:
        save_scorer(name, folder / name)
    return folder


def texts(most: int = 280) -> list[Tensor]:
    """Token sequences of ids below `most`, some of which end in the end of text."""
    generator = torch.Generator().manual_seed(3)
    found = [torch.randint(1, most, (length,), generator=generator) for length in LENGTHS]
    for text in found[1:4]:
        text[-1] = END
    return found


def our_scores(network: Network, most: int = 280) -> Tensor | None:
    """[number of texts]; None but on the last stage."""
    examples = [Example(tokens=text.numpy(), prompt_length=1) for text in texts(most)]
    batch = pack(examples, multiple_of=8)
    readings = forward(network, [batch])[0]
    return None if readings is None else last_readings(readings, batch.cu_seqlens)[: len(LENGTHS)]


def their_scores(folder: Path, most: int = 280) -> Tensor:
    """The same from transformers, all texts in one batch behind which stands padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.num_labels == 1
    pad = model.config.pad_token_id
    rows = texts(most)
    ids = pad_sequence(rows, batch_first=True, padding_value=pad)
    there = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        return model(ids, attention_mask=there).logits[:, 0]


def load(folder: Path, layout: ParallelLayout | None = None) -> Network:
    parallel = start_parallel(layout or ParallelLayout(), seed=1)
    network = build_network("scalar", read_size(folder), parallel, numerics=Numerics())
    load_huggingface(network, folder)
    return network


def move_bias(network: Network, bias: float) -> None:
    for module in network.modules:
        if hasattr(module, "scalar_head"):
            module.scalar_head.bias.data.fill_(bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_transformers_and_come_back(zoo, tmp_path, name, capsys):
    network = load(zoo / name)
    theirs = their_scores(zoo / name)
    assert theirs.std() > 0.02
    torch.testing.assert_close(our_scores(network), theirs, atol=1e-5, rtol=0)
    move_bias(network, 11.5)
    out = tmp_path / "out"
    save_huggingface(network, out, load_tokenizer(zoo / name))
    left = 11.5 if name in BIASLESS else 0.0
    assert ("scores in transformers are lower by 11.5" in capsys.readouterr().out) == bool(left)
    assert json.loads((out / "config.json").read_text()).get("score_bias", 0.0) == left
    torch.testing.assert_close(their_scores(out) + left, our_scores(network), atol=1e-4, rtol=0)
    back = load(out)
    torch.testing.assert_close(our_scores(back), our_scores(network), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "opt", "opt_350m", "pythia", "qwen2"])
def test_a_head_without_bias_comes_back_with_the_same_bits(zoo, tmp_path, name):
    save_huggingface(load(zoo / name), tmp_path / "out", load_tokenizer(zoo / name))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    stored = load_file(zoo / name / "model.safetensors")
    assert exported.keys() == stored.keys()
    for key, tensor in stored.items():
        first = 2 if key.endswith("embed_positions.weight") else 0  # OPT's rows of padding
        assert torch.equal(exported[key][first : len(tensor)], tensor[first:]), key


def go_around(zoo: Path, out: Path) -> dict[tuple[str, str], Tensor | None]:
    answers = {}
    for layout_name, layout in LAYOUTS.items():
        for name in ("gpt2", "opt_norm_after", "opt_350m", "qwen2"):
            network = load(zoo / name, layout)
            move_bias(network, 11.5)
            answers[name, layout_name] = our_scores(network)
            tokenizer = load_tokenizer(zoo / name)
            save_huggingface(network, out / f"{name}-{layout_name}", tokenizer, file_bytes=100_000)
    return answers


def test_two_ranks_score_the_same_and_write_the_same(zoo, tmp_path):
    answers = run_ranks(go_around, 2, zoo, tmp_path)
    for name, layout in answers[0]:
        found = next(a[name, layout] for a in reversed(answers) if a[name, layout] is not None)
        torch.testing.assert_close(found, their_scores(zoo / name) + 11.5, atol=1e-4, rtol=0)
        left = 11.5 if name in BIASLESS else 0.0
        theirs = their_scores(tmp_path / f"{name}-{layout}") + left
        torch.testing.assert_close(theirs, found, atol=1e-4, rtol=0)


def test_a_run_of_a_reward_model_is_found_without_its_role_and_goes_around(zoo, tmp_path, capsys):
    source, run, out = zoo / "pythia", tmp_path / "run", tmp_path / "out"
    convert(ConvertConfig(direction="import", source=source, out=run))
    assert network_at(run, "reward_model").kind == "scalar"
    convert(ConvertConfig(direction="export", source=run, out=out))
    torch.testing.assert_close(their_scores(out), their_scores(source), atol=1e-5, rtol=0)
    convert(ConvertConfig(direction="import", source=out, out=tmp_path / "critic", role="critic"))
    assert network_at(tmp_path / "critic", "critic").kind == "scalar"
    convert(ConvertConfig(direction="export", source=tmp_path / "critic", out=tmp_path / "again"))
    torch.testing.assert_close(their_scores(tmp_path / "again"), their_scores(source))
    assert "WARNING" not in capsys.readouterr().out


def test_a_checkpoint_of_ppo_exports_its_policy_unless_the_critic_or_an_average_is_asked_for(
    zoo, tmp_path
):
    parallel = start_parallel(ParallelLayout(), seed=1)
    critic = load(zoo / "gpt2")
    move_bias(critic, -3.0)
    average = load(zoo / "gpt2")
    policy = build_network("language", read_size(zoo / "gpt2"), parallel, numerics=Numerics())
    run = tmp_path / "run"
    load_tokenizer(zoo / "gpt2").save(run / "tokenizer")
    checkpointer = Checkpointer(
        directory=run / "checkpoints",
        parallel=parallel,
        networks={"policy": policy, "critic": critic, "ema": average},
        optimizers={},
    )
    with checkpointer:
        checkpointer.save(0, {})
    for role, expected in (("critic", -3.0), ("ema", 0.0)):
        convert(ConvertConfig(direction="export", source=run, out=tmp_path / role, role=role))
        theirs = their_scores(zoo / "gpt2") + expected
        torch.testing.assert_close(their_scores(tmp_path / role), theirs, atol=1e-4, rtol=0)
    convert(ConvertConfig(direction="export", source=run, out=tmp_path / "policy"))
    config = json.loads((tmp_path / "policy" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and "pad_token_id" not in config
    with pytest.raises(UserError, match="no checkpoint of a reward_model here; it holds critic"):
        convert(
            ConvertConfig(direction="export", source=run, out=tmp_path / "no", role="reward_model")
        )


def test_transformers_reads_its_own_tokens_and_ours_alike(zoo, tmp_path):
    save_huggingface(load(zoo / "gpt2"), tmp_path / "out", load_tokenizer(zoo / "gpt2"))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer(zoo / "gpt2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert theirs.pad_token_id == config["pad_token_id"] == ours.vocab_size != theirs.eos_token_id
    text = "the mill is a <cheap> pub"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_a_network_whose_tokens_fill_its_vocabulary_gets_one_more(zoo, tmp_path):
    size = dataclasses.replace(read_size(zoo / "gpt2"), vocab_size=384)  # no row of padding either
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("scalar", size, parallel, numerics=Numerics())
    (tmp_path / "full").mkdir()
    write_tokenizer(tmp_path / "full", num_ids=384)
    save_huggingface(network, tmp_path / "out", load_tokenizer(tmp_path / "full"))
    assert read_size(tmp_path / "out").vocab_size == 385
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 384
    torch.testing.assert_close(
        their_scores(tmp_path / "out"), our_scores(network), atol=1e-5, rtol=0
    )


def test_ppo_takes_an_imported_reward_model_and_its_critic_is_exported(tiny, tmp_path):
    source, run = tmp_path / "theirs", tmp_path / "ppo"
    save_scorer("qwen2", source, vocab_size=SIZE.vocab_size, pad_token_id=99)
    shutil.copy(tiny / "tokenizer.json", source)
    convert(ConvertConfig(direction="import", source=source, out=tmp_path / "rm"))
    train(ppo_config(tiny, run, iterations=1, reward_model=tmp_path / "rm"))
    train(ppo_config(tiny, tmp_path / "straight", iterations=1, reward_model=source))
    assert rows_of(tmp_path / "straight") == rows_of(run)
    parallel = start_parallel(ParallelLayout(), seed=1)
    critic = build_network("scalar", size_of(run, "critic"), parallel, numerics=Numerics())
    assert critic.size == read_size(source)
    load_weights(critic, run, role="critic")
    bias = float(critic.modules[0].scalar_head.bias)
    assert bias != 0.0  # it has learnt
    convert(ConvertConfig(direction="export", source=run, out=tmp_path / "out", role="critic"))
    theirs = their_scores(tmp_path / "out", most=99) + bias
    torch.testing.assert_close(theirs, our_scores(critic, most=99), atol=1e-4, rtol=0)


def refusal(folder: Path, **options) -> str:
    out = folder.parent / "refused"
    with pytest.raises(UserError) as caught:
        convert(ConvertConfig(direction="import", source=folder, out=out, **options))
    assert not out.exists() and len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


def test_what_is_no_reward_model_is_refused_by_what_it_is(zoo, tmp_path):
    save_scorer("llama", tmp_path / "two", num_labels=2)
    assert "gives 2 numbers a text, and a reward model gives one" in refusal(tmp_path / "two")
    save_family("opt", tmp_path / "language")
    write_tokenizer(tmp_path / "language")
    for role in ("reward_model", "critic"):
        message = refusal(tmp_path / "language", role=role)
        assert "holds a language model, where a reward model is needed: train one" in message
    assert "a language model is needed here" in refusal(zoo / "opt", role="policy")
    save_scorer("gpt2", tmp_path / "odd", score_bias="1")
    assert "score_bias is '1' and must be a finite number" in refusal(tmp_path / "odd")


@pytest.mark.parametrize("name", ["gpt2_untied", "llama", "opt", "pythia"])
def test_a_value_head_of_trl_is_a_critic(tmp_path, name):
    source, run = tmp_path / "theirs", tmp_path / "run"
    model = save_family(name, source)
    write_tokenizer(source)
    path, generator = source / "model.safetensors", torch.Generator().manual_seed(4)
    weight = torch.randn(1, model.config.hidden_size, generator=generator)
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.75])}
    save_file(load_file(path) | head, path, metadata={"format": "pt"})
    assert "a critic; a reward model is needed here" in refusal(source, role="reward_model")
    convert(ConvertConfig(direction="import", source=source, out=run, role="critic"))
    assert read_size(source) == size_of(run, "critic")
    critic = build_network(
        "scalar",
        size_of(run, "critic"),
        start_parallel(ParallelLayout(), seed=1),
        numerics=Numerics(),
    )
    load_weights(critic, run, role="critic")
    values = []
    for text in texts():
        with torch.no_grad():  # as TRL's AutoModelForCausalLMWithValueHead reads it
            hidden = model(text[None], output_hidden_states=True).hidden_states[-1]
        values.append((hidden[0, -1] @ weight[0] + 0.75).item())
    torch.testing.assert_close(our_scores(critic), torch.tensor(values), atol=1e-4, rtol=0)
    for changed, said in (
        (
            {"v_head.summary.weight": torch.ones(2, len(weight[0]))},
            "v_head.summary.weight has shape",
        ),
        (
            {"v_head.summary.bias": torch.tensor([float("nan")])},
            "v_head.summary.bias is not finite",
        ),
    ):
        save_file(load_file(path) | head | changed, path, metadata={"format": "pt"})
        assert said in refusal(source, role="critic")


def test_padding_with_the_end_of_text_is_said_to_move_where_scores_are_read(tmp_path, capsys):
    save_scorer("gpt2", tmp_path / "gpt2", pad_token_id=END)
    convert(ConvertConfig(direction="import", source=tmp_path / "gpt2", out=tmp_path / "run"))
    assert "pad_token_id 0 is the end of text" in capsys.readouterr().out


def test_a_language_model_fills_the_trunk_of_a_scalar_network(tmp_path):
    save_family("gpt2", tmp_path)
    parallel = start_parallel(ParallelLayout(), seed=1)
    network = build_network("scalar", read_size(tmp_path), parallel, numerics=Numerics())
    head = network.modules[0].scalar_head.weight.clone()
    load_huggingface(network, tmp_path)
    assert torch.equal(network.modules[0].scalar_head.weight, head)
    norm = load_file(tmp_path / "model.safetensors")["transformer.ln_f.weight"]
    assert torch.equal(network.modules[0].decoder.final_layernorm.weight, norm)


def test_a_bias_that_no_head_or_dtype_can_hold_stays():
    parallel = start_parallel(ParallelLayout(), seed=1)
    norm = "decoder.final_layernorm.bias"
    size = GPTSize(num_layers=1, hidden_size=2, num_heads=1, vocab_size=VOCAB)

    def fold(weight: list[float], dtype: torch.dtype) -> tuple[float, Tensor]:
        parameters = {
            norm: torch.tensor([1.0, 2.0]),
            SCORE: torch.tensor([weight]),
            SCORE_BIAS: torch.tensor([5.0]),
        }
        left = fold_bias(parameters, size, dtype, parallel)
        assert SCORE_BIAS not in parameters
        return left, parameters[norm]

    left, folded = fold([3.0, 4.0], torch.float32)
    torch.testing.assert_close(folded, torch.tensor([1.6, 2.8]))
    assert left == 0.0
    for weight, dtype in (([0.0, 0.0], torch.float32), ([1e-5, 0.0], torch.float16)):
        left, kept = fold(weight, dtype)
        assert left == 5.0 and torch.equal(kept, torch.tensor([1.0, 2.0]))


def test_tables_name_classes_that_transformers_has():
    for family in FAMILIES:
        config = AutoConfig.for_model(family.model_type)
        mapping = AutoModelForSequenceClassification._model_mapping
        assert mapping[type(config)].__name__ == family.scorer
