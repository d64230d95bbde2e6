"""A square shows, what grows as it should passes, and ranks send what their formulas say."""

import dataclasses
import json
import sys
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling import __main__ as command
from benchmarks.scaling import host, one_rank, rank, ranks
from benchmarks.scaling.curve import (
    SECONDS,
    Curve,
    Question,
    constant,
    cpu_seconds,
    exponent_of,
    linear,
    logarithmic,
)
from benchmarks.scaling.traffic import Traffic
from engine.ranks.start import start_parallel
from tests.ranks import run_ranks

SIZES = (100, 200, 400, 800)
QUESTIONS = [
    pytest.param(module, asked, id=f"{asked.what}, {asked.variable}")
    for module in (host, one_rank)
    for asked in module.questions()
]


def question(measure, expected=linear, **changes) -> Question:
    fields = {"what": "work", "variable": "n", "sizes": SIZES, "formula": "n", "unit": "bytes"}
    return Question(**fields | {"measure": measure, "expected": expected} | changes)


@pytest.mark.parametrize(
    ("cost", "expected", "passes"),
    [
        (lambda n: 3.0 * n, linear, True),
        (lambda n: 500.0 + n, linear, True),  # fixed costs make it flatter
        (lambda n: 2.0 * n**2, linear, False),
        (lambda n: n + n**2 / 400, linear, False),  # a square that is two thirds at the end
        (logarithmic, logarithmic, True),
        (linear, constant, False),
        (lambda n: 7.0, constant, True),
    ],
)
def test_what_grows_faster_than_the_formula_is_found(cost, expected, passes):
    assert question(cost, expected).ask().is_as_expected is passes


def test_exponent_is_the_slope_in_log_log():
    assert exponent_of((1, 2, 4, 8), (5.0, 20.0, 80.0, 320.0)) == pytest.approx(2)
    curve = question(lambda n: 1.0 if n < 800 else 2.0).ask()
    assert curve.last_slope == pytest.approx(1)
    assert curve.exponent < 0.5
    with pytest.raises(ValueError, match="no slope"):
        exponent_of((1, 2), (0.0, 1.0))


def test_a_count_above_its_own_formula_is_found_though_it_grows_alike():
    curve = question(lambda n: 1.2 * n).ask()
    assert curve.is_as_expected
    assert not dataclasses.replace(curve, is_absolute=True).is_as_expected


def test_a_real_loop_over_pairs_is_found():
    def pairs(n: int) -> float:
        return cpu_seconds(lambda: [i for i in range(n) for _ in range(n)], enough=0.0)

    curve = question(pairs, unit=SECONDS).ask()
    assert curve.exponent == pytest.approx(2, abs=0.6)  # others use the caches too
    assert not curve.is_as_expected


def test_seconds_that_were_disturbed_are_measured_again():
    seen: list[int] = []

    def disturbed(n: int) -> float:
        seen.append(n)
        return n * (10.0 if len(seen) == len(SIZES) else 1.0)

    assert question(disturbed, unit=SECONDS).ask().costs == tuple(map(float, SIZES))
    assert len(seen) == 2 * len(SIZES)


def test_waiting_is_no_cpu_time():
    assert cpu_seconds(lambda: time.sleep(0.05), num_runs=2, enough=0.0) < 0.03


@pytest.mark.parametrize(("module", "asked"), QUESTIONS)
def test_every_question_has_an_answer_at_its_smallest_size(module, asked, monkeypatch):
    def once(call) -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    monkeypatch.setattr(module, "cpu_seconds", once)
    sizes = asked.quick_sizes or asked.sizes
    assert asked.measure(sizes[0]) > 0
    for chosen in (asked.sizes, sizes):
        assert len(chosen) >= 4
        assert list(chosen) == sorted(set(chosen))
        assert asked.expected(chosen[-1]) >= asked.expected(chosen[0]) > 0


