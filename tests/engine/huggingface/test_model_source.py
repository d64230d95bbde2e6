"""Stages that start straight from a Hugging Face folder, as transformers saves it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.checkpoints.found import read_network
from engine.data.tokenizer import train_sentencepiece
from engine.errors import UserError
from engine.huggingface.convert import export_huggingface, import_huggingface, save_huggingface
from engine.huggingface.model_folder import read_size
from engine.huggingface.model_source import digest_of_model
from engine.ranks.start import start_parallel
from engine.rollout import Rollout, generate_rollout
from engine.settings.convert import ConvertConfig
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.sampling import SamplingConfig
from engine.settings.sft import SelectionConfig
from tests.families import save_family
from tests.ranks import run_ranks
from tests.recipe_runs import TORCHRUN, start, steps_logged, until
from tests.tiny import (
    EVERY_STEP,
    SIZE,
    ppo_config,
    random_network,
    rm_config,
    rows_of,
    sft_config,
    train,
    train_until,
    write_tokenizer,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two families, with a tokenizer of all their ids; nobody writes into them."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "llama"):
        save_family(name, folder / name, vocab_size=SIZE.vocab_size)
        write_tokenizer(folder / name / "tokenizer.json", vocab_size=SIZE.vocab_size)
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Path:
    """A folder that may be moved or spoiled."""
    return Path(shutil.copytree(models / "llama", tmp_path / "llama"))


def stored(run: Path, role: str) -> dict[str, torch.Tensor]:
    """All numbers of a network in a run's newest checkpoint, its optimizer's too."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text() / role
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {f"{path.stem} {name}": value for name, value in load_file(path).items()}
    return tensors


def assert_same_run(run: Path, other: Path, role: str = "policy") -> None:
    assert rows_of(run) == rows_of(other)
    tensors, others = stored(run, role), stored(other, role)
    assert tensors.keys() == others.keys()
    for name, value in tensors.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize(
    ("name", "stage", "dtype"), [("llama", "sft", "fp32"), ("gpt2", "rm", "bf16")]
)
def test_a_run_from_a_folder_is_one_from_its_import(models, tiny, tmp_path, name, stage, dtype):
    imported = ConvertConfig(direction="import", source=models / name, out=tmp_path / "imported")
    import_huggingface(imported)
    for run, source in (("a", models / name), ("b", tmp_path / "imported")):
        config: Any = sft_config if stage == "sft" else rm_config
        numerics = Numerics(dtype=dtype)
        train(config(tiny, tmp_path / run, init_from=source, numerics=numerics))
    role = "policy" if stage == "sft" else "reward_model"
    assert_same_run(tmp_path / "a", tmp_path / "b", role)
    kept = read_network(tmp_path / "a" / "sources" / "init_from" / "policy")
    assert kept.size == read_network(tmp_path / "b" / "sources" / "init_from" / "policy").size
    (file,) = kept.folder.glob("weights-*.safetensors")
    wanted = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert {tensor.dtype for tensor in load_file(file).values()} == {wanted}


def test_a_killed_run_goes_on_without_the_folder(copy, tiny, tmp_path):
    config = sft_config(tiny, tmp_path / "run", init_from=copy, saving=EVERY_STEP)
    whole = dataclasses.replace(config, directory=tmp_path / "whole")
    train(whole)
    train_until(config, 0)  # nothing was saved: it begins anew
    assert not (config.directory / "checkpoints" / "latest").exists()
    train_until(config, 1)
    shutil.rmtree(copy)
    train(config)
    assert_same_run(config.directory, whole.directory)


def test_a_folder_that_has_moved_is_known_and_another_is_refused(copy, models, tiny, tmp_path):
    config = sft_config(tiny, tmp_path / "run", init_from=copy, saving=EVERY_STEP)
    train_until(config, 1)
    with pytest.raises(UserError, match=r"init_from"):
        train(dataclasses.replace(config, init_from=models / "gpt2"))
    moved = copy.rename(tmp_path / "moved")
    train(dataclasses.replace(config, init_from=moved))
    assert len(rows_of(config.directory)) == 3


