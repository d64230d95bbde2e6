"""The whole recipe on a small model: pretrain, SFT, reward model, PPO and PPO-ptx, then a report.

Without files it makes its own data: the English of the installed Python, and invented places to
describe. A scripted labeler ranks what the SFT model itself wrote, as the paper's labelers did.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.claim import holding_claims
from engine.errors import UserError
from engine.files import read_object, replacing
from engine.metrics import read_metrics
from engine.ppo import train as train_ppo
from engine.printable import open_console, say
from engine.progress import LongWork
from engine.quickstart.begun import FOLDERS, Begun, begin
from engine.quickstart.comparisons import write_comparisons
from engine.quickstart.files import (
    Files,
    find_files,
    split_own_files,
    write_files,
    write_tokenizer,
)
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.judge import judge_models
from engine.quickstart.report import summary_table, write_report
from engine.quickstart.settings import QuickstartConfig
from engine.quickstart.stages import ppo_stage, pretraining_stage, rm_stage, sft_stage
from engine.ranks.failure import leave_all
from engine.ranks.first_rank import said_by_first_rank
from engine.ranks.parallel import Parallel
from engine.ranks.start import start_parallel
from engine.rm import train as train_rm
from engine.run import claim_for_all
from engine.sft import train as train_sft
from engine.stop import leaving_at_signals

_RESULTS = ("summary.json", "report.html")


@leaving_at_signals(leave_all)
@holding_claims()
def run(config: QuickstartConfig) -> dict[str, Any]:
    """Run every stage, judge the four models on held-out prompts, write summary.json and
    report.html; what an earlier start has finished is kept. UserError where another one writes
    into the folder, or it is of other settings or files."""
    parallel = start_parallel(config.layout, config.seed, config.waiting, config)
    claim_for_all(config.directory, "data", "tokens")
    find_files(config)  # before anything is written
    begun = begin(config, is_writer=parallel.is_writer)
    if "data" in begun.finished:  # but for files that somebody has removed
        files = prepare_files(config, parallel)
    else:
        files = begun.run("data", prepare_files, config, parallel)
    begun.check_files(files)

    def do(stage: str, work: Callable[..., Any], settings: Callable[[], Any]) -> None:
        if stage not in begun.finished:
            with _naming_the_options_of(stage):
                begun.run(stage, work, settings())

    do("pretrain", train_sft, lambda: pretraining_stage(config, files))
    do("sft", train_sft, lambda: sft_stage(config, files))
    finished = FinishedStages(
        config.directory, parallel, config.numerics, config.ppo, seed=config.seed
    )
    if config.data is None and not ("label" in begun.finished and files.has_comparisons()):
        begun.run("label", write_comparisons, config, files, finished)
        begun.check_files(files)
    do("rm", train_rm, lambda: rm_stage(config, files))
    for name in ("ppo", "ppo_ptx"):
        do(name, train_ppo, lambda name=name: ppo_stage(config, files, name))  # type: ignore[misc]
    return _results(config, files, finished, begun)


@contextlib.contextmanager
def _naming_the_options_of(stage: str) -> Iterator[None]:
    """Have a stage's error that names options say how the quickstart spells them."""
    prefix = "ppo" if stage == "ppo_ptx" else stage
    try:
        yield
    except UserError as error:
        if "--" not in str(error):
            raise
        raise UserError(
            f"{error}\n({stage}: those of its options that the quickstart does not have itself "
            f"begin with --{prefix}. here)"
        ) from None


def _results(
    config: QuickstartConfig, files: Files, finished: FinishedStages, begun: Begun
) -> dict[str, Any]:
    """Judge the models, unless that is done, and return and print the summary."""
    home, is_writer = config.directory, finished.parallel.is_writer
    if "judge" in begun.finished and said_by_first_rank(
        lambda: "there" if begun.has_results(_RESULTS) else ""
    ):
        said = said_by_first_rank(lambda: json.dumps(read_object(home / _RESULTS[0])))
        summary = json.loads(said)
    else:
        judged, samples = begun.run("judge", judge_models, config, files, finished)
        accuracy = json.loads(said_by_first_rank(lambda: json.dumps(_pair_accuracy(home / "rm"))))
        summary = {
            "rm_pair_accuracy": accuracy,
            **judged,
            "seconds": begun.seconds,
            "seed": config.seed,
        }
        if is_writer:
            with LongWork("report", is_writer=True):
                _write_results(home, summary, samples)
            begun.keep_results(_RESULTS)
    if is_writer:
        open_console().print(summary_table(summary))
        if summary.get("judge") == "reward_model":
            say("no independent judge: the reward is of the model that PPO was trained on")
        say(f"report: {home / 'report.html'}")
        say(f"to ask it: python recipes/generate.py --source {home / 'ppo_ptx'}")
    return summary


def _pair_accuracy(folder: Path) -> float | None:
    """Return the last share of held-out pairs that a reward model's run had right, None where its
    metrics do not say."""
    found = [row.get("valid/pair_accuracy") for row in _rows(folder)]
    return next((value for value in reversed(found) if value is not None), None)


def _rows(folder: Path) -> list[dict[str, float]]:
    """Return the metrics of a finished stage, none where somebody has removed them."""
    return read_metrics(folder) if (folder / "metrics.jsonl").exists() else []


def prepare_files(config: QuickstartConfig, parallel: Parallel) -> Files:
    """Return the files, made where they are not given, with a tokenizer of their training text;
    one rank writes and all wait."""
    files = find_files(config)
    with LongWork("data: files and a tokenizer", is_writer=parallel.is_writer):
        if parallel.is_writer:
            if config.data is None:
                write_files(config, files)
            split_own_files(config, files)
            write_tokenizer(config, files, config.directory / "tokenizer.model")
        dist.barrier()
    return files


def _write_results(home: Path, summary: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    with replacing(home / _RESULTS[0]) as stream:
        stream.write(json.dumps(summary, indent=1).encode())
    curves = {stage: _rows(home / folder) for stage, folder in FOLDERS.items()}
    write_report(home / _RESULTS[1], summary, curves, samples)
