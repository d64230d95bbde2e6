import errno
import fcntl
import json
import os
import pickle
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from engine.checkpoints.found import find_network, size_of
from engine.checkpoints.weights import load_weights
from engine.data.batches import pack
from engine.data.examples import Example
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import UserError
from engine.huggingface.convert import (
    convert,
    load_huggingface,
    save_huggingface,
)
from engine.huggingface.model_folder import read_size
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.settings.convert import ConvertConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.training.network import Network, build_network
from engine.training.passes import forward
from models.packed_sequences import PackedSequences
from models.readouts import Logits
from tests.ranks import run_ranks
from tests.special_files import KINDS, make_special

LENGTHS = (1, 33, 2, 64, 17, 5)  # tokens of the packed sequences; 64 is the whole context
LAYOUTS = {
    "tp2": ParallelLayout(tp=2),
    "tp2_sequence": ParallelLayout(tp=2, sequence_parallel=True),
    "pp2": ParallelLayout(pp=2),
    "pp2_virtual": ParallelLayout(pp=2, virtual_pp=2),
    "dp2": ParallelLayout(),
}


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of four layers as transformers saves it, every weight random, with a tokenizer.

    Its vocabulary of 300 is padded here, so that masking the padding matters.
    """
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        n_layer=4,
        n_embd=64,
        n_head=4,
        vocab_size=300,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    model.save_pretrained(folder)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the mill is a cheap pub near the river"] * 8, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def copy(gpt2: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be spoiled."""
    return Path(shutil.copytree(gpt2, tmp_path / "gpt2"))


@pytest.fixture
def parallel() -> Parallel:
    """A world of one rank."""
    return start_parallel(ParallelLayout(), seed=1)


def build(folder: Path, parallel: Parallel, dtype: str = "fp32") -> Network:
    return build_network("language", read_size(folder), parallel, numerics=Numerics(dtype=dtype))


def sequences() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 300, length) for length in LENGTHS]


def our_logprobs(network: Network) -> torch.Tensor:
    """[sum of LENGTHS]: the log-prob of every token; 0 for the first of a sequence."""
    examples = [Example(tokens=tokens, prompt_length=1) for tokens in sequences()]
    batches = [pack(half, multiple_of=8) for half in (examples[:3], examples[3:])]
    ends = [int(batch.cu_seqlens[3]) for batch in batches]  # what follows is padding
    outputs = forward(network, batches)
    return torch.cat([output[:end] for output, end in zip(outputs, ends, strict=True)])