def test_a_copy_that_was_changed_is_another_network(copy, tiny, tmp_path):
    config = sft_config(tiny, tmp_path / "run", init_from=copy, saving=EVERY_STEP)
    train_until(config, 1)
    kept = config.directory / "sources" / "init_from"
    other = dataclasses.replace(config, directory=tmp_path / "other", init_from=tiny / "policy")
    train_until(other, 0)
    shutil.rmtree(kept)
    shutil.copytree(other.directory / "sources" / "init_from", kept)
    with pytest.raises(UserError, match=r"--accept-changed init_from"):
        train(config)


def test_ppo_starts_from_a_folder_and_measures_to_it(models, copy, tiny, tmp_path):
    for run, reference in (("own", None), ("named", models / "llama")):
        config = ppo_config(
            tiny,
            tmp_path / run,
            policy=copy,
            reference=reference,
            iterations=1,
            eval_every=0,
        )
        train(config)
    assert sorted(path.name for path in (tmp_path / "named" / "sources").iterdir()) == [
        "policy",
        "reference",
        "reward_model",
    ]
    assert_same_run(tmp_path / "own", tmp_path / "named")  # both folders hold the same model
    with pytest.raises(UserError, match=r"a tiny has 2 of 192 .*--size ''"):
        train(dataclasses.replace(config, directory=tmp_path / "sized", size="tiny"))
    assert not (tmp_path / "sized").exists()