def test_memory_does_not_grow_with_the_number_of_micro_batches():
    flat, whole = (q for q in one_rank.questions() if q.unit == "peak bytes")
    asked = {"sizes": (512, 1024), "quick_sizes": ()}
    assert dataclasses.replace(flat, **asked).ask().exponent == pytest.approx(0, abs=0.05)
    # Small as these are, what does not grow has its share.
    assert dataclasses.replace(whole, **asked).ask().exponent == pytest.approx(1, abs=0.15)


def counted_by_ranks() -> list[tuple[float, int, int]]:
    """What each of a few calls of two ranks counts: bytes, calls, calls of one rank."""
    mine = dist.get_rank()
    alone = [dist.new_group([n]) for n in range(2)][mine]
    eight = torch.ones(8)  # 32 bytes

    def backward() -> None:
        doubled = eight.clone().requires_grad_() * 2
        doubled.register_hook(lambda gradient: dist.all_reduce(gradient.clone()))
        doubled.sum().backward()

    calls = [
        lambda: dist.all_reduce(eight),
        lambda: dist.all_gather_into_tensor(torch.empty(16), eight),
        lambda: dist.reduce_scatter_tensor(torch.empty(4), eight),
        lambda: dist.broadcast(eight, src=0),
        backward,
        lambda: dist.send(eight, dst=1) if mine == 0 else dist.recv(eight, src=0),
        lambda: dist.all_reduce(eight, group=alone),
    ]
    found = []
    for call in calls:
        with Traffic() as traffic:
            call()
        found.append((traffic.num_bytes, traffic.num_calls, traffic.num_alone))
    return found


def means_of_ranks(num_sequences: int) -> dict[str, dict]:
    return {
        kind: rank.measure(start_parallel(layout, seed=0), num_sequences)
        for kind, layout in rank.layouts(dist.get_world_size()).items()
    }


def both_of_ranks(num_sequences: int) -> tuple[list[tuple[float, int, int]], dict[str, dict]]:
    return counted_by_ranks(), means_of_ranks(num_sequences)


def test_two_ranks_send_what_the_formulas_say():
    (first, means), (second, others) = run_ranks(both_of_ranks, 2, 8)
    # Each sends the least that its collective needs; a message counts at its sender.
    shared = [(32, 1, 0), (32, 1, 0), (16, 1, 0), (16, 1, 0), (32, 1, 0)]
    assert first == [*shared, (32, 1, 0), (0, 0, 1)]
    assert second == [*shared, (0, 0, 0), (0, 0, 1)]
    assert means == others
    for kind, jobs in means.items():
        for job, found in jobs.items():
            expected = ranks.bytes_of(kind, job, 2, 8)
            assert found["bytes"] == pytest.approx(expected, rel=0.05), (kind, job)
            assert found["calls"] > 0


def test_an_operation_that_nobody_has_counted_yet_is_an_error():
    with pytest.raises(RuntimeError, match="what does a rank send"):
        Traffic()._count("a_new_collective", ())


def test_command_ends_with_status_1_and_has_records_and_plots(tmp_path, monkeypatch, capsys):
    curves = [question(linear).ask(), question(lambda n: n**2.0, what="pairs").ask()]
    monkeypatch.setattr(command, "curves_of", lambda section, is_quick: iter(curves))
    monkeypatch.setattr(sys, "argv", ["scaling", "--only", "host", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="pairs: bytes ~ n\\^2.00, expected 1.00: TOO FAST"):
        command.main()
    assert "as expected" in capsys.readouterr().out
    first, second = map(json.loads, (tmp_path / "cpu.jsonl").read_text().splitlines())
    assert (first["exponent"], first["is_as_expected"]) == (pytest.approx(1), True)
    assert (second["exponent"], second["is_as_expected"]) == (pytest.approx(2), False)
    assert (tmp_path / "cpu" / "scaling_host.png").stat().st_size > 10_000


@pytest.mark.slow
def test_no_section_has_a_count_that_grows_too_fast():
    curves: list[Curve] = list(ranks.curves((2, 4)))
    assert len(curves) == 12 + 12
    assert [curve for curve in curves if not curve.is_as_expected] == []
    strong = next(c for c in curves if c.what == "training step, dp, strong scaling")
    assert strong.expected_exponent == pytest.approx(0.585, abs=0.01)  # (n - 1) / n
