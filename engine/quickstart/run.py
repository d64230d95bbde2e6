"""The whole recipe on a small model: pretrain, SFT, reward model, PPO and PPO-ptx, then a report.

Without files it makes its own data: the English of the installed Python, invented places to
describe, and a scripted labeler that ranks what the SFT model itself wrote, as the paper's labelers
did.
"""

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from engine.data.demonstrations import read_demonstrations
from engine.data.jsonl import write_jsonl
from engine.data.pretraining import open_token_file
from engine.data.tokenizer import load_tokenizer
from engine.files import replacing
from engine.metrics import read_metrics
from engine.ppo import train as train_ppo
from engine.progress import LongWork
from engine.quickstart.files import Files, find_files, write_files, write_tokenizer
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.judge import judge_models
from engine.quickstart.labeler import rank
from engine.quickstart.places import fact_lists, render_prompt
from engine.quickstart.report import summary_table, write_report
from engine.quickstart.settings import QuickstartConfig
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rm import train as train_rm
from engine.sft import train as train_sft


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

    parallel = start_parallel(config.layout, config.seed)
    files = timed("data", prepare_files, config, parallel)
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
    sampler = FinishedStages(home, parallel, config.numerics, config.ppo, seed=config.seed)
    if config.data is None:
        timed("label", write_comparisons, config, files, sampler)
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
    summary, samples = timed("judge", judge_models, config, files, sampler)
    summary = {
        "rm_pair_accuracy": rm_values["valid/pair_accuracy"],
        **summary,
        "seconds": seconds,
        "seed": config.seed,
    }
    if parallel.is_writer:
        with LongWork("report", is_writer=True):
            _write_results(home, summary, samples)
        console = Console()
        console.print(summary_table(summary))
        console.print(f"report: {home / 'report.html'}")
    return summary


def prepare_files(config: QuickstartConfig, parallel: Parallel) -> Files:
    """Return the files, made where they are not given, with a tokenizer of their training text;
    one rank writes and all wait."""
    files = find_files(config)
    with LongWork("data: files and a tokenizer", is_writer=parallel.is_writer):
        if parallel.is_writer:
            if config.data is None:
                write_files(config, files)
            write_tokenizer(config, files, config.directory / "tokenizer.model")
        dist.barrier()
    return files


def write_comparisons(config: QuickstartConfig, files: Files, sampler: FinishedStages) -> None:
    """Sample K = 4 to 9 completions a prompt from the SFT model and let the scripted labeler rank
    them.

    Prompts whose completions all tie say nothing and are left out, as a labeler's ties are.
    """
    if files.comparisons.exists():
        return
    facts = fact_lists("prompts", config.num_compared, seed=config.seed + 1)
    num_completions = [4 + i % 6 for i in range(len(facts))]  # K, paper C.2
    repeated = [
        render_prompt(f) for f, k in zip(facts, num_completions, strict=True) for _ in range(k)
    ]
    is_writer, replicas = sampler.parallel.is_writer, sampler.parallel.num_replicas
    # Replicas share the prompts, and the one that speaks counts its own.
    title, mine = f"label: {len(repeated)} answers of SFT", len(repeated) // replicas
    with LongWork(title, is_writer=is_writer, total=mine) as work:
        policy = sampler.load("sft", "language")
        answers = iter(sampler.answer(policy, repeated, work.advance)[1])
    rows = []
    with LongWork("label: rank them", is_writer=is_writer, total=len(facts)) as work:
        for listed, k in zip(facts, num_completions, strict=True):
            # An empty completion is no text to compare; the reader of comparisons would refuse it.
            completions = [text for text in itertools.islice(answers, k) if text.strip()]
            ranks = rank(listed, completions, faults_per_level=config.faults_per_level)
            if len(set(ranks)) > 1:
                rows.append(
                    {"prompt": render_prompt(listed), "completions": completions, "ranks": ranks}
                )
            work.advance()
    if sampler.parallel.is_writer:
        num_valid = len(rows) // 10
        write_jsonl(files.comparisons_valid, rows[:num_valid])
        write_jsonl(files.comparisons, rows[num_valid:])
    dist.barrier()


def _write_results(home: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with replacing(home / "summary.json") as stream:
        stream.write(json.dumps(summary, indent=1).encode())
    folders = {"pretrain": "base", "sft": "sft", "rm": "rm", "ppo": "ppo", "ppo_ptx": "ppo_ptx"}
    curves = {stage: read_metrics(home / folder) for stage, folder in folders.items()}
    write_report(home / "report.html", summary, curves, samples)
