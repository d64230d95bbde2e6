"""The whole recipe on a small model: pretrain, SFT, reward model, PPO and PPO-ptx, then a report.

Without files it makes its own data: the English of the installed Python, invented places to
describe, and a scripted labeler that ranks what the SFT model itself wrote, as the paper's labelers
did.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from engine.checkpoint import load_weights, size_of
from engine.config import UserError
from engine.data.demonstrations import read_demonstrations
from engine.data.files import read_lines, replacing
from engine.data.labeler import e2e_language, rank, score
from engine.data.places import demonstrations, fact_lists, parse_prompt, render_prompt
from engine.data.pretraining import open_token_file
from engine.data.prompts import prompt_examples, read_prompts
from engine.data.python_text import python_documents, split_documents
from engine.data.tokenizer import load_tokenizer, train_sentencepiece
from engine.evaluate import win_rate
from engine.losses import mean_language_loss
from engine.metrics import read_metrics
from engine.network import Kind, Network, build_network
from engine.parallel import start_parallel
from engine.ppo import train as train_ppo
from engine.report import MODELS, summary_table, write_report
from engine.rm import train as train_rm
from engine.rollout import Rollout, generate_rollout, last_readings, read_rollout
from engine.settings.layout import ParallelLayout
from engine.settings.numerics import Numerics
from engine.settings.ppo import PPOConfig
from engine.settings.rm import RMConfig
from engine.settings.sft import SFTConfig
from engine.sft import train as train_sft


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """One pass through the recipe."""

    directory: Path = Path("runs/quickstart")
    """Everything is written below it; finished stages of an earlier start are kept."""
    data: Path | None = None
    """Folder of files to train on instead of the made ones:
    {sft,comparisons,prompts}/TASK*.{train,val}.jsonl[.gz] and pretrain/{train,val}.jsonl[.gz]."""
    task: str = "e2e"
    """Which files of the data folder: their names begin with it."""
    vocab_size: int = 1500
    """Entries of the sentencepiece tokenizer that is trained."""
    num_pretraining_tokens: int = 300_000
    """Tokens that the base model is trained on, drawn from all of the text."""
    num_demonstrations: int = 6000
    """Made demonstrations, or from files: demonstrations seen, fewer ones being read again."""
    num_compared: int = 800
    """Prompts whose completions are sampled from the SFT model and ranked; a tenth is held out."""
    faults_per_level: float = 3.0
    """Faults by which the scripted labeler tells two completions apart; closer ones tie."""
    num_prompts: int = 2000
    """Made prompts for PPO."""
    num_judged: int = 300
    """Held-out prompts that the four models answer at the end."""
    pretrain: SFTConfig = field(default_factory=SFTConfig)
    """The base model's stage; files and folder are filled in."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """The RLHF initialisation's stage; files and folder are filled in."""
    rm: RMConfig = field(default_factory=RMConfig)
    """The reward model's stage; files and folder are filled in."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """PPO-ptx's stage, and with ptx_coef 0 PPO's; files and folder are filled in."""
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    """Parallelism of every stage."""
    numerics: Numerics = field(default_factory=Numerics)
    """Dtype of every stage."""
    seed: int = 0
    """Of every stage."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of one quickstart."""

    demonstrations: Path
    demonstrations_valid: Path
    comparisons: Path
    comparisons_valid: Path
    prompts: Path
    prompts_valid: Path
    pretraining: Path
    pretraining_valid: Path


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Run every stage, judge the four models on held-out prompts, write summary.json and
    report.html."""
    home = config.directory
    seconds: dict[str, float] = {}
    common: dict[str, Any] = {
        "layout": config.layout,
        "numerics": config.numerics,
        "seed": config.seed,
    }

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    files = timed("data", prepare_files, config)
    tokenizer = home / "tokenizer.model"
    text = open_token_file(files.pretraining, load_tokenizer(tokenizer), home / "tokens")
    pretrain = replace(
        config.pretrain,
        directory=home / "base",
        tokenizer=tokenizer,
        epochs=config.num_pretraining_tokens / len(text.tokens),
        data=replace(
            config.pretrain.data,
            pretraining=files.pretraining,
            pretraining_valid=files.pretraining_valid,
        ),
        **common,
    )
    timed("pretrain", train_sft, pretrain)
    fine_tune = replace(
        config.sft,
        directory=home / "sft",
        init_from=home / "base",
        epochs=config.num_demonstrations / len(read_demonstrations(files.demonstrations)[0]),
        data=replace(
            config.sft.data,
            train=files.demonstrations,
            valid=files.demonstrations_valid,
            pretraining=files.pretraining,
            pretraining_valid=files.pretraining_valid,
        ),
        **common,
    )
    timed("sft", train_sft, fine_tune)
    if config.data is None:
        timed("label", write_comparisons, config, files)
    reward_model = replace(
        config.rm,
        directory=home / "rm",
        init_from=home / "sft",
        data=replace(
            config.rm.data,
            train=files.comparisons,
            valid=files.comparisons_valid,
            demonstrations=files.demonstrations,
        ),
        **common,
    )
    rm_values = timed("rm", train_rm, reward_model)
    for name in ("ppo", "ppo_ptx"):
        stage = replace(
            config.ppo,
            directory=home / name,
            policy=home / "sft",
            reward_model=home / "rm",
            ptx_coef=config.ppo.ptx_coef if name == "ppo_ptx" else 0.0,
            data=replace(config.ppo.data, prompts=files.prompts, pretraining=files.pretraining),
            **common,
        )
        timed(name, train_ppo, stage)
    summary, samples = timed("judge", judge_models, config, files)
    summary = {
        "rm_pair_accuracy": rm_values["valid/pair_accuracy"],
        **summary,
        "seconds": seconds,
        "seed": config.seed,
    }
    if dist.get_rank() == 0:
        _write_results(home, summary, samples)
    return summary


def prepare_files(config: QuickstartConfig) -> Files:
    """Make or find the files, and train the tokenizer on their training text; rank 0 writes, all
    ranks wait."""
    parallel = start_parallel(config.layout, config.seed)
    files = _found_files(config) if config.data else _made_files(config.directory / "data")
    if parallel.is_writer:
        if config.data is None:
            _write_made_files(config, files)
        tokenizer = config.directory / "tokenizer.model"
        if not tokenizer.exists():
            config.directory.mkdir(parents=True, exist_ok=True)
            records, _ = read_demonstrations(files.demonstrations)
            texts = [f"{record.prompt}\n{record.response}" for record in records]
            texts += [json.loads(line)["text"] for _, line in read_lines(files.pretraining)]
            train_sentencepiece(texts, tokenizer, vocab_size=config.vocab_size)
    dist.barrier()
    return files


def write_comparisons(config: QuickstartConfig, files: Files) -> None:
    """Sample K = 4 to 9 completions a prompt from the SFT model and let the scripted labeler rank
    them.

    Prompts whose completions all tie say nothing and are left out, as a labeler's ties are.
    """
    if files.comparisons.exists():
        return
    sampled = _Sampler(config, home_run="sft")
    facts = fact_lists("prompts", config.num_compared, seed=config.seed + 1)
    num_completions = [4 + i % 6 for i in range(len(facts))]  # K, paper C.2
    repeated = [
        render_prompt(f) for f, k in zip(facts, num_completions, strict=True) for _ in range(k)
    ]
    answers = iter(sampled.answers(repeated))
    rows = []
    for listed, k in zip(facts, num_completions, strict=True):
        completions = [next(answers) for _ in range(k)]
        # An empty completion is no text to compare; the reader of comparisons would refuse it.
        completions = [text for text in completions if text.strip()]
        ranks = rank(listed, completions, faults_per_level=config.faults_per_level)
        if len(set(ranks)) > 1:
            rows.append(
                {"prompt": render_prompt(listed), "completions": completions, "ranks": ranks}
            )
    if sampled.parallel.is_writer:
        num_valid = len(rows) // 10
        _write_jsonl(files.comparisons_valid, rows[:num_valid])
        _write_jsonl(files.comparisons, rows[num_valid:])
    dist.barrier()


def judge_models(
    config: QuickstartConfig, files: Files
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of base, sft, ppo and ppo_ptx on held-out prompts, and some answers side
    by side.

    The judge is the scripted labeler where the prompts list facts, else the reward model.
    """
    prompts = read_prompts(files.prompts_valid)[0][: config.num_judged]
    sampler = _Sampler(config, home_run="sft")
    init = sampler.network
    reward_model = sampler.load("rm", "scalar")
    label = _labeler(config, files, prompts)
    judged: dict[str, Any] = {"judge": "labeler" if label else "reward_model"}
    scores: dict[str, list[float]] = {}
    texts: dict[str, list[str]] = {}
    for name in MODELS:
        network = sampler.load(name, "language")
        rollout, texts[name] = sampler.rollout(network, prompts)
        rewards = last_readings(rollout, sampler.read(reward_model, rollout)).tolist()
        scores[name] = label(texts[name]) if label else rewards
        log_ratio = sampler.read(network, rollout) - sampler.read(init, rollout)
        held_out = open_token_file(
            files.pretraining_valid, sampler.tokenizer, config.directory / "tokens"
        )
        judged[name] = {
            "labeler_score": sum(scores[name]) / len(prompts),
            "reward": sum(rewards) / len(prompts),
            "kl_from_init": float(log_ratio[rollout.response_mask].sum()) / len(prompts),
            "pretrain_loss": mean_language_loss(
                network,
                held_out.sequences(config.pretrain.data.pretraining_tokens),
                config.pretrain.micro_batch_tokens,
            ),
            "response_tokens": sum(rollout.response_lengths) / len(prompts),
            "eos_rate": float(rollout.has_eos.double().mean()),
        }
    for name in MODELS:
        pairs = list(zip(scores[name], scores["sft"], strict=True))
        wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
        result = win_rate(wins, len(pairs) - wins - losses, losses)
        judged[name] |= {"win_rate_vs_sft": result.rate, "win_rate_interval": result[1:]}
    samples = [
        {
            "prompt": prompt,
            "answers": {name: texts[name][i] for name in MODELS},
            "scores": {name: scores[name][i] for name in MODELS},
        }
        for i, prompt in enumerate(prompts[:8])
    ]
    return judged, samples


