"""Writes the tables of README.md and benchmarks/README.md from benchmarks/results/: performance,
and how near families of Hugging Face's come.

    make tables

A table stands between two comment lines, `<!-- NAME: from benchmarks/results by make tables -->`
and `<!-- end of NAME -->`; what is between them is replaced.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.command_line import command
from benchmarks.gpu.summary import target_lines
from benchmarks.gpu.targets import TARGETS
from benchmarks.records import Record, kernel_case, kernel_size, newest, read_records

ROOT = Path(__file__).parents[1]
RESULTS = Path("benchmarks/results")


def tables(root: Path) -> dict[str, dict[str, str]]:
    """Return the Markdown of every table, by document and name."""
    devices = {p.stem: read_records(p) for p in sorted((root / RESULTS).glob("*.jsonl"))}
    families, prepared = devices.pop("families", []), devices.pop("prepare", [])
    gpus = {name: records for name, records in devices.items() if records and name != "cpu"}
    return {
        "README.md": {
            "targets": _join(_targets(records) for records in gpus.values()),
            "generation": _generation([r for records in devices.values() for r in records]),
            "ppo": _ppo([r for records in devices.values() for r in records]),
            "real steps": _real_steps([r for records in devices.values() for r in records]),
            "shared prompts": _shared_prompts([r for rs in devices.values() for r in rs]),
            "families": _families(families),
        },
        "benchmarks/README.md": {
            "kernels": _join(_kernels(records) for records in gpus.values()),
            "prepare": _prepared(prepared),
            "checkpoints": _checkpoints([r for records in devices.values() for r in records]),
        },
    }


def written(text: str, name: str, table: str) -> str:
    """Return a document's text with a table in its place. Raises ValueError where it has none."""
    begin, end = (
        f"<!-- {name}: from benchmarks/results by make tables -->",
        f"<!-- end of {name} -->",
    )
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected {begin} and {end} once in the document")
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def documents(root: Path) -> dict[Path, str]:
    """Return the whole text of every document, its tables as the results say."""
    texts = {}
    for document, named in tables(root).items():
        text = (root / document).read_text(encoding="utf-8")
        for name, table in named.items():
            text = written(text, name, table)
        texts[root / document] = text
    return texts


def _targets(records: Sequence[Record]) -> str:
    goals = {target.name: target.goal for target in TARGETS}
    lines = target_lines(records, {}, judges_speed=True)
    rows = [(line.name, goals[line.name], line.verdict, line.detail) for line in lines]
    return f"**{_origin(records)}**\n\n" + _markdown(("what", "target", "verdict", "seen"), rows)


def _kernels(records: Sequence[Record]) -> str:
    """A table a device: a row a case, ours beside the bound and the rivals."""
    found = [r for r in records if r["benchmark"] == "kernels" and r["status"] == "timed"]
    found = newest(found, kernel_case)
    cases: dict[object, list[Record]] = {}
    for record in found:
        cases.setdefault(kernel_case(record), []).append(record)
    rows = []
    for providers in cases.values():
        ours = next((r for r in providers if r["provider"] == "trident"), None)
        if ours is None:
            continue
        bounds = [r for r in providers if r["is_bound"]]
        rivals = [
            r for r in providers if not (r["is_bound"] or r["provider"].startswith("trident"))
        ]
        rivals.sort(key=lambda r: r["median_ms"])
        size = ", ".join(f"{name} {number}" for name, number in kernel_size(ours).items())
        rows.append(
            (
                f"{ours['operation']}, {ours['mode']}",
                size,
                f"{ours['median_ms']:.3g}",
                "; ".join(f"{r['median_ms']:.3g} ({r['provider']})" for r in bounds),
                "; ".join(f"{r['median_ms']:.3g} {r['provider']}" for r in rivals[:3]),
                ours["commit"],
            )
        )
    head = ("operation", "size", "ours, ms", "bound, ms", "the fastest others, ms", "commit")
    return f"**{_origin(records)}**\n\n" + _markdown(head, rows)


def _generation(records: Sequence[Record]) -> str:
    """Useful tokens a second of every provider, a row a device, size and workload."""

    def case(record: Record) -> tuple:
        return record["device"], str(record["size"]), record["workload"]

    found = [r for r in records if r["benchmark"] == "generation" and "tokens_per_s" in r]
    cases: dict[tuple, list[Record]] = {}
    for record in newest(found, case):
        cases.setdefault(case(record), []).append(record)
    rows = []
    for (device, _, workload), providers in cases.items():
        size = providers[0]["size"]
        speeds = (f"{r['provider']} {r['tokens_per_s']:,.0f}" for r in providers)
        shape = f"{size['num_layers']} x {size['hidden_size']}, batch {providers[0]['batch']}"
        rows.append((device, shape, workload, "; ".join(speeds), providers[0]["commit"]))
    return _markdown(("device", "model", "answers", "useful tokens/s", "commit"), rows)


