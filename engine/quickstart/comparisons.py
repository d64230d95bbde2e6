"""Comparisons for the reward model: what the SFT model wrote, ranked by the scripted labeler."""

import itertools

import torch.distributed as dist

from engine.data.records import write_jsonl
from engine.progress import LongWork
from engine.quickstart.files import Files
from engine.quickstart.finished_stages import FinishedStages
from engine.quickstart.labeler import rank
from engine.quickstart.places import fact_lists, render_facts
from engine.quickstart.settings import QuickstartConfig


def write_comparisons(config: QuickstartConfig, files: Files, finished: FinishedStages) -> None:
    """Sample K = 4 to 9 completions a prompt from the SFT model and let the scripted labeler rank
    them.

    Prompts whose completions all tie say nothing and are left out, as a labeler's ties are.
    """
    if files.has_comparisons():
        return
    facts = fact_lists("prompts", config.num_compared, seed=config.seed + 1)
    num_completions = [4 + i % 6 for i in range(len(facts))]  # K, paper C.2
    repeated = [
        render_facts(f) for f, k in zip(facts, num_completions, strict=True) for _ in range(k)
    ]
    is_writer, replicas = finished.parallel.is_writer, finished.parallel.num_replicas
    # Replicas share the prompts, and the one that speaks counts its own.
    title, mine = f"label: {len(repeated)} answers of SFT", len(repeated) // replicas
    with LongWork(title, is_writer=is_writer, total=mine) as work:
        policy = finished.load("sft", "language")
        answers = iter(finished.answer(policy, finished.prompts(repeated), work.advance)[1])
    rows = []
    with LongWork("label: rank them", is_writer=is_writer, total=len(facts)) as work:
        for listed, k in zip(facts, num_completions, strict=True):
            # An empty completion is no text to compare; the reader of comparisons would refuse it.
            completions = [text for text in itertools.islice(answers, k) if text.strip()]
            ranks = rank(listed, completions, faults_per_level=config.faults_per_level)
            if len(set(ranks)) > 1:
                rows.append(
                    {"prompt": render_facts(listed), "completions": completions, "ranks": ranks}
                )
            work.advance()
    if finished.parallel.is_writer:
        num_valid = len(rows) // 10
        write_jsonl(files.comparisons_valid, rows[:num_valid])
        write_jsonl(files.comparisons, rows[num_valid:])
    dist.barrier()