def _labeler(
    config: QuickstartConfig, files: Files, prompts: Sequence[str]
) -> Callable[[Sequence[str]], list[float]] | None:
    """Return the scripted labeler of answers to the prompts; None where a prompt lists no facts.

    It reads the generator's language, or with files that of their demonstrations.
    """
    language = None
    try:
        facts = [parse_prompt(prompt) for prompt in prompts]
        if config.data is not None:
            records, _ = read_demonstrations(files.demonstrations)
            language = e2e_language([(r.prompt, r.response) for r in records])
    except ValueError:
        return None
    return lambda texts: [score(f, t, language) for f, t in zip(facts, texts, strict=True)]


class _Sampler:
    """Networks of finished stages, and what they answer."""

    def __init__(self, config: QuickstartConfig, *, home_run: str) -> None:
        self.config = config
        self.parallel = start_parallel(config.layout, config.seed)
        self.tokenizer = load_tokenizer(config.directory / home_run / "tokenizer")
        self.network = self.load(home_run, "language")

    def load(self, stage: str, kind: Kind) -> Network:
        """Return the network that a stage ended with."""
        path, role = (
            self.config.directory / stage,
            "policy" if kind == "language" else "reward_model",
        )
        network = build_network(
            kind, size_of(path, role), self.parallel, numerics=self.config.numerics
        )
        load_weights(network, path, role=role)
        return network

    def rollout(self, network: Network, prompts: Sequence[str]) -> tuple[Rollout, list[str]]:
        """Return one sampled answer to each prompt, as tokens and as text."""
        config = self.config
        examples, _ = prompt_examples(
            prompts,
            self.tokenizer,
            max_prompt_length=network.size.context_length - config.ppo.sampling.max_new_tokens,
            prompt_suffix=config.ppo.data.prompt_suffix,
        )
        rollout = generate_rollout(
            network,
            examples,
            config.ppo.sampling,
            eos_id=self.tokenizer.eos_id,
            seed=config.seed + 1_000_003,  # other draws than training's
            first_sample_index=0,
        )
        bounds = rollout.cu_seqlens.tolist()
        texts = [
            self.tokenizer.decode(rollout.tokens[start + n : end].tolist())
            for start, end, n in zip(bounds[:-1], bounds[1:], rollout.prompt_lengths, strict=True)
        ]
        return rollout, texts

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """Return one sampled answer of the home network to each prompt."""
        return self.rollout(self.network, prompts)[1]

    def read(self, network: Network, rollout: Rollout) -> Tensor:
        """Return a network's output [T] for a rollout."""
        return read_rollout(network, rollout, self.config.ppo.micro_batch_tokens)


