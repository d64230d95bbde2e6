"""The quickstart's stages: what each starts from, reads and writes in the quickstart's folder."""

from dataclasses import replace
from typing import Any

from engine.data.comparisons import read_comparisons
from engine.data.demonstrations import read_demonstrations
from engine.data.pretraining import open_token_file
from engine.data.tokenizer import load_tokenizer
from engine.identity.made_from import RunConfig, names_of
from engine.quickstart.files import Files, is_tree
from engine.quickstart.settings import QuickstartConfig
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig

_MOST_EPOCHS = 16.0
_LEAST_LOOKS = 1.5  # at what is held out, before the end; examples that are too long are no steps


def pretraining_stage(config: QuickstartConfig, files: Files) -> SFTConfig:
    """Return the base model's pretraining, over as many tokens as the config says."""
    home, path = config.directory, config.directory / "tokenizer.model"
    text = open_token_file(files.pretraining, load_tokenizer(path), home / "tokens")
    epochs = _epochs(config, config.num_pretraining_tokens / len(text.tokens))
    length = config.pretrain.data.pretraining_tokens
    data = replace(
        config.pretrain.data,
        pretraining=files.pretraining,
        pretraining_valid=files.pretraining_valid,
    )
    return replace(
        config.pretrain,
        directory=home / "base",
        tokenizer=path,
        epochs=epochs,
        eval_every=_eval_every(config.pretrain, epochs * len(text.tokens) / length),
        data=data,
        **_of_all(config, config.pretrain),
    )


def sft_stage(config: QuickstartConfig, files: Files) -> SFTConfig:
    """Return the fine-tuning of the base model on demonstrations and pretraining text."""
    num_examples = len(read_demonstrations(files.demonstrations)[0])
    epochs = _epochs(config, config.num_demonstrations / num_examples)
    data = replace(
        config.sft.data,
        train=files.demonstrations,
        valid=files.demonstrations_valid,
        pretraining=files.pretraining,
        pretraining_valid=files.pretraining_valid,
    )
    return replace(
        config.sft,
        directory=config.directory / "sft",
        init_from=config.directory / "base",
        epochs=epochs,
        eval_every=_eval_every(config.sft, epochs * num_examples),
        data=data,
        **_of_all(config, config.sft),
    )


def rm_stage(config: QuickstartConfig, files: Files) -> RMConfig:
    """Return the reward model's training on comparisons, from the SFT model."""
    data = replace(
        config.rm.data,
        train=files.comparisons,
        valid=files.comparisons_valid,
        demonstrations=files.demonstrations,
    )
    return replace(
        config.rm,
        directory=config.directory / "rm",
        init_from=config.directory / "sft",
        eval_every=_eval_every(
            config.rm, config.rm.epochs * len(read_comparisons(files.comparisons)[0])
        ),
        data=data,
        **_of_all(config, config.rm),
    )


def ppo_stage(config: QuickstartConfig, files: Files, name: str) -> PPOConfig:
    """Return PPO from the SFT model against the reward model; name "ppo_ptx": with pretraining
    gradients, "ppo": without."""
    return replace(
        config.ppo,
        directory=config.directory / name,
        policy=config.directory / "sft",
        reward_model=config.directory / "rm",
        ptx_coef=config.ppo.ptx_coef if name == "ppo_ptx" else 0.0,
        data=replace(
            config.ppo.data,
            prompts=files.prompts,
            valid=files.prompts_valid,
            pretraining=files.pretraining,
            pretraining_valid=files.pretraining_valid,
        ),
        **_of_all(config, config.ppo),
    )


def _epochs(config: QuickstartConfig, epochs: float) -> float:
    """Return how often a file is read: of the user's own four files, no more than the paper reads
    its demonstrations (C.1), however few they are."""
    has_own_files = config.data is not None and not is_tree(config.data)
    return min(epochs, _MOST_EPOCHS) if has_own_files else epochs


def _eval_every(stage: SFTConfig | RMConfig, num_examples: float) -> int | None:
    """Return the steps between held-out numbers in a stage that reads about so many examples: the
    config's, unless the run is hardly as long; then about ten times."""
    num_steps = num_examples / stage.batch_size
    return stage.eval_every if (stage.eval_every or 0) * _LEAST_LOOKS <= num_steps else None


def _of_all(config: QuickstartConfig, stage: RunConfig) -> dict[str, Any]:
    """What all stages have in common."""
    mine, known = names_of(type(stage)), {*names_of(SFTConfig), *names_of(RMConfig)}
    known |= {*names_of(PPOConfig)}
    accepted = [name for name in config.accept_changed if name in mine or name not in known]
    return {
        "layout": config.layout,
        "numerics": config.numerics,
        "seed": config.seed,
        "accept_changed": (*stage.accept_changed, *accepted),
    }