def test_a_language_model_is_no_reward_model(models, tiny, tmp_path):
    said = "llama holds a language model, where a reward model is needed: train one from it"
    with pytest.raises(UserError, match=said):
        train(ppo_config(tiny, tmp_path / "run", reward_model=models / "llama"))
    selection = SelectionConfig(reward_model=models / "llama")
    with pytest.raises(UserError, match=said):
        train(sft_config(tiny, tmp_path / "run", selection=selection))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_tokenizer_is_refused(copy, tiny, tmp_path, capsys):
    write_tokenizer(copy / "tokenizer.json", vocab_size=90)
    with pytest.raises(UserError, match="llama: its tokenizer is another than this run's"):
        train(ppo_config(tiny, tmp_path / "run", reference=copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"llama should hold a tokenizer\.json"):
        train(sft_config(tiny, tmp_path / "run", init_from=copy))
    train(ppo_config(tiny, tmp_path / "run", reference=copy, iterations=1))
    assert "nothing says whether" in capsys.readouterr().err


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(copy, tiny, tmp_path):
    settings = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary |= {f"word{i}": i for i in range(len(vocabulary), 101)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    tokenizer = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="the tokenizer has 101 ids, the model 100"):
        train(sft_config(tiny, tmp_path / "run", init_from=copy, tokenizer=tokenizer))
    assert not (tmp_path / "run").exists()


def test_the_digest_of_a_model_is_of_its_content_alone(copy, models):
    digest = digest_of_model(models / "llama")
    assert digest_of_model(copy) == digest
    (copy / "README.md").write_text("a model")
    assert digest_of_model(copy) == digest
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    assert digest_of_model(copy) != digest


def test_what_is_no_such_folder_is_named_before_its_tokenizer(copy, models, tiny, tmp_path):
    cache = tmp_path / "models--llama"
    snapshot = Path(shutil.copytree(models / "llama", cache / "snapshots" / "abc"))
    said = r"models--llama holds no config\.json; it is a cache of the hub: give .*snapshots/abc"
    with pytest.raises(UserError, match=said):
        train(rm_config(tiny, tmp_path / "run", init_from=cache))
    with pytest.raises(UserError, match="a file: give its folder"):
        train(ppo_config(tiny, tmp_path / "run", policy=snapshot / "model.safetensors"))
    blobs = cache / "blobs"  # as the hub's cache has them: links in the snapshot
    blobs.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).rename(blobs / name)
        (snapshot / name).symlink_to(blobs / name)
    train(rm_config(tiny, tmp_path / "run", init_from=snapshot, epochs=0.3))
    assert len(rows_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("name", ["size", "reward_model_size"])
def test_a_size_that_is_not_had_is_refused_before_anything_is_copied(name, models, tiny, tmp_path):
    config = ppo_config(tiny, tmp_path / "run", policy=models / "llama", **{name: "6b"})
    with pytest.raises(UserError, match="has 4 layers of width .* a 6b has 32 of 4096"):
        train(config)
    assert not list((tmp_path / "run").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def padded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run's reward model as we export it: its padding token is one id more. And a policy
    that was given that tokenizer, in its own folder."""
    folder = tmp_path_factory.mktemp("padded")
    export = ConvertConfig(
        direction="export", source=tiny / "reward_model", out=folder / "reward_model"
    )
    export_huggingface(export)
    assert read_size(folder / "reward_model").vocab_size == SIZE.vocab_size + 1
    save_family("gpt2", folder / "policy", vocab_size=SIZE.vocab_size + 1)
    for path in (folder / "reward_model").glob("tokenizer*"):
        shutil.copy(path, folder / "policy")
    return folder


@pytest.mark.parametrize("tp", [1, 2])
def test_our_exported_reward_model_scores_as_the_run_that_it_came_from(padded, tiny, tmp_path, tp):
    layout = ParallelLayout(tp=tp)
    for run, source in (("own", tiny / "reward_model"), ("folder", padded / "reward_model")):
        config = ppo_config(
            tiny, tmp_path / run, reward_model=source, layout=layout, iterations=1, eval_every=0
        )
        run_ranks(train, tp, config)
    own, folder = (rows_of(tmp_path / run)[0] for run in ("own", "folder"))
    for name in ("score/reward_mean", "score/reward_std", "score/kl", "rollout/response_tokens"):
        assert folder[name] == pytest.approx(own[name], abs=1e-5), name


def noted_draws(monkeypatch: pytest.MonkeyPatch, *modules: str) -> set[int]:
    """Return where all ids of the modules' rollouts are noted from now on."""
    drawn: set[int] = set()

    def noting(*args: Any, **options: Any) -> Rollout:
        rollout = generate_rollout(*args, **options)
        drawn.update(int(token) for each in rollout.examples for token in each.tokens)
        return rollout

    for module in modules:
        monkeypatch.setattr(f"{module}.generate_rollout", noting)
    return drawn


@pytest.mark.parametrize("kind", ["folder", "run"])
def test_a_policy_with_a_token_more_never_draws_it(padded, tiny, tmp_path, kind, monkeypatch):
    policy = padded / "policy"
    if kind == "run":
        policy = tmp_path / "imported"
        import_huggingface(
            ConvertConfig(direction="import", source=padded / "policy", out=tmp_path / "imported")
        )
    drawn = noted_draws(monkeypatch, "engine.ppo", "engine.evaluation.held_out")
    sampling = SamplingConfig(max_new_tokens=24, num_slots=4, cache_gib=0.01, temperature=100.0)
    config = ppo_config(
        tiny, tmp_path / "run", policy=policy, reference=None, sampling=sampling, saving=EVERY_STEP
    )
    train_until(config, 1)
    train(config)  # goes on, of its own copies
    assert len(drawn) > 90 and max(drawn) == SIZE.vocab_size - 1
    own = tmp_path / "run" / "sources"
    assert (own / "reward_model" / "tokenizer").exists()
    assert not (own / "reference" / "tokenizer").exists()


def test_an_epoch_is_selected_by_a_reward_model_of_fewer_ids(padded, tiny, tmp_path, monkeypatch):
    drawn = noted_draws(monkeypatch, "engine.evaluation.selection")
    hot = SamplingConfig(max_new_tokens=40, cache_gib=0.01, temperature=100.0)
    selection = SelectionConfig(reward_model=tiny / "reward_model", sampling=hot)
    train(sft_config(tiny, tmp_path / "run", init_from=padded / "policy", selection=selection))
    assert (tmp_path / "run" / "selected.json").exists()
    assert len(drawn) > 80 and max(drawn) == SIZE.vocab_size - 1


def test_a_sentencepiece_run_takes_its_own_export(tiny, tmp_path):
    words = (json.loads(line)["prompt"] for line in (tiny / "prompts.jsonl").open())
    run, size = tmp_path / "policy", dataclasses.replace(SIZE, vocab_size=290)
    tokenizer = train_sentencepiece([*words] * 9, tmp_path / "tokenizer.model", vocab_size=290)
    files = Path(shutil.copytree(tiny, tmp_path / "files"))
    (files / "tokenizer.json").unlink()
    tokenizer.save(files)
    parallel = start_parallel(ParallelLayout(), seed=0)
    for role, kind in (("policy", "language"), ("reward_model", "scalar")):
        network = random_network(kind, parallel, size=size)
        save_huggingface(network, tmp_path / f"{role}_hf", tokenizer)
    import_huggingface(
        ConvertConfig(
            direction="import",
            source=tmp_path / "policy_hf",
            tokenizer=tmp_path / "tokenizer.model",
            out=run,
        )
    )
    config = ppo_config(files, tmp_path / "run", iterations=1, eval_every=0, policy=run)
    folders = {"reference": tmp_path / "policy_hf", "reward_model": tmp_path / "reward_model_hf"}
    train(dataclasses.replace(config, **folders))
    assert rows_of(tmp_path / "run")[0]["score/kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.slow  # five torchruns of two ranks each
def test_recipes_start_from_a_folder_in_parts_on_two_ranks(models, tiny, tmp_path):
    folder = tmp_path / "snapshot"
    save_family("gpt2", tmp_path / "whole").save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    write_tokenizer(folder / "tokenizer.json", vocab_size=100)

    def launch(recipe: str, directory: Path, *options: object) -> Any:
        words = [f"recipes/{recipe}_tiny.py", "--directory", directory, "--layout.tp", 2]
        words += ["--save-every", 1, *options]
        launcher = (*TORCHRUN, "--standalone", "--nproc-per-node=2")
        return start(map(str, words), tmp_path / "said", launcher=launcher)

    def run_to_its_end(*arguments: Any) -> None:
        started = launch(*arguments)
        assert started.wait(240) == 0, started.said()

    demonstrations = ("--data.train", tiny / "demonstrations.jsonl", "--epochs", 8)
    from_folder = ("--init-from", folder, *demonstrations)
    run_to_its_end("sft", tmp_path / "unbroken", *from_folder)
    broken = launch("sft", tmp_path / "broken", *from_folder)
    until((tmp_path / "broken" / "checkpoints" / "latest").exists)
    broken.end()
    assert 0 < steps_logged(tmp_path / "broken") < len(rows_of(tmp_path / "unbroken"))
    folder.rename(tmp_path / "elsewhere")
    run_to_its_end("sft", tmp_path / "broken", *from_folder)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    kept = tmp_path / "broken" / "sources" / "init_from" / "policy"
    assert len(list(kept.glob("weights-*.safetensors"))) == 2  # each rank wrote what it holds
    folder = tmp_path / "elsewhere"
    shutil.rmtree(kept.parent)  # and it is taken anew, by ranks of another layout
    longer = ("--init-from", folder, *demonstrations, "--epochs", 9, "--layout.tp", 1)
    run_to_its_end("sft", tmp_path / "broken", *longer)
    assert len(rows_of(tmp_path / "broken")) > len(rows_of(tmp_path / "unbroken"))
    comparisons = ("--init-from", folder, "--data.train", tiny / "comparisons.jsonl")
    run_to_its_end("rm", tmp_path / "rm", *comparisons)
    options = ("--policy", folder, "--reward-model", tmp_path / "rm")
    options += ("--data.prompts", tiny / "prompts.jsonl", "--data.pretraining")
    options += (tiny / "pretraining.jsonl", "--data.pretraining-tokens", 32, "--iterations", 1)
    options += ("--data.max-prompt-tokens", 32, "--sampling.max-new-tokens", 8)
    options += ("--rollout-batch-size", 8, "--minibatch-size", 4)
    run_to_its_end("ppo", tmp_path / "ppo", *options)
    assert rows_of(tmp_path / "ppo")[0]["score/kl"] == pytest.approx(0.0, abs=1e-4)