def _made_files(folder: Path) -> Files:
    return Files(**{f.name: folder / f"{f.name}.jsonl" for f in fields(Files)})


def _found_files(config: QuickstartConfig) -> Files:
    """Return the files of a data folder; raises UserError naming the first that is missing."""
    patterns = {
        "demonstrations": f"sft/{config.task}*",
        "comparisons": f"comparisons/{config.task}*",
        "prompts": f"prompts/{config.task}*",
        "pretraining": "pretrain/",
    }
    found = {}
    for name, pattern in patterns.items():
        for key, split in ((name, "train"), (f"{name}_valid", "val")):
            ending = f"{split}.jsonl*" if pattern.endswith("/") else f".{split}.jsonl*"
            matches = sorted(config.data.glob(pattern + ending)) if config.data else []
            if not matches:
                raise UserError(f"--data {config.data}: no file matches {pattern}{ending}")
            found[key] = matches[0]
    return Files(**found)


def _write_made_files(config: QuickstartConfig, files: Files) -> None:
    """Write what the quickstart makes itself, except the comparisons, which need the SFT model."""
    if files.pretraining_valid.exists():  # written last
        return
    files.prompts.parent.mkdir(parents=True, exist_ok=True)
    seed = config.seed
    for path, pairs in (
        (files.demonstrations, demonstrations("train", config.num_demonstrations, seed=seed)),
        (files.demonstrations_valid, demonstrations("valid", 200, seed=seed)),
    ):
        _write_jsonl(path, [{"prompt": p, "response": r} for p, r in pairs])
    for path, listed in (
        (files.prompts, fact_lists("prompts", config.num_prompts, seed=seed + 2)),
        (files.prompts_valid, fact_lists("valid", config.num_judged, seed=seed + 2)),
    ):
        _write_jsonl(path, [{"prompt": render_prompt(facts)} for facts in listed])
    train, valid = split_documents(python_documents())
    _write_jsonl(files.pretraining, [{"text": text} for text in train])
    _write_jsonl(files.pretraining_valid, [{"text": text} for text in valid])


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())


def _write_results(home: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with replacing(home / "summary.json") as stream:
        stream.write(json.dumps(summary, indent=1).encode())
    stages = [
        ("pretrain", "base"),
        ("sft", "sft"),
        ("rm", "rm"),
        ("ppo", "ppo"),
        ("ppo_ptx", "ppo_ptx"),
    ]
    curves = {stage: read_metrics(home / folder) for stage, folder in stages}
    write_report(home / "report.html", summary, curves, samples)
    console = Console()
    console.print(summary_table(summary))
    console.print(f"report: {home / 'report.html'}")
