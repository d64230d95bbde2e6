"""What is wrong with which node, from what the ranks found out."""

import collections
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from engine.preflight.facts import Facts, Scope
from engine.settings.preflight import PreflightConfig


class Fault(NamedTuple):
    """What is wrong with a node."""

    node: str
    message: str


def find_faults(facts: Sequence[Facts], config: PreflightConfig) -> list[Fault]:
    """Return the faults in what the ranks found, one a node and cause."""
    found = _version_faults(facts)
    median_clock = statistics.median(f.clock for f in facts)
    for f in facts:
        skew = f.clock - median_clock
        for is_bad, message in (
            (f.disk_error, f"{config.directory}: {f.disk_error}"),
            (f.cache_error, f.cache_error),
            (
                not f.disk_error and f.disk_gib < config.min_disk_gib,
                f"{config.directory} has less than {config.min_disk_gib:g} GiB free",
            ),
            (
                f.free_gib < config.min_free_gib,
                f"{f.free_gib:.1f} GiB of memory free, under {config.min_free_gib:g}",
            ),
            (abs(skew) > config.max_skew_s, f"clock off by {skew:+.1f} s"),
        ):
            if is_bad:
                found.append((f, message))
    found += _link_faults(facts, "node", config.min_node_gb_s, config)
    found += _link_faults(facts, "link", config.min_link_gb_s, config)
    faults = _by_node(found)
    if not faults and any(f.gb_s.get("all") == 0.0 for f in facts):
        message = f"the all-reduce over all ranks did not end in {config.timeout_s:g} s"
        faults.append(Fault("all nodes", message))
    return faults


def report(facts: Sequence[Facts]) -> str:
    """Return a line a node: its ranks, its worst figures."""
    if not facts:
        return ""
    median_clock = statistics.median(f.clock for f in facts)
    lines = [f"preflight: {len(facts)} ranks, {facts[0].versions}"]
    for node, ranks in _nodes(facts).items():
        speeds = [
            f"{scope} {min(f.gb_s[scope] for f in ranks):.1f} GB/s"
            for scope in ("node", "link", "all")
            if all(scope in f.gb_s for f in ranks)
        ]
        lines.append(
            f"  {node}: {len(ranks)} ranks, {min(f.free_gib for f in ranks):.1f} GiB free, "
            f"disk {min(f.disk_gib for f in ranks):.0f} GiB, "
            f"clock {max((f.clock - median_clock for f in ranks), key=abs):+.2f} s"
            + "".join(f", {speed}" for speed in speeds)
        )
    return "\n".join(lines) + "\n"


def _version_faults(facts: Sequence[Facts]) -> list[tuple[Facts, str]]:
    """Return whoever has another version than most have; of as many, the lower ranks are right."""
    found = []
    for name in dict.fromkeys(name for f in facts for name in f.versions):
        counts = collections.Counter(f.versions.get(name, "none") for f in facts)
        usual = counts.most_common(1)[0][0]
        for f in facts:
            version = f.versions.get(name, "none")
            if version != usual:
                found.append((f, f"{name} is {version}, elsewhere {usual}"))
    return found


def _link_faults(
    facts: Sequence[Facts], scope: Scope, limit: float, config: PreflightConfig
) -> list[tuple[Facts, str]]:
    """Return the worst rank of a node whose bandwidth lies under the limit, or far under that of
    the others."""
    measured = [f for f in facts if scope in f.gb_s]
    if not measured:
        return []
    median = statistics.median(f.gb_s[scope] for f in measured)
    what = {"node": "all-reduce in the node", "link": "links to both neighbours"}[scope]
    found = []
    for ranks in _nodes(measured).values():
        worst = min(ranks, key=lambda f: f.gb_s[scope])
        speed = worst.gb_s[scope]
        if speed == 0.0:
            found.append((worst, f"{what}: did not end in {config.timeout_s:g} s"))
        elif speed < limit:
            found.append((worst, f"{what}: {speed:.2g} GB/s, under {limit:g}"))
        elif speed < config.slow_share * median:
            found.append((worst, f"{what}: {speed:.2g} GB/s, the median is {median:.2g}"))
    return found


def _by_node(found: list[tuple[Facts, str]]) -> list[Fault]:
    """Return a fault a node and cause, with the ranks that found it."""
    ranks: dict[Fault, list[int]] = {}
    for facts, message in found:
        ranks.setdefault(Fault(facts.node, message), []).append(facts.rank)
    return [Fault(f.node, f"{f.message} ({named_ranks(r)})") for f, r in ranks.items()]


def _nodes(facts: Sequence[Facts]) -> dict[str, list[Facts]]:
    nodes: dict[str, list[Facts]] = {}
    for f in facts:
        nodes.setdefault(f.node, []).append(f)
    return nodes


def named_ranks(ranks: list[int]) -> str:
    """Return `rank 3` or `ranks 3, 4`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
