"""Folders as they lie on the hub and on disks, by many hands: each is a tiny GPT-2 of transformers'
with what sets that kind apart. Those that are taken go in and out, those that are not are named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.answers.answer import generate_text
from engine.answers.load import load_model
from engine.data.tokenizer import load_tokenizer
from engine.errors import UserError
from engine.huggingface.convert import convert
from engine.settings.convert import ConvertConfig
from engine.settings.generate import GenerateConfig
from engine.settings.sampling import SamplingConfig
from models.huggingface.families import FOREIGN_TYPES
from tests.engine.huggingface.sentencepiece_models import KINDS, write_model
from tests.engine.huggingface.test_families_around import farthest, our_logits, their_logits
from tests.families import CONFIGS, build_family, save_family, save_tokenizer
from tests.tiny import sft_config, train, write_lines

TEXTS = ("the cheap mill", " near the  river\n", "is <|im_end|> a pub", "é\u2603")
WEIGHTS, BIN = "model.safetensors", "pytorch_model.bin"
MASKS = [f"h.{layer}.attn" for layer in range(4)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What transformers 5 saves: a model and its tokenizer.json."""
    folder = tmp_path_factory.mktemp("base")
    save_family("gpt2", folder)
    save_tokenizer(folder)
    return folder


def edit(folder: Path, name: str = "config.json", **fields: object) -> None:
    """Set fields of a JSON file; None takes one out."""
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def as_bin(folder: Path, **options: object) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / BIN, **options)
    (folder / WEIGHTS).unlink()


def two_files(folder: Path) -> None:
    """Leave GPT-2's vocab.json and merges.txt of the tokenizer, and none of its settings."""
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.model.save(str(folder))
    edit(folder, "vocab.json", **tokenizer.get_vocab())  # its added tokens too
    path.unlink()
    (folder / "tokenizer_config.json").unlink()


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def hub_safetensors(folder: Path) -> None:
    masks = {f"{name}.bias": torch.ones(1, 1, 64, 64).tril() for name in MASKS}
    rewrite(folder, lambda tensors: bare(tensors) | masks)


def hub_bin(folder: Path) -> None:
    rewrite(folder, bare)
    as_bin(folder)
    two_files(folder)


def before_torch_1_6(folder: Path) -> None:
    masks = {f"{name}.bias": torch.ones(1, 1, 64, 64).byte().tril() for name in MASKS}
    masks |= {f"{name}.masked_bias": torch.tensor(-1e4) for name in MASKS}
    rewrite(folder, lambda tensors: bare(tensors) | masks)
    as_bin(folder, _use_new_zipfile_serialization=False)


