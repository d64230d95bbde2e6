"""What is asked of the host alone, where no matrix product hides a square: files, order, packing,
scheduling."""

import itertools
import json
import random
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.scaling.curve import Question, cpu_seconds, linear, logarithmic
from engine.data.batches import Cut, EpochOrder, micro_batches
from engine.data.comparisons import comparison_examples, read_comparisons
from engine.data.demonstrations import demonstration_examples, read_demonstrations
from engine.data.examples import Example
from engine.data.pretraining import open_token_file
from engine.data.prompts import prompt_examples, read_prompts, split_by_prompt
from engine.data.tokenizer import Tokenizer, train_sentencepiece
from engine.generation.block_manager import BlockManager
from engine.generation.scheduler import Counts, Scheduler
from engine.generation.sequence import LiveSequence
from engine.quickstart.labeler import places_language, score
from engine.quickstart.places import fact_lists

TEXT = "the mill is a cheap pub near the river and serves fish to no families at night"
WORDS = TEXT.split()
LINES = (2048, 4096, 8192, 16384)
QUICK_LINES = (512, 1024, 2048, 4096)


def questions() -> list[Question]:
    """Return all of them."""
    sizes = {"sizes": LINES, "quick_sizes": QUICK_LINES}
    line: dict = {"formula": "n", "expected": linear, **sizes}
    sort: dict = {"formula": "n log n", "expected": logarithmic, **sizes}
    return [
        Question(
            what="demonstrations read and tokenised",
            variable="lines",
            measure=_demonstrations_seconds,
            **line,
        ),
        Question(
            what="comparisons of 4 read and tokenised",
            variable="lines",
            measure=_comparisons_seconds,
            **line,
        ),
        Question(
            what="prompts read, tokenised and held out",
            variable="lines",
            measure=_prompts_seconds,
            **line,
        ),
        Question(
            what="pretraining text tokenised",
            variable="documents",
            measure=_text_seconds,
            **line,
        ),
        Question(
            what="order of an epoch, batches of 64",
            variable="examples",
            measure=_order_seconds,
            **line,
        ),
        Question(
            what="a batch dealt to 8 ranks and packed",
            variable="examples",
            measure=_packing_seconds,
            **sort,
        ),
        Question(
            what="answers judged by the labeler, two sentences each",
            variable="answers",
            sizes=(128, 256, 512, 1024),
            quick_sizes=(64, 128, 256, 512),
            formula="n",
            expected=linear,
            measure=lambda n: _labeling_seconds(n, 2),
        ),
        Question(
            what="one answer judged by the labeler",
            variable="sentences",
            sizes=(64, 128, 256, 512),
            formula="n",
            expected=linear,
            measure=lambda n: _labeling_seconds(1, n),
        ),
        Question(
            what="scheduling of a rollout, 16 + 16 tokens, a slot a sequence",
            variable="sequences",
            sizes=(512, 1024, 2048, 4096),
            quick_sizes=(256, 512, 1024, 2048),
            formula="n",
            expected=linear,
            measure=lambda n: _scheduling_seconds(n, n, 16),
        ),
        Question(
            what="scheduling of a rollout, 16 + 16 tokens, 64 slots",
            variable="sequences",
            sizes=(512, 1024, 2048, 4096),
            quick_sizes=(256, 512, 1024, 2048),
            formula="n",
            expected=linear,
            measure=lambda n: _scheduling_seconds(n, 64, 16),
        ),
        Question(
            what="scheduling of a rollout, 64 sequences",
            variable="response tokens",
            sizes=(256, 512, 1024, 2048),
            quick_sizes=(128, 256, 512, 1024),
            formula="n",
            expected=linear,
            measure=lambda n: _scheduling_seconds(64, 64, n),
        ),
    ]


def _demonstrations_seconds(num_lines: int) -> float:
    def read(path: Path, tokenizer: Tokenizer) -> None:
        records, _ = read_demonstrations(path)
        demonstration_examples(records, tokenizer, max_length=512)

    return _reading_seconds(num_lines, {"prompt": 1, "response": 1}, read)