def their_logprobs(folder: Path) -> torch.Tensor:
    """The same from transformers, one sequence at a time."""
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    answers = []
    for tokens in sequences():
        ids = torch.from_numpy(tokens)[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(-1)
        chosen = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
        answers.append(torch.cat([torch.zeros(1), chosen.float()]))
    return torch.cat(answers)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    paths = sorted(folder.glob("*.safetensors"))
    return {name: tensor for path in paths for name, tensor in load_file(path).items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_logprobs_are_those_of_transformers(gpt2, parallel):
    network = build(gpt2, parallel)
    load_huggingface(network, gpt2)
    torch.testing.assert_close(our_logprobs(network), their_logprobs(gpt2), atol=1e-5, rtol=0)
    assert network.weights_version == 1


def test_logits_are_those_of_transformers(gpt2, parallel):
    network = build(gpt2, parallel)
    load_huggingface(network, gpt2)
    (module,) = network.modules
    tokens = sequences()[3]
    batch = pack([Example(tokens=tokens, prompt_length=1)], multiple_of=1)
    logits = module(
        batch.tokens,
        batch.positions,
        PackedSequences.of(batch.cu_seqlens, batch.max_seqlen),
        Logits(torch.arange(len(tokens))),
    )
    with torch.no_grad():
        theirs = GPT2LMHeadModel.from_pretrained(gpt2).eval()(batch.tokens[None]).logits[0]
    torch.testing.assert_close(logits[:, :300], theirs, atol=1e-5, rtol=0)
    assert not logits[:, 300:].any()  # rows of zeros, which the log-probs mask


def convert_on_ranks(gpt2: Path, out: Path) -> dict[str, torch.Tensor]:
    """Import and export under every layout; return the log-probs under each.

    Also write a run under tp 2 and export it under pp 2.
    """
    answers = {}
    tokenizer = load_tokenizer(gpt2)
    for name, layout in LAYOUTS.items():
        network = build(gpt2, start_parallel(layout, seed=1))
        load_huggingface(network, gpt2)
        answers[name] = our_logprobs(network)
        save_huggingface(network, out / name, tokenizer, file_bytes=200_000)
    run, back = out / "run", out / "back"
    convert(ConvertConfig(direction="import", source=gpt2, out=run, layout=LAYOUTS["tp2"]))
    convert(ConvertConfig(direction="export", source=run, out=back, layout=LAYOUTS["pp2"]))
    return answers


@pytest.fixture(scope="module")
def two_ranks(
    gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, torch.Tensor]]]:
    """The folder that two ranks wrote, and what each of them answered."""
    out = tmp_path_factory.mktemp("two_ranks")
    return out, run_ranks(convert_on_ranks, 2, gpt2, out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_under_a_layout_are_those_of_transformers(gpt2, two_ranks, layout):
    _, answers = two_ranks
    for answer in answers:
        torch.testing.assert_close(answer[layout], their_logprobs(gpt2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_under_a_layout_is_bit_exact(gpt2, two_ranks, layout):
    folder = two_ranks[0] / layout
    assert_same_weights(folder, gpt2)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    torch.testing.assert_close(their_logprobs(folder), their_logprobs(gpt2), atol=0, rtol=0)


def test_a_run_imported_under_tp_is_exported_under_pp(gpt2, two_ranks, parallel):
    folder = two_ranks[0]
    assert_same_weights(folder / "back", gpt2)
    network = build(gpt2, parallel)
    fingerprint = load_tokenizer(gpt2).fingerprint()
    load_weights(network, folder / "run", role="policy", tokenizer_fingerprint=fingerprint)
    torch.testing.assert_close(our_logprobs(network), their_logprobs(gpt2), atol=1e-5, rtol=0)


def test_import_and_export_of_one_process(gpt2, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    convert(ConvertConfig(direction="import", source=gpt2, out=run))
    assert size_of(run, "policy") == read_size(gpt2)
    assert json.loads((run / "config.json").read_text())["direction"] == "import"
    folder = find_network(run, "policy")  # export takes a network's folder too
    convert(ConvertConfig(direction="export", source=folder, out=out))
    assert_same_weights(out, gpt2)
    assert sorted(path.name for path in out.glob("*.safetensors*")) == ["model.safetensors"]
    assert not list(tmp_path.glob("*.partial"))


def test_bfloat16_weights_stay_exact_in_fp32_and_back(gpt2, copy, tmp_path):
    halved = {name: tensor.bfloat16() for name, tensor in weights(gpt2).items()}
    save_file(halved, copy / "model.safetensors", metadata={"format": "pt"})
    convert(ConvertConfig(direction="import", source=copy, out=tmp_path / "run"))
    convert(
        ConvertConfig(
            direction="export", source=tmp_path / "run", out=tmp_path / "hf", dtype="bf16"
        )
    )
    assert_same_weights(tmp_path / "hf", copy)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "hf").dtype is torch.bfloat16


def test_a_bfloat16_run_is_exported_in_fp32(gpt2, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    convert(ConvertConfig(direction="import", source=gpt2, out=run, dtype="bf16"))
    convert(ConvertConfig(direction="export", source=run, out=out))
    for name, tensor in weights(gpt2).items():
        assert torch.equal(weights(out)[name], tensor.bfloat16().float())


def test_older_files_without_prefix_with_masks_and_head(gpt2, copy, parallel):
    theirs = weights(gpt2)
    older = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    older |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(4)}
    older["lm_head.weight"] = older["wte.weight"].clone()
    (copy / "model.safetensors").unlink()
    torch.save(older, copy / "pytorch_model.bin")
    network = build(copy, parallel)
    load_huggingface(network, copy)
    torch.testing.assert_close(our_logprobs(network), their_logprobs(gpt2), atol=1e-5, rtol=0)


def exported_tokenizer(gpt2: Path, tmp_path: Path, parallel: Parallel, ours: Tokenizer) -> Path:
    save_huggingface(build(gpt2, parallel), tmp_path / "hf", ours)
    return tmp_path / "hf"


TEXTS = ("the cheap mill", " near the  river\n", "<|endo", "é\u2603")


def test_the_tokenizer_goes_along(gpt2, tmp_path, parallel):
    ours = load_tokenizer(gpt2)
    folder = exported_tokenizer(gpt2, tmp_path, parallel, ours)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.eos_token_id == ours.eos_id
    assert theirs.model_max_length == 64
    assert load_tokenizer(folder).fingerprint() == ours.fingerprint()


def test_gpt2s_two_tokenizer_files_go_both_ways(gpt2, copy, tmp_path, parallel):
    (copy / "tokenizer.json").unlink()
    tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json")).model.save(str(copy))
    assert (copy / "vocab.json").exists() and (copy / "merges.txt").exists()
    convert(ConvertConfig(direction="import", source=copy, out=tmp_path / "run"))
    ours = load_tokenizer(tmp_path / "run" / "tokenizer")
    assert [ours.encode(text) for text in TEXTS] == [load_tokenizer(gpt2).encode(t) for t in TEXTS]
    folder = exported_tokenizer(gpt2, tmp_path, parallel, ours)
    for name in ("vocab.json", "merges.txt"):
        assert (folder / name).read_bytes() == (copy / name).read_bytes()
    theirs = AutoTokenizer.from_pretrained(folder)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [ours.encode(t) for t in TEXTS]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_second_conversion_into_a_folder_is_refused(gpt2, tmp_path, direction):
    convert(ConvertConfig(direction="import", source=gpt2, out=tmp_path / "run"))
    source = gpt2 if direction == "import" else tmp_path / "run"
    config = ConvertConfig(direction=direction, source=source, out=tmp_path / "out")
    with (tmp_path / ".out.lock").open("w") as lock:  # as another process has it
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="out: another run writes into this folder"):
            convert(config)
    convert(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_conversion_that_fails_leaves_nothing_and_one_that_was_killed_no_hindrance(
    gpt2, tmp_path, direction, monkeypatch
):
    convert(ConvertConfig(direction="import", source=gpt2, out=tmp_path / "run"))
    source = gpt2 if direction == "import" else tmp_path / "run"
    config = ConvertConfig(direction=direction, source=source, out=tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of-a-killed-one").touch()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Tokenizer, "save", full_disk)
        convert(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "of-a-killed-one").touch()
    convert(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert not (tmp_path / "out" / "of-a-killed-one").exists()


def full_disk(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_weights_that_find_no_room_are_one_line(gpt2, tmp_path, parallel):
    network, tokenizer = build(gpt2, parallel), load_tokenizer(gpt2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"model\.safetensors: cannot be written: .*too large"):
            save_huggingface(network, tmp_path / "hf", tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def refusal(folder: Path, **options) -> str:
    """The message with which the import of `folder` is refused, having written nothing."""
    out = folder.parent / "run"
    with pytest.raises(UserError) as caught:
        convert(ConvertConfig(direction="import", source=folder, out=out, **options))
    assert not out.exists()
    assert len(str(caught.value).splitlines()) <= 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("activation_function", "tanh"), ("n_inner", -1), ("model_type", "bert")]
)
def test_a_foreign_config_is_named_by_file_and_field(copy, field, value):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {field: value}))
    assert f"{copy / 'config.json'}: {field} is {value!r}" in refusal(copy)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transformer.h.2.mlp.c_fc.bias": None}, "h.2.mlp.c_fc.bias is missing"),
        (
            {"transformer.h.0.attn.c_attn.weight": torch.zeros(192, 64)},
            "h.0.attn.c_attn.weight has shape [192, 64], config.json asks for [64, 192]",
        ),
        (
            {"transformer.h.4.ln_1.weight": torch.zeros(64)},
            "h.4.ln_1.weight' is no tensor of the GPT-2",
        ),
        ({"transformer.ln_f.bias": torch.zeros(64).byte()}, "ln_f.bias is torch.uint8"),
        ({"transformer.ln_f.bias": torch.full((64,), torch.nan)}, "ln_f.bias is not finite"),
    ],
)
def test_foreign_tensors_are_named_by_file_and_tensor(copy, change, expected):
    changed = weights(copy) | change
    path = copy / "model.safetensors"
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)
    message = refusal(copy)
    assert message.startswith(str(path))
    assert expected in message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_layer": 10**7}, "transformer.h.4.ln_1.weight is missing"),
        ({"n_embd": 10**7, "n_head": 1}, "config.json asks for [300, 10000000]"),
        ({"vocab_size": 10**7}, "config.json asks for [10000000, 64]"),
        ({"n_layer": 10**9}, "n_layer is 1000000000 and must be"),
        ({"n_head": 7}, "hidden_size 64 must be a multiple of num_heads 7"),
    ],
)
def test_sizes_beyond_the_files_are_refused_before_a_model_is_built(copy, changes, expected):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    start = time.process_time()
    assert expected in refusal(copy)
    assert time.process_time() - start < 5


