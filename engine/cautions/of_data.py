"""What is amiss with the data that a run reads: how much, how often, what is left of it.

Pure functions of numbers, as engine/cautions/of_settings.py. Thresholds are our choice unless a
source is named.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from engine.alarms import Alarm
from engine.data.examples import LengthReport
from engine.data.limits import Limits
from engine.data.records import ReadReport

_MOST_DROPPED = 0.2  # share of the examples that too short a limit, or bad lines, may take
_MOST_LEFT_OUT = 0.5  # share that a data set's own ties and the like may take
# Times that one thing is read, by what it is.
_MOST_READINGS = {
    "demonstrations": (20.0, "the paper reads them 16 times (C.1)"),
    "comparisons": (4.0, "the paper reads them once, and more overfits fast (C.2)"),
    "prompts": (20.0, "the paper's 256k episodes answer each of 31k prompts 8 times (C.4, A.3)"),
    "pretraining sequences": (16.0, "little is gained from there on (Muennighoff et al. 2023)"),
}
_FEW = 100  # examples, of which a model learns little but these
_PAPER = {"demonstrations": "13k", "comparisons": "33k"}  # prompts of each (A.3, Table 6)
_MANY, _LONG = 10, 16  # so many responses of so many tokens are not of one length by chance
_MOST_CUT = 0.5  # share of the responses that may have exactly the longest one's tokens
_END_MARKS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>")


class Reading(NamedTuple):
    """How often a run reads what it trains on."""

    num_different: int
    """Different ones that there are."""
    batch_size: int
    """Those that a step is asked to take."""
    num_taken: float
    """Those that the whole run takes, counted again each time."""
    remedy: str
    """What makes it fewer."""


def held_out_cautions(
    what: str, num_kept: int, num_dropped: int, *, path: object, fraction: float, num_all: int
) -> list[Alarm]:
    """Return what is amiss with a held-out part that has no example left.

    num_kept, num_dropped: held-out examples, and those that were too long. path: the file that was
    given, None where `fraction` of num_all records is held out.
    """
    if num_kept:
        return []
    if num_dropped:
        where = (
            f"--data.valid {path}" if path is not None else f"--data.valid-fraction {fraction:g}"
        )
        problem = f"all {num_dropped} held-out {what} are too long ({where})"
    else:
        problem = f"no {what} are held out (--data.valid-fraction {fraction:g} of {num_all})"
    return [
        Alarm(
            "held_out",
            f"{problem}: there will be no valid/ metric, and nothing tells learning from learning "
            "by heart; give --data.valid, or raise --data.valid-fraction",
        )
    ]


def no_held_out_text() -> list[Alarm]:
    """Return the caution of a run on text alone that holds out none."""
    return [
        Alarm(
            "held_out",
            "no pretraining text is held out: there will be no valid/ metric; give "
            "--data.pretraining-valid",
        )
    ]


def overlap_cautions(what: str, held_out: Sequence[str], trained: Collection[str]) -> list[Alarm]:
    """Return whether held-out prompts are trained on too; the held-out numbers are then too
    good."""
    seen = set(trained)
    num_seen = sum(prompt in seen for prompt in held_out)
    if not num_seen:
        return []
    return [
        Alarm(
            "overlap",
            f"{num_seen} of {len(held_out)} held-out {what} have a prompt that is trained on too: "
            "valid/ metrics are better than they should be; take them out of one of the files",
        )
    ]


def reading_cautions(
    what: str, report: ReadReport, lengths: LengthReport, limits: Limits
) -> list[Alarm]:
    """Return whether many of a file's lines or examples are left out, and why."""
    found = []
    num_lines = report.num_read + report.num_bad
    if report.num_bad > _MOST_DROPPED * num_lines:
        found.append(
            Alarm(
                "bad_lines",
                f"{report.num_bad} of {num_lines} lines of {what} "
                f"({report.num_bad / num_lines:.0%}) are bad and skipped, the first: "
                f"{report.first_errors[0]}; correct the file",
            )
        )
    num_left_out = sum(report.left_out.values())
    if num_left_out > _MOST_LEFT_OUT * (num_lines + num_left_out):
        reasons = ", ".join(f"{number} {why}" for why, number in report.left_out.items())
        found.append(
            Alarm(
                "left_out",
                f"{what}: {num_left_out} beside {report.num_read} that are read are left out: "
                f"{reasons}; is the file meant for this stage?",
            )
        )
    num_all = len(lengths.kept) + lengths.num_dropped
    if lengths.num_cut > _MOST_DROPPED * num_all:
        found.append(
            Alarm(
                "cut",
                f"{lengths.num_cut} of {num_all} {what} ({lengths.num_cut / num_all:.0%}) are too "
                f"long and cut to {limits}; raise what limits them",
            )
        )
    if lengths.num_dropped > _MOST_DROPPED * num_all:
        remedy = "" if lengths.num_cut else ", or cut them by --data.too-long"
        found.append(
            Alarm(
                "dropped",
                f"{lengths.num_dropped} of {num_all} {what} ({lengths.num_dropped / num_all:.0%}) "
                f"are too long and dropped: {limits.dropped(lengths)}; raise what limits "
                f"them{remedy}",
            )
        )
    return found