def _checkpoints(records: Sequence[Record]) -> str:
    """What a save costs, a row a provider; and blocks of steps with a save, each kind a row."""

    def case(record: Record) -> tuple:
        return record["device"], str(record["size"]), record["num_tokens"]

    rows = []
    for r in newest([r for r in records if r["benchmark"] == "checkpoints"], case):
        shape = f"{r['size']['num_layers']} x {r['size']['hidden_size']}, {r['num_tokens']} tokens"
        if "on_disk_s" in r:
            rate = f"{r['num_bytes'] / r['on_disk_s'] / 1e6:,.0f}"
            cells = f"{r['waited_s']:.2f}", f"{r['on_disk_s']:.2f}", rate, ""
        else:
            low, high = r["added_range"]
            added = (
                f"{r['added']:+.1%} ({low:+.1%} to {high:+.1%}) in blocks of {r['block_s']:.0f} s"
            )
            cells = "", "", "", added
        rows.append((r["device"], shape, r["provider"], *cells, r["commit"]))
    head = ("training waits, s", "on the disk, s", "MB/s", "time of the steps", "commit")
    return _markdown(("device", "model and step", "provider", *head), rows)


def _ppo(records: Sequence[Record]) -> str:
    """Episodes/s and peak memory of ours beside TRL's at its fastest. A row is a device, size,
    lengths and dtype that both were measured at in one run."""

    def case(record: Record) -> tuple:
        job, names = record["job"], ("num_episodes", "minibatch_size", "prompt_tokens")
        shape = [str(job["size"]), *(job[name] for name in (*names, "response_tokens"))]
        workload = record.get("workload", "fixed")
        return _device(record), workload, job["numerics"]["dtype"], *shape

    found = [r for r in records if r["benchmark"] == "ppo_step"]
    cases: dict[tuple, list[Record]] = {}
    for record in newest(found, case):
        cases.setdefault(case(record), []).append(record)
    rows = []
    for (device, workload, dtype, *_), run in cases.items():
        providers = {record["provider"]: record for record in run}
        rivals = [record for name, record in providers.items() if name.startswith("trl")]
        if "trident" not in providers or not rivals:
            continue
        ours, ptx = providers["trident"], providers.get("trident, ptx")
        trl = max(rivals, key=lambda record: record["episodes_per_s"])
        job = ours["job"]
        size = f"{job['size']['num_layers']} x {job['size']['hidden_size']}"
        peaks = [record["peak_bytes"] / 1e9 for record in (ours, trl)]
        rows.append(
            (
                device,
                f"{size}, {job['num_episodes']} episodes of {job['prompt_tokens']}"
                f" + {job['response_tokens']}",
                f"{workload}, {dtype}",
                f"{ours['episodes_per_s']:.2f}",
                f"{trl['episodes_per_s']:.2f} ({trl['provider']})",
                f"{ours['episodes_per_s'] / trl['episodes_per_s']:.2f}",
                f"{peaks[0]:.2f} / {peaks[1]:.2f} = {peaks[0] / peaks[1]:.2f}",
                f"{ptx['episodes_per_s']:.2f}" if ptx else "",
                ours["commit"],
            )
        )
    heads = ("device", "model and longest episodes", "lengths", "ours, episodes/s", "TRL")
    heads += ("ours over it", "peak GB, ours over it", "ours with ptx", "commit")
    return _markdown(heads, rows)


def _device(record: Record) -> str:
    """The device; of a CPU also how many threads."""
    threads = record.get("threads")
    if not threads:
        return record["device"]
    return f"{record['device']}, {threads} {'thread' if threads == 1 else 'threads'}"


def _real_steps(records: Sequence[Record]) -> str:
    """SFT and RM steps on real lengths, a row a provider: of each device, task, size and dtype the
    newest run."""

    def case(record: Record) -> tuple:
        names = ("device", "threads", "benchmark", "size", "numerics", "lengths", "batch_size")
        return tuple(str(record.get(name)) for name in names)

    found = [r for r in records if r["benchmark"] in ("sft_step", "rm_step")]
    rows = []
    for record in newest(found, case):
        size, ratio = record["size"], record.get("trident_ratio")
        task = record["benchmark"].removesuffix("_step")
        unit = "demonstrations" if task == "sft" else "prompts"
        rows.append(
            (
                record["device"],
                f"{task}, {size['num_layers']} x {size['hidden_size']}, "
                f"{record['numerics']['dtype']}, {record['batch_size']} {unit} a step",
                record["provider"],
                f"{record['examples_per_s']:.1f}",
                f"{record['tokens_per_s']:,.0f}",
                f"{record['padding']:.0%}",
                f"{record['peak_bytes'] / 1e9:.2f}",
                f"{ratio:.2f} (goal {record['goal']})" if ratio else "",
                record["commit"],
            )
        )
    head = ("device", "step", "provider", "demonstrations or prompts/s", "tokens/s")
    head += ("padding", "peak GB", "ours over it", "commit")
    return _markdown(head, rows) if rows else "Not measured yet."


