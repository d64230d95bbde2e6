"""Planted faults, each named with its node."""

import dataclasses
from pathlib import Path

import pytest

from engine.preflight.facts import Facts
from engine.preflight.faults import find_faults, report
from engine.settings.preflight import PreflightConfig

CONFIG = PreflightConfig(
    directory=Path("runs"), min_free_gib=10.0, min_disk_gib=100.0, min_link_gb_s=5.0, timeout_s=9.0
)


def healthy() -> list[Facts]:
    """Eight ranks, two a node."""
    return [
        Facts(
            rank=rank,
            node=f"node{rank // 2}",
            versions={"code": "aaa", "torch": "2.13"},
            free_gib=70.0,
            disk_gib=500.0,
            clock=1000.0,
            gb_s={"node": 200.0 + rank, "link": 20.0 - rank / 10, "all": 15.0},
        )
        for rank in range(8)
    ]


def planted(*ranks: int, **changes: object) -> list[Facts]:
    facts = healthy()
    for rank in ranks:
        facts[rank] = dataclasses.replace(facts[rank], **changes)
    return facts


def test_healthy_nodes_have_no_fault():
    assert find_faults(healthy(), CONFIG) == []


@pytest.mark.parametrize(
    ("facts", "node", "message"),
    [
        (
            planted(4, 5, versions={"code": "bbb", "torch": "2.13"}),
            "node2",
            "code is bbb, elsewhere aaa (ranks 4, 5)",
        ),
        (
            planted(7, versions={"code": "aaa", "torch": "2.12"}),
            "node3",
            "torch is 2.12, elsewhere 2.13 (rank 7)",
        ),
        (
            planted(6, versions={"code": "aaa"}),
            "node3",
            "torch is none, elsewhere 2.13 (rank 6)",
        ),
        (planted(3, free_gib=2.5), "node1", "2.5 GiB of memory free, under 10 (rank 3)"),
        (planted(2, 3, disk_gib=1.0), "node1", "runs has less than 100 GiB free (ranks 2, 3)"),
        (
            planted(0, disk_gib=0.0, disk_error="cannot be written: no"),
            "node0",
            "runs: cannot be written: no (rank 0)",
        ),
        (planted(4, clock=990.0), "node2", "clock off by -10.0 s (rank 4)"),
        (
            planted(5, gb_s={"node": 210.0, "link": 4.0, "all": 4.0}),
            "node2",
            "links to both neighbours: 4 GB/s, under 5 (rank 5)",
        ),
        (
            planted(5, gb_s={"node": 210.0, "link": 8.0, "all": 8.0}),
            "node2",
            "links to both neighbours: 8 GB/s, the median is 20 (rank 5)",
        ),
        (
            planted(1, gb_s={"node": 0.0, "link": 20.0, "all": 15.0}),
            "node0",
            "all-reduce in the node: did not end in 9 s (rank 1)",
        ),
    ],
)
def test_fault_is_named_with_its_node(facts: list[Facts], node: str, message: str):
    assert find_faults(facts, CONFIG) == [(node, message)]


def test_of_two_versions_as_frequent_the_first_ranks_is_right():
    facts = planted(4, 5, 6, 7, versions={"code": "bbb", "torch": "2.13"})
    assert [fault.node for fault in find_faults(facts, CONFIG)] == ["node2", "node3"]


def test_all_reduce_that_ends_nowhere_is_nobodys_fault():
    facts = [dataclasses.replace(f, gb_s=f.gb_s | {"all": 0.0}) for f in healthy()]
    assert find_faults(facts, CONFIG) == [
        ("all nodes", "the all-reduce over all ranks did not end in 9 s")
    ]


def test_no_limits_ask_for_nothing_but_a_disk_and_like_versions():
    facts = planted(3, free_gib=0.0, disk_gib=0.0, clock=1001.0)
    facts[5] = dataclasses.replace(facts[5], gb_s={"node": 1.0, "link": 1.0, "all": 1.0})
    assert find_faults(facts, PreflightConfig(slow_share=0.0)) == []


def test_report_has_a_line_a_node_with_its_worst_figures():
    lines = report(planted(3, free_gib=2.5, clock=1000.25)).splitlines()
    assert len(lines) == 1 + 4
    assert "8 ranks" in lines[0]
    assert lines[2] == (
        "  node1: 2 ranks, 2.5 GiB free, disk 500 GiB, clock +0.25 s, "
        "node 202.0 GB/s, link 19.7 GB/s, all 15.0 GB/s"
    )
