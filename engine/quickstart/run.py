"""The whole recipe on a small model: pretrain, SFT, reward model, PPO and PPO-ptx, then a report.

Without files it makes its own data: the English of the installed Python, and invented places to
describe. A scripted labeler ranks what the SFT model itself wrote, as the paper's labelers did.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.claim import holding_claims
from engine.files import replacing
from engine.metrics import read_metrics
from engine.ppo import train as train_ppo
from engine.printable import open_console, say
from engine.progress import LongWork
from engine.quickstart.comparisons import write_comparisons
from engine.quickstart.files import Files, find_files, write_files, write_tokenizer
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.judge import judge_models
from engine.quickstart.report import summary_table, write_report
from engine.quickstart.settings import QuickstartConfig
from engine.quickstart.stages import ppo_stage, pretraining_stage, rm_stage, sft_stage
from engine.ranks.failure import leave_all
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rm import train as train_rm
from engine.run import claim_for_all
from engine.sft import train as train_sft
from engine.stop import leaving_at_signals


@leaving_at_signals(leave_all)
@holding_claims()
def run(config: QuickstartConfig) -> dict[str, Any]:
    """Run every stage, judge the four models on held-out prompts, write summary.json and
    report.html. UserError where another one writes into the folder."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        result = work(*arguments)
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    parallel = start_parallel(config.layout, config.seed, config.waiting)
    claim_for_all(config.directory, "data", "tokens")
    files = timed("data", prepare_files, config, parallel)
    timed("pretrain", train_sft, pretraining_stage(config, files))
    timed("sft", train_sft, sft_stage(config, files))
    finished = FinishedStages(
        config.directory, parallel, config.numerics, config.ppo, seed=config.seed
    )
    if config.data is None:
        timed("label", write_comparisons, config, files, finished)
    rm_values = timed("rm", train_rm, rm_stage(config, files))
    for name in ("ppo", "ppo_ptx"):
        timed(name, train_ppo, ppo_stage(config, files, name))
    summary, samples = timed("judge", judge_models, config, files, finished)
    summary = {
        "rm_pair_accuracy": rm_values["valid/pair_accuracy"],
        **summary,
        "seconds": seconds,
        "seed": config.seed,
    }
    if parallel.is_writer:
        with LongWork("report", is_writer=True):
            _write_results(config.directory, summary, samples)
        open_console().print(summary_table(summary))
        say(f"report: {config.directory / 'report.html'}")
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


def _write_results(home: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with replacing(home / "summary.json") as stream:
        stream.write(json.dumps(summary, indent=1).encode())
    folders = {"pretrain": "base", "sft": "sft", "rm": "rm", "ppo": "ppo", "ppo_ptx": "ppo_ptx"}
    curves = {stage: read_metrics(home / folder) for stage, folder in folders.items()}
    write_report(home / "report.html", summary, curves, samples)