def in_parts(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    build_family("gpt2").save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").exists()


def bin_in_parts(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    part_of = {
        name: f"pytorch_model-0000{number % 2 + 1}-of-00002.bin"
        for number, name in enumerate(tensors)
    }
    for part in set(part_of.values()):
        torch.save({n: t for n, t in tensors.items() if part_of[n] == part}, folder / part)
    edit(folder, f"{BIN}.index.json", metadata={}, weight_map=part_of)


def stored_head(folder: Path) -> None:
    rewrite(folder, lambda t: t | {"lm_head.weight": t["transformer.wte.weight"].clone()})


def untied_and_equal(folder: Path) -> None:
    stored_head(folder)
    edit(folder, tie_word_embeddings=False)


def half(dtype: str, field: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        rewrite(folder, lambda t: {n: v.to(getattr(torch, dtype)) for n, v in t.items()})
        edit(folder, **{"dtype": None, "torch_dtype": None} | {field: dtype})

    return change


def distilgpt2(folder: Path) -> None:
    hub_safetensors(folder)
    edit(folder, _num_labels=1, id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0})


def dialogpt(folder: Path) -> None:
    before_torch_1_6(folder)
    two_files(folder)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    edit(folder, "tokenizer_config.json", model_max_length=64, chat_template=template)


def added_tokens(folder: Path, *texts: str) -> dict[str, int]:
    """Put tokens behind the 300, and rows for them into the model."""
    ids = {text: 300 + number for number, text in enumerate(texts)}
    edit(folder, vocab_size=300 + len(ids))
    key = "transformer.wte.weight"
    more = torch.full((len(ids), 64), 0.01)
    rewrite(folder, lambda tensors: tensors | {key: torch.cat([tensors[key], more])})
    return ids


def padding(folder: Path) -> None:
    added_tokens(folder, "[PAD]")
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(path))
    edit(folder, "tokenizer_config.json", pad_token="[PAD]")


def chatml(folder: Path) -> None:
    """As F3: only special_tokens_map.json and config.json name the end."""
    ids = added_tokens(folder, "<|im_start|>", "<|im_end|>")
    path = folder / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens([*ids])
    tokenizer.save(str(path))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    edit(folder, "special_tokens_map.json", eos_token="<|im_end|>")
    edit(folder, eos_token_id=ids["<|im_end|>"])
    (folder / "generation_config.json").unlink()


def chatml_of_slow_files(folder: Path) -> None:
    ids = added_tokens(folder, "<|im_start|>", "<|im_end|>", "[PAD]")
    two_files(folder)
    edit(folder, "added_tokens.json", **ids)
    named = {"eos_token": "<|im_end|>", "pad_token": "[PAD]"}
    edit(folder, "special_tokens_map.json", **named)
    edit(folder, eos_token_id=ids["<|im_end|>"])
    (folder / "generation_config.json").unlink()


def padded_vocabulary(folder: Path) -> None:
    """As 50,304 rows for 50,257 ids."""
    added_tokens(folder, *(f"row {n}" for n in range(20)))


def rinna(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    write_model(folder / "spiece.model", **KINDS["unigram"])
    edit(folder, eos_token_id=2, bos_token_id=1)
    edit(folder, "tokenizer_config.json", eos_token="</s>")


def checkpoint_500(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"not to be read")
    edit(folder, "trainer_state.json", global_step=500)


def snapshot(folder: Path) -> None:
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / f"{number:040}")
        path.symlink_to(Path("..") / "blobs" / f"{number:040}")


def value_head(folder: Path) -> None:
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.ones(1)}
    rewrite(folder, lambda tensors: tensors | head)


def compiled(folder: Path) -> None:
    rewrite(folder, lambda t: {f"_orig_mod.{name}": tensor for name, tensor in t.items()})