def test_tensors_that_share_their_numbers_are_refused(copy):
    numbers = torch.zeros(300 * 64)  # the largest: all others are views of it
    shared = {
        name: numbers[: tensor.numel()].view(tensor.shape) for name, tensor in weights(copy).items()
    }
    (copy / "model.safetensors").unlink()
    torch.save(shared, copy / "pytorch_model.bin")
    assert "in fewer bytes: some are the same" in refusal(copy)


def test_a_name_that_is_there_with_and_without_its_prefix_is_refused(copy):
    changed = weights(copy)
    changed["wpe.weight"] = torch.zeros(64, 64)
    save_file(changed, copy / "model.safetensors")
    assert "'transformer.wpe.weight' is there twice" in refusal(copy)


def test_names_of_a_megabyte_are_cut(copy):
    save_file(weights(copy) | {"x" * 10**6: torch.zeros(1)}, copy / "model.safetensors")
    assert len(refusal(copy)) < 500


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_is_no_regular_file_is_not_read(copy, kind):
    make_special(copy / "config.json", kind)
    assert "config.json" in refusal(copy)


@pytest.mark.parametrize(
    "content", ["", "null", "[]", "[" * 100_000, '{"a":' * 100_000, '"x"', "\xff", "{}", "NaN"]
)
def test_a_config_of_anything_is_one_line(copy, content):
    (copy / "config.json").write_text(content, encoding="latin-1")
    assert str(copy / "config.json") in refusal(copy)