def _comparisons_seconds(num_lines: int) -> float:
    def read(path: Path, tokenizer: Tokenizer) -> None:
        records, _ = read_comparisons(path)
        comparison_examples(records, tokenizer, max_length=512)

    return _reading_seconds(num_lines, {"prompt": 1, "completions": 4}, read)


def _prompts_seconds(num_lines: int) -> float:
    def read(path: Path, tokenizer: Tokenizer) -> None:
        prompts, _ = read_prompts(path)
        split_by_prompt([prompt.text for prompt in prompts], 0.1, 0)
        prompt_examples(prompts, tokenizer, max_prompt_length=512)

    return _reading_seconds(num_lines, {"prompt": 1}, read)


def _text_seconds(num_lines: int) -> float:
    def read(path: Path, tokenizer: Tokenizer) -> None:
        with tempfile.TemporaryDirectory() as cache:
            open_token_file(path, tokenizer, cache)

    return _reading_seconds(num_lines, {"text": 1}, read)


def _reading_seconds(
    num_lines: int, fields: dict[str, int], read: Callable[[Path, Tokenizer], None]
) -> float:
    """Return what it takes to read a file whose lines have these fields, lists of several texts."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=12))

    def line() -> str:
        record: dict = {
            name: text() if count == 1 else [text() for _ in range(count)]
            for name, count in fields.items()
        }
        if "completions" in record:
            record["ranks"] = list(range(1, fields["completions"] + 1))
        return json.dumps(record) + "\n"

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_sentencepiece([TEXT], folder / "model", vocab_size=300)
        path = folder / "records.jsonl"
        path.write_text("".join(line() for _ in range(num_lines)))
        return cpu_seconds(lambda: read(path, tokenizer))


def _order_seconds(num_examples: int) -> float:
    seeds = itertools.count()

    def epoch() -> None:
        order = EpochOrder(num_examples, 64, seed=next(seeds))  # no permutation is known yet
        for step in range(order.steps_per_epoch):
            order.indices(step)

    return cpu_seconds(epoch)


def _packing_seconds(num_examples: int) -> float:
    rng = np.random.default_rng(0)
    examples = [
        Example(tokens=np.zeros(length, dtype=np.int64), prompt_length=1)
        for length in rng.integers(2, 512, num_examples)
    ]
    return cpu_seconds(lambda: micro_batches(examples, Cut(dp=8), 4096))


def _labeling_seconds(num_answers: int, num_sentences: int) -> float:
    facts = fact_lists("train", 1)[0]
    sentence = "The Mill is a cheap pub near the river and serves fish. "
    answers = [sentence * num_sentences] * num_answers
    language = places_language()
    return cpu_seconds(lambda: [score(facts, answer, language) for answer in answers])


def _scheduling_seconds(num_sequences: int, num_slots: int, response_tokens: int) -> float:
    """Return what the scheduler takes for a rollout whose tokens cost nothing."""
    prompts = np.random.default_rng(0).integers(0, 1000, (num_sequences, 16)).tolist()
    num_blocks = num_slots * -(-(16 + response_tokens) // 16)

    def schedule() -> None:
        scheduler = Scheduler(
            waiting=deque(
                LiveSequence(
                    sample_index=index,
                    tokens=list(prompt),
                    prompt_length=16,
                    max_length=16 + response_tokens,
                )
                for index, prompt in enumerate(prompts)
            ),
            blocks=BlockManager(num_blocks, 16),
            slots_per_cohort=num_slots,
            prefill_tokens=16 * num_slots,  # all that come in come at once: the slots are full
            steps_per_sync=1,
            stop_ids=frozenset(),
            num_cohorts=1,
            counts=Counts(),
        )
        while scheduler.has_work:
            step = scheduler.next_step(0)
            assert step is not None
            scheduler.finish_step(0, step, [([7], [0.0])] * len(step.sampled))

    return cpu_seconds(schedule)
