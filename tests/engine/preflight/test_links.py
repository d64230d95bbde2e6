"""Which ranks measure their links together, and in which order."""

import pytest
import torch
import torch.distributed as dist

from engine.preflight import links
from engine.preflight.links import groups_of
from engine.settings.preflight import PreflightConfig


def test_rank_measures_its_node_both_neighbours_and_all():
    nodes = ["a", "a", "b", "b", "c", "c", "d", "d"]
    assert groups_of(3, nodes) == [
        ("node", [2, 3]),
        ("link", [1, 3]),
        ("link", [3, 5]),
        ("all", list(range(8))),
    ]


def test_two_nodes_have_one_link_and_a_rank_alone_nothing_to_measure():
    assert groups_of(0, ["a", "b"]) == [("link", [0, 1]), ("all", [0, 1])]
    assert groups_of(0, ["a"]) == []


def test_rank_without_a_counterpart_skips_the_link():
    nodes = ["a", "a", "b"]
    assert groups_of(1, nodes) == [("node", [0, 1]), ("all", [0, 1, 2])]


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("ranks_per_node", [1, 3])
def test_no_rank_waits_in_a_circle(num_nodes: int, ranks_per_node: int):
    """A group starts when it is the next of all its members: that must empty every list."""
    nodes = [f"n{i}" for i in range(num_nodes) for _ in range(ranks_per_node)]
    waiting = {rank: groups_of(rank, nodes) for rank in range(len(nodes))}
    while any(waiting.values()):
        ready = [g[0] for g in waiting.values() if g]
        startable = [g for g in ready if all(waiting[r][:1] == [g] for r in g[1])]
        assert startable, waiting
        for group in startable:
            for rank in group[1]:
                waiting[rank] = [g for g in waiting[rank] if g != group]


@pytest.mark.parametrize("num_nodes", [3, 4, 5])
def test_every_neighbour_is_measured_once(num_nodes: int):
    nodes = [f"n{i}" for i in range(num_nodes)]
    links = [
        tuple(ranks)
        for rank in range(num_nodes)
        for scope, ranks in groups_of(rank, nodes)
        if scope == "link"
    ]
    expected = {tuple(sorted((i, (i + 1) % num_nodes))) for i in range(num_nodes)}
    assert set(links) == expected
    assert len(links) == 2 * len(expected)  # by both ends


def test_groups_of_the_same_ranks_meet_in_places_of_their_own(monkeypatch):
    names = []
    monkeypatch.setattr(links, "_meet", lambda ranks, rank, meeting, *_: meeting)
    monkeypatch.setattr(links.dist, "PrefixStore", lambda name, store: names.append(name))
    monkeypatch.setattr(links, "_all_reduce_gb_s", lambda *_: 1.0)
    found = links.measure_links(
        PreflightConfig(), dist.HashStore(), ["a", "a"], 0, torch.device("cpu")
    )
    assert found == {"node": 1.0, "all": 1.0}
    assert len(set(names)) == 2