def test_code_beside_a_model_is_not_run(gpt2, copy, tmp_path):
    mark = tmp_path / "was_run"
    code = f"open({str(mark)!r}, 'w')\n"
    for name in ("modeling_gpt2.py", "tokenization_gpt2.py", "__init__.py", "conftest.py"):
        (copy / name).write_text(code)
    auto_map = {"AutoModelForCausalLM": "modeling_gpt2.A", "AutoTokenizer": "tokenization_gpt2.A"}
    for name in ("config.json", "tokenizer_config.json"):
        path = copy / name
        fields = json.loads(path.read_text()) if path.exists() else {}
        fields |= {"auto_map": auto_map, "trust_remote_code": True, "_name_or_path": "./"}
        path.write_text(json.dumps(fields))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
        (copy / name).write_bytes(pickle.dumps(Touching(mark)))
    convert(ConvertConfig(direction="import", source=copy, out=tmp_path / "run"))
    assert not mark.exists()
    # What the folder says of its code goes no further.
    assert "auto_map" not in (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").read_text()
    out = tmp_path / "hf"
    convert(ConvertConfig(direction="export", source=tmp_path / "run", out=out))
    assert_same_weights(out, gpt2)
    assert "auto_map" not in (out / "config.json").read_text()


class Touching:
    """What a pickle makes of it: a call that leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_weights_that_overflow_fp16_are_named(copy):
    changed = weights(copy)
    changed["transformer.ln_f.weight"][3] = 1e5
    save_file(changed, copy / "model.safetensors")
    assert "transformer.ln_f.weight is not finite in torch.float16" in refusal(copy, dtype="fp16")


def test_a_file_cut_short_is_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert refusal(copy).startswith(f"{path} is damaged or cut short")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(copy):
    num_ids = load_tokenizer(copy).vocab_size
    config = json.loads((copy / "config.json").read_text()) | {"vocab_size": num_ids - 1}
    (copy / "config.json").write_text(json.dumps(config))
    changed = weights(copy)
    changed["transformer.wte.weight"] = changed["transformer.wte.weight"][: num_ids - 1].clone()
    save_file(changed, copy / "model.safetensors")
    assert f"the tokenizer has {num_ids} ids, the model {num_ids - 1}" in refusal(copy)


def test_a_padding_token_beyond_the_model_goes_both_ways(copy, tmp_path):
    theirs = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    theirs.add_special_tokens(["[PAD]"])
    theirs.save(str(copy / "tokenizer.json"))
    config = json.loads((copy / "config.json").read_text())
    num_ids = theirs.get_vocab_size() - 1
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": num_ids}))
    changed = weights(copy)
    changed["transformer.wte.weight"] = changed["transformer.wte.weight"][:num_ids].clone()
    save_file(changed, copy / "model.safetensors")
    (copy / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    convert(ConvertConfig(direction="import", source=copy, out=tmp_path / "run"))
    out = tmp_path / "hf"
    convert(ConvertConfig(direction="export", source=tmp_path / "run", out=out))
    assert AutoTokenizer.from_pretrained(out).pad_token_id == num_ids


def test_an_end_of_text_that_config_json_denies_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (copy / "generation_config.json").unlink()
    (copy / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    message = refusal(copy)
    assert "tokenizer_config.json names '<|endoftext|>' (id 0)" in message
    assert f"{copy / 'config.json'} has eos_token_id 5" in message


def test_missing_paths_and_layouts_that_do_not_fit(copy, tmp_path):
    assert "--source" in refusal(tmp_path / "nowhere")
    assert "layout tp 2" in refusal(copy, layout=ParallelLayout(tp=2))
    (copy / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(copy)
    with pytest.raises(UserError, match="--out .* exists already"):
        convert(ConvertConfig(direction="import", source=copy, out=copy))
    with pytest.raises(UserError, match="--out is required"):
        convert(ConvertConfig(direction="import", source=copy))


def test_a_language_model_is_not_filled_from_a_reward_model(gpt2, parallel, tmp_path):
    scorer = GPT2ForSequenceClassification(GPT2Config.from_pretrained(gpt2, num_labels=1))
    scorer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="holds a reward model.*a language model is needed"):
        load_huggingface(build(gpt2, parallel), tmp_path)