TAKEN: dict[str, Callable[[Path], None]] = {
    "as transformers saves it": lambda folder: None,
    "bare names and masks": hub_safetensors,
    "bin, two tokenizer files": hub_bin,
    "bin before torch 1.6, masks of bytes": before_torch_1_6,
    "in parts": in_parts,
    "bin in parts": bin_in_parts,
    "stored head": stored_head,
    "untied, head equal to the embedding": untied_and_equal,
    "fp16, torch_dtype": half("float16", "torch_dtype"),
    "fp16, dtype": half("float16", "dtype"),
    "bf16, torch_dtype": half("bfloat16", "torch_dtype"),
    "bf16, dtype": half("bfloat16", "dtype"),
    "n_inner in words": lambda folder: edit(folder, n_inner=256),
    "reorder_and_upcast_attn": lambda folder: edit(folder, reorder_and_upcast_attn=True),
    "gelu_pytorch_tanh": lambda folder: edit(folder, activation_function="gelu_pytorch_tanh"),
    "gelu_fast": lambda folder: edit(folder, activation_function="gelu_fast"),
    "distilgpt2": distilgpt2,
    "DialoGPT": dialogpt,
    "added padding": padding,
    "ChatML": chatml,
    "ChatML in slow files": chatml_of_slow_files,
    "padded vocabulary": padded_vocabulary,
    "rinna": rinna,
    "Trainer's checkpoint-500": checkpoint_500,
    "snapshot of the hub's cache": snapshot,
    "TRL's value head": value_head,
    "torch.compile's names": compiled,
}
# transformers makes other things of these: of GPT-2's class, which reads no spiece.model; and of
# names that it does not know.
OWN_TOKENIZER = ("rinna",)
OWN_WEIGHTS = ("torch.compile's names",)
QUICK = ("bare names and masks", "ChatML", "snapshot of the hub's cache")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TAKEN],
)
def test_a_folder_goes_in_and_out(base, tmp_path, name):
    folder = Path(shutil.copytree(base, tmp_path / "cache" / "folder"))
    TAKEN[name](folder)
    run, out = tmp_path / "run", tmp_path / "out"
    convert(ConvertConfig(direction="import", source=folder, out=run))
    convert(ConvertConfig(direction="export", source=run, out=out))
    tokens = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(1))
    theirs = base if name in OWN_WEIGHTS else folder
    model = AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(tokens[None]).logits[0]
    network, ours = load_model(GenerateConfig(source=run))
    assert farthest(our_logits(network, tokens), expected) < 1e-5
    assert farthest(their_logits(out, tokens), expected) < 1e-5
    after = AutoTokenizer.from_pretrained(out)
    assert [after(text, add_special_tokens=False)["input_ids"] for text in TEXTS[:2]] == [
        ours.encode(text) for text in TEXTS[:2]
    ]
    assert (after.eos_token_id, after.eos_token) == (ours.eos_id, ours.eos_text)
    if name not in OWN_TOKENIZER:
        before = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert after(text)["input_ids"] == before(text)["input_ids"], text
        assert (len(after), after.eos_token_id) == (len(before), before.eos_token_id)
        assert (after.pad_token, after.chat_template) == (before.pad_token, before.chat_template)


def test_two_columns_are_a_model(tmp_path):
    """As sshleifer/tiny-gpt2."""
    save_family("gpt2", tmp_path / "in", n_embd=2, n_head=2, n_layer=2)
    save_tokenizer(tmp_path / "in")
    convert(ConvertConfig(direction="import", source=tmp_path / "in", out=tmp_path / "run"))
    network, _ = load_model(GenerateConfig(source=tmp_path / "run"))
    tokens = torch.arange(40)
    assert farthest(our_logits(network, tokens), their_logits(tmp_path / "in", tokens)) < 1e-5


@pytest.mark.parametrize("name", ["ChatML", "ChatML in slow files"])
def test_an_answer_ends_where_the_folders_files_say(base, tmp_path, name):
    """As faults F3: weights that prefer the end of text, which generation stops at and SFT closes
    responses with, from the folder itself and its import."""
    folder = Path(shutil.copytree(base, tmp_path / "folder"))
    TAKEN[name](folder)
    end = load_tokenizer(folder).eos_id
    assert end == 301

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for key in ("weight", "bias"):
            tensors[f"transformer.ln_f.{key}"] = torch.full((64,), float(key == "bias"))
        tensors["transformer.wte.weight"][end] = 1.0
        return tensors

    rewrite(folder, change)
    convert(ConvertConfig(direction="import", source=folder, out=tmp_path / "run"))
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "the mill"}])
    for source in (folder, tmp_path / "run"):
        out = tmp_path / f"{source.name}.jsonl"
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=20)
        config = GenerateConfig(source=source, prompts=prompts, out=out, sampling=sampling)
        generate_text(config)
        answer = json.loads(out.read_text())
        assert (answer["tokens"], answer["has_eos"], answer["response"]) == (1, True, "")


def int8(folder: Path) -> None:
    names = {"transformer.h.0.attn.c_attn.SCB": torch.ones(192)}
    rewrite(folder, lambda tensors: tensors | names)


def rename(new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).rename(folder / new) and None