def _shared_prompts(records: Sequence[Record]) -> str:
    """Tokens and seconds with a ranking's prompt computed once and once a completion: a row a
    device, size and file."""

    def case(record: Record) -> tuple:
        names = ("device", "threads", "size", "numerics", "batch_size", "rankings")
        return tuple(str(record.get(name)) for name in names)

    rows = []
    for record in newest([r for r in records if r["benchmark"] == "shared_prompts"], case):
        tokens, seconds = record["epoch_tokens"], record["median_s"]
        size, ways = record["size"], ("separate", "shared")
        rows.append(
            (
                record["rankings"],
                f"{record['mean_completions']:.1f} of {record['mean_completion_tokens']:.0f} tokens"
                f" behind {record['mean_prompt_tokens']:.0f}",
                f"{' / '.join(f'{tokens[way]:,}' for way in ways)}",
                f"{record['saved_tokens']:.0%}",
                f"{_device(record)}, {size['num_layers']} x {size['hidden_size']}, "
                f"{record['numerics']['dtype']}, {record['batch_size']} prompts",
                f"{' / '.join(f'{seconds[way]:.2f}' for way in ways)}",
                f"{record['speedup']:.2f} ({record['cpu_speedup']:.2f})",
                record["commit"],
            )
        )
    head = ("rankings", "completions", "tokens of an epoch, separate / shared", "saved", "step")
    head += ("seconds, separate / shared", "times as fast (by CPU seconds)", "commit")
    return _markdown(head, rows) if rows else "Not measured yet."


def _families(records: Sequence[Record]) -> str:
    """Differences to transformers in fp32, a row a family. Zero is said as equal."""
    if not records:
        return "Not measured yet."

    def near(difference: float) -> str:
        return f"{difference:.0e}" if difference else "equal"

    rows = [
        (
            record["family"],
            record["models"],
            record["apart"],
            near(record["logits"]),
            f"{record['greedy']} tokens equal",
            near(record["export"]),
            f"{record['texts']} texts equal",
            near(record["scores"]),
            f"{', '.join(record['layouts'])}: {near(record['two_ranks'])}",
        )
        for record in records
    ]
    head = ("family", "models", "what sets it apart", "logits", "greedy answers", "SFT's export")
    head += ("its tokenizer", "scores of a reward model's export", "SFT on two ranks")
    versions = " and ".join(f"{name} {records[-1][name]}" for name in ("transformers", "torch"))
    return f"**{versions}, on a CPU**\n\n{_markdown(head, rows)}"


def _origin(records: Sequence[Record]) -> str:
    last = max(records, key=lambda record: record["date"])
    versions = ", ".join(f"{name} {last[name]}" for name in ("torch", "triton", "megatron-core"))
    commits = sorted({str(record["commit"]) for record in records})
    return f"{last['device']}, {versions}; commits {', '.join(commits)}; until {last['date'][:10]}"


def _prepared(records: Sequence[Record]) -> str:
    """The newest preparation of a made log: a row a kind of what was planted in it."""
    if not records:
        return "Nothing has been measured yet."
    last = records[-1]
    head = ("what was planted", "records", "of them to drop", "dropped", "dropped wrongly")
    keys = ("what", "planted", "to_drop", "dropped", "wrongly")
    rows = [tuple(kind[key] for key in keys) for kind in last["kinds"]]
    return (
        f"**{last['records']:,} records of {last['log_mb']} MB in {last['seconds'] / 60:.1f} "
        f"minutes ({last['cpu_seconds'] / 60:.1f} of a core) and {last['peak_mb']} MB of memory; "
        f"one process on {last['device']}, commit {last['commit']}**\n\n" + _markdown(head, rows)
    )


def _markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _join(parts: Iterable[str]) -> str:
    return "\n\n".join(parts) or "Nothing has been measured on a GPU yet."


def main(write: Callable[[str], object] = print) -> None:
    """Write the documents; say which of them changed."""
    command("tables").parse_args()
    for path, text in documents(ROOT).items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            write(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    sys.exit(main())