def repetition_cautions(readings: Mapping[str, Reading]) -> list[Alarm]:
    """Return what is read very often, is fewer than a batch, or few; keys are those of
    _MOST_READINGS."""
    found = []
    for what, reading in readings.items():
        times, (most, source) = reading.num_taken / reading.num_different, _MOST_READINGS[what]
        if times > most:
            found.append(
                Alarm(
                    "repeated",
                    f"each of {reading.num_different} {what} is read {times:.3g} times: they are "
                    f"learned by heart; {source}. {reading.remedy}, or give more of them",
                )
            )
        if reading.num_different < reading.batch_size:
            found.append(
                Alarm(
                    "small_data",
                    f"{reading.num_different} {what} are fewer than a batch of "
                    f"{reading.batch_size}: each step takes all of them once; lower it, or "
                    "give more",
                )
            )
        elif what in _PAPER and reading.num_different < _FEW:
            found.append(
                Alarm(
                    "small_data",
                    f"{reading.num_different} {what} are few: a model learns little but these; "
                    f"the paper has those of {_PAPER[what]} prompts (A.3); give more",
                )
            )
    return found


def response_cautions(what: str, texts: Sequence[str], lengths: Sequence[int]) -> list[Alarm]:
    """Return whether responses look cut, or spell out an end that is added anyway.

    texts: the responses; lengths: the tokens of those that are trained on.
    """
    found = []
    longest = max(lengths, default=0)
    num_longest = lengths.count(longest)
    is_long = len(lengths) >= _MANY and longest >= _LONG
    if is_long and num_longest > _MOST_CUT * len(lengths):
        found.append(
            Alarm(
                "equal_lengths",
                f"{num_longest} of {len(lengths)} {what} have exactly {longest} tokens, the "
                "most of all: were they cut? The model learns to end there; give whole texts",
            )
        )
    marked = [text.rstrip() for text in texts if text.rstrip().endswith(_END_MARKS)]
    if marked:
        mark = next(mark for mark in _END_MARKS if marked[0].endswith(mark))
        found.append(
            Alarm(
                "end_marks",
                f"{len(marked)} of {len(texts)} {what} end with an end of text that is spelled out "
                f"({mark}): it is read as words, and the end is added anyway; take it out",
            )
        )
    return found


def twin_cautions(rankings: Sequence[tuple[Sequence[str], Sequence[int]]]) -> list[Alarm]:
    """Return how many comparisons rank one text above itself; `rankings`: completions, ranks."""
    num_twins = sum(
        len(set(zip(texts, ranks, strict=True))) > len(set(texts)) for texts, ranks in rankings
    )
    if not num_twins:
        return []
    return [
        Alarm(
            "twins",
            f"{num_twins} of {len(rankings)} comparisons ({num_twins / len(rankings):.0%}) rank "
            "one text above itself, which no score can: give equal completions equal ranks",
        )
    ]