def lora(folder: Path) -> None:
    for name in (WEIGHTS, "config.json"):
        (folder / name).unlink()
    edit(folder, "adapter_config.json", peft_type="LORA")
    save_file({"a.lora_A.weight": torch.ones(2)}, folder / "adapter_model.safetensors")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 548105171\n"
    (folder / WEIGHTS).write_text(text)


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def classifier(folder: Path) -> None:
    edit(folder, architectures=["GPT2ForSequenceClassification"])
    rewrite(folder, lambda tensors: tensors | {"score.weight": torch.ones(2, 64)})


def foreign_tokens(folder: Path) -> None:
    two_files(folder)
    path = folder / "vocab.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<eot>"))
    (folder / "generation_config.json").unlink()
    edit(folder, eos_token_id=None)


def only_n_ctx(folder: Path) -> None:
    edit(folder, n_positions=None, n_ctx=64)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "int8": (int8, "SCB is of quantised weights"),
    "fp16 variant": (rename("model.fp16.safetensors"), "a variant"),
    "TensorFlow": (rename("tf_model.h5"), "weights of TensorFlow or Flax"),
    "GGUF": (rename("model-Q4_K_M.gguf"), "GGUF, llama.cpp's format"),
    "LoRA": (lora, "a LoRA adapter: merge it into its base model"),
    "pointer": (pointer, "is a git-lfs pointer and not the file: run `git lfs pull`"),
    "no config": (without("config.json"), "holds no config.json"),
    "no tokenizer": (without("tokenizer.json"), "should hold a tokenizer.json"),
    "no model_type": (lambda folder: edit(folder, model_type=None), "model_type is None"),
    "only n_ctx": (only_n_ctx, "n_positions is None"),
    "classifier of two": (classifier, "gives 2 numbers a text, and a reward model gives one"),
    "vocab.json without an end": (foreign_tokens, "has no end-of-text token"),
}


def refusal(folder: Path) -> str:
    out = folder.with_name("out")
    with pytest.raises(UserError) as caught:
        convert(ConvertConfig(direction="import", source=folder, out=out))
    assert not out.exists() and len(str(caught.value).splitlines()) <= 2
    assert str(folder) in str(caught.value)  # the user's own path, and no temporary one
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_taken_is_said_to_be_what_it_is(base, tmp_path, name):
    folder = Path(shutil.copytree(base, tmp_path / "folder"))
    change, said = REFUSED[name]
    change(folder)
    assert said in refusal(folder)


TYPES = ("gptj", "gpt_neo", "bloom", "gemma", "gemma2", "falcon", "phi", "phi3", "gpt_bigcode")
TYPES += ("starcoder2", "openai-gpt", "mpt", "stablelm", "mixtral", "olmo2", "codegen")


@pytest.mark.parametrize("model_type", TYPES)
def test_a_family_that_does_not_convert_is_named_with_its_reason(base, tmp_path, model_type):
    folder = Path(shutil.copytree(base, tmp_path / "folder"))
    AutoConfig.for_model(model_type).save_pretrained(folder)
    message = refusal(folder)
    assert f"model_type is '{model_type}' ({FOREIGN_TYPES[model_type]})" in message
    for config in CONFIGS.values():
        assert repr(config["model_type"]) in message


def test_a_checkpoint_of_a_run_and_its_policy_are_sources_too(tiny, tmp_path):
    """As faults F8, with the tokenizer found: an SFT from a checkpoint, answers of one."""
    train(sft_config(tiny, tmp_path / "sft"))
    (checkpoint,) = (tmp_path / "sft" / "checkpoints").glob("step_*")
    train(sft_config(tiny, tmp_path / "next", init_from=checkpoint))
    convert(ConvertConfig(direction="export", source=checkpoint, out=tmp_path / "out"))
    assert load_model(GenerateConfig(source=checkpoint))[1].is_same_as(
        load_model(GenerateConfig(source=tmp_path / "sft"))[1]
    )
