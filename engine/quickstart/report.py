"""The report of a quickstart: one HTML file with its plots inside, and the table for the screen.

A summary holds `rm_pair_accuracy`, `seconds` by stage, and for each of MODELS a dict with the keys
of COLUMNS and `win_rate_interval` (low, high). What is absent is left out of the page.
"""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.table import Table

from engine.files import replacing
from engine.printable import printable

MODELS = {"base": "base", "sft": "SFT", "ppo": "PPO", "ppo_ptx": "PPO-ptx"}
COLUMNS = {  # summary key -> heading, format
    "labeler_score": ("labeler score", "{:.3f}"),
    "win_rate_vs_sft": ("preferred to SFT", "{:.0%}"),
    "kl_from_init": ("KL from init (nats)", "{:.2f}"),
    "pretrain_loss": ("pretraining loss", "{:.3f}"),
    "response_tokens": ("response tokens", "{:.1f}"),
    "eos_rate": ("ends by itself", "{:.0%}"),
}
# What a panel of learning curves shows: title, then {metric key: label}. Stages of reinforcement
# learning share their panels, one line a stage.
_LOSS = ("loss", {"train/loss": "train", "valid/loss": "held out"})
_PRETRAIN_LOSS = (
    "pretraining loss",
    {"train/pretrain_loss": "train", "valid/pretrain_loss": "held out"},
)
_ACCURACY = (
    "pair accuracy",
    {"train/pair_accuracy": "train", "valid/pair_accuracy": "held out"},
)
_RL_PANELS = {
    "score/reward_mean": "reward",
    "valid/reward_mean": "reward, held-out prompts",
    "score/kl": "KL to the init policy (nats)",
    "rollout/response_tokens": "response tokens",
    "rollout/eos_rate": "share that ends by itself",
    "update/value_loss": "value loss",
    "update/ptx_loss": "pretraining loss",
    "valid/pretrain_loss": "pretraining loss, held-out text",
}
# Colours that matplotlib writes, and the CSS variables they become: the plots follow the page's
# light or dark theme.
_INK, _MUTED, _GRID = "#010101", "#010102", "#010103"
_SERIES = ("#010111", "#010112", "#010113", "#010114")
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "grid"} | {
    colour: f"series-{i}" for i, colour in enumerate(_SERIES)
}
_MODEL_COLOURS = dict(zip(MODELS, _SERIES, strict=True))

Rows = Sequence[Mapping[str, float]]


def write_report(
    path: Path,
    summary: Mapping[str, Any],
    curves: Mapping[str, Rows],
    samples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the report, whole or not at all.

    `curves` holds the rows of read_metrics by stage, in the order of the run. A sample is
    {"prompt": text, "answers": {model: text}} and may have "scores": {model: number}.
    """
    plots = _win_rate_plot(summary) + _reward_against_kl(curves)
    sections = [
        _headline(summary),
        _section("The models", _models_table(summary), _note(summary)),
        _section("Preference and price", _figures(plots), _PRICE_NOTE),
        _section("Learning curves", _figures(_learning_curves(curves))),
        _section("Answers side by side", "".join(_sample(sample) for sample in samples)),
        _section("Time", _seconds_table(summary.get("seconds", {}))),
    ]
    page = _PAGE.replace("{{body}}", "\n".join(sections))
    with replacing(path) as stream:
        stream.write(page.encode())


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of the models for the screen, 76 columns wide: rich takes a screen that it
    cannot ask for one of 80, and cuts words that find no room."""
    rows = [(name, *_cells(summary[model])) for model, name in MODELS.items() if model in summary]
    table = Table(
        title=f"reward model: {_accuracy(summary)} of held-out pairs right",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    headings = ["model", *_headings(summary)]
    for i, heading in enumerate(headings):
        # As wide as its cells and the words of its heading, which takes several lines.
        width = max(map(len, [*heading.split(), *(row[i] for row in rows)]))
        table.add_column(heading, justify="right" if i else "left", width=width)
    for row in rows:
        table.add_row(*row)
    return table


def _is_independent(summary: Mapping[str, Any]) -> bool:
    """Return whether who judges the answers is another than the reward model that PPO was paid
    by."""
    return summary.get("judge") != "reward_model"


def _headings(summary: Mapping[str, Any]) -> list[str]:
    headings = {key: heading for key, (heading, _) in COLUMNS.items()}
    if not _is_independent(summary):
        headings |= {"labeler_score": "reward", "win_rate_vs_sft": "reward above SFT's"}
    return list(headings.values())


def _cells(values: Mapping[str, Any]) -> list[str]:
    """Return a model's row: one text a column, with the interval behind the win rate."""
    cells = [
        form.format(values[key]) if values.get(key) is not None else ""
        for key, (_, form) in COLUMNS.items()
    ]
    if values.get("win_rate_interval"):
        low, high = values["win_rate_interval"]
        cells[list(COLUMNS).index("win_rate_vs_sft")] += f" ({low:.0%} to {high:.0%})"
    return cells


def _accuracy(summary: Mapping[str, Any]) -> str:
    accuracy = summary.get("rm_pair_accuracy")
    return "?" if accuracy is None else f"{accuracy:.1%}"


def _headline(summary: Mapping[str, Any]) -> str:
    cards = [(_accuracy(summary), "of held-out pairs ranked right by the reward model")]
    for model in ("ppo_ptx", "ppo"):
        values = summary.get(model, {})
        if values.get("win_rate_vs_sft") is not None:
            rate = f"{values['win_rate_vs_sft']:.0%}"
            better = "preferred to" if _is_independent(summary) else "of a higher reward than"
            cards.append((rate, f"of {MODELS[model]}'s answers {better} SFT's, ties split"))
    if summary.get("seconds"):
        minutes = sum(summary["seconds"].values()) / 60
        cards.append((f"{minutes:.1f} min", "of training and evaluation"))
    items = (f"<div><b>{_escaped(number)}</b>{_escaped(text)}</div>" for number, text in cards)
    return f'<div class="cards">{"".join(items)}</div>'


def _section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    note = f"<p>{note}</p>" if note else ""
    return f"<section><h2>{_escaped(title)}</h2>{note}{body}</section>"


def _note(summary: Mapping[str, Any]) -> str:
    return _TABLE_NOTE.format(judge=_LABELER if _is_independent(summary) else _NO_JUDGE)


def _models_table(summary: Mapping[str, Any]) -> str:
    head = "".join(f"<th>{_escaped(heading)}</th>" for heading in _headings(summary))
    rows = ""
    for model, name in MODELS.items():
        if model in summary:
            cells = "".join(f"<td>{_escaped(cell)}</td>" for cell in _cells(summary[model]))
            rows += f"<tr><th>{_escaped(name)}</th>{cells}</tr>"
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _seconds_table(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    rows = "".join(
        f"<tr><th>{_escaped(stage)}</th><td>{value:.0f} s</td></tr>"
        for stage, value in seconds.items()
    )
    return f"<table>{rows}</table>"


def _sample(sample: Mapping[str, Any]) -> str:
    answers = ""
    for model, text in sample["answers"].items():
        score = sample.get("scores", {}).get(model)
        score = "" if score is None else f" <span>{score:.2f}</span>"
        name = _escaped(MODELS.get(model, model))
        answers += f"<div><h3>{name}{score}</h3><p>{_escaped(text)}</p></div>"
    prompt = _escaped(sample["prompt"])
    return f'<article><pre>{prompt}</pre><div class="answers">{answers}</div></article>'


def _escaped(text: str) -> str:
    """Return what shows a text in a page: nothing in it is markup, and nothing is hidden."""
    return html.escape(printable(text))


def _figures(figures: Sequence[str]) -> str:
    return f'<div class="figures">{"".join(figures)}</div>' if figures else ""


def _win_rate_plot(summary: Mapping[str, Any]) -> list[str]:
    judged = [m for m in MODELS if summary.get(m, {}).get("win_rate_interval")]
    if not judged:
        return []
    figure, axes = _panel()
    axes.axvline(0.5, color=_MUTED, linewidth=1, dashes=(4, 3))
    for i, model in enumerate(judged):
        values, colour = summary[model], _MODEL_COLOURS[model]
        axes.plot(values["win_rate_interval"], [i, i], color=colour, linewidth=2)
        axes.plot(values["win_rate_vs_sft"], i, "o", color=colour, markersize=7)
    axes.set_yticks(range(len(judged)), [MODELS[m] for m in judged])
    axes.set_xlim(0, 1)
    axes.set_ylim(len(judged) - 0.4, -0.6)  # the first model on top
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    title = "preferred to SFT" if _is_independent(summary) else "reward above SFT's"
    return [_figure(figure, f"{title}, with 95% interval")]


def _reward_against_kl(curves: Mapping[str, Rows]) -> list[str]:
    rl = _of_rl(curves)
    if not rl:
        return []
    figure, axes = _panel()
    for stage, rows in rl.items():
        colour = _MODEL_COLOURS.get(stage, _SERIES[0])
        kl, reward = zip(
            *((row["score/kl"], row["score/reward_mean"]) for row in rows if "score/kl" in row),
            strict=True,
        )
        axes.plot(kl, reward, color=colour, linewidth=1, alpha=0.4)
        name = printable(MODELS.get(stage, stage))
        axes.plot(kl, reward, "o", color=colour, markersize=3.5, label=name)
    axes.set_xlabel("KL to the init policy (nats a response)", color=_MUTED, fontsize=9.5)
    return [_figure(figure, "reward against KL, a point an iteration")]


def _learning_curves(curves: Mapping[str, Rows]) -> list[str]:
    figures = []
    rl = _of_rl(curves)
    for stage, rows in curves.items():
        if stage in rl:
            continue
        for title, labels in (_LOSS, _PRETRAIN_LOSS, _ACCURACY):
            lines = {
                label: (_SERIES[i], _points(rows, key))
                for i, (key, label) in enumerate(labels.items(), start=1)
            }
            figures += _curve_panel(f"{MODELS.get(stage, stage)}: {title}", lines)
    for key, title in _RL_PANELS.items():
        lines = {
            MODELS.get(stage, stage): (_MODEL_COLOURS.get(stage, _SERIES[0]), _points(rows, key))
            for stage, rows in rl.items()
        }
        figures += _curve_panel(title, lines)
    return figures


def _of_rl(curves: Mapping[str, Rows]) -> dict[str, Rows]:
    return {stage: rows for stage, rows in curves.items() if any("score/kl" in r for r in rows)}


def _points(rows: Rows, key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _curve_panel(title: str, lines: Mapping[str, tuple[str, list]]) -> list[str]:
    """Draw {label: (colour, points)} as one panel; none when no line has a point."""
    if not any(points for _, points in lines.values()):
        return []
    figure, axes = _panel()
    for label, (colour, points) in lines.items():
        if points:
            marker = "o" if len(points) < 12 else ""
            (line,) = axes.plot(*zip(*points, strict=True), color=colour, label=printable(label))
            line.set(linewidth=1.5, marker=marker, markersize=3.5)
    axes.set_xlabel("step", color=_MUTED, fontsize=9.5)
    return [_figure(figure, title)]


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _figure(figure: Figure, caption: str) -> str:
    """Return the drawing as inline SVG whose colours are the page's CSS variables."""
    axes = figure.axes[0]
    if len(axes.get_legend_handles_labels()[1]) > 1:
        legend = axes.legend(frameon=False, fontsize=9.5, labelcolor=_INK)
        for text in legend.get_texts():
            text.set_parse_math(False)
    buffer = io.StringIO()
    # Text stays text; one salt makes element names, and so the file, the same in every run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # without the XML prologue
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    caption = _escaped(caption)
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


_LABELER = "The labeler is the one that ranked the reward model's training data"
_NO_JUDGE = (
    "Nobody independent has judged these answers: the reward is of the model that PPO was trained"
    " on, and rises whether or not a reader would agree. Read some answers below"
)
_TABLE_NOTE = (
    "On held-out prompts. {judge}; ties count one half, intervals are 95% (Wilson). Pretraining"
    " loss is in nats a token on held-out text: what reinforcement learning forgets."
)
_PRICE_NOTE = (
    "What the answers gain, and how far the policy moved for it. The pretraining gradients of"
    " PPO-ptx are there to keep the pretraining loss of the table down."
)
# The page is whole: it runs no script, fetches nothing and sends nothing, whatever is in it.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Trident: report of a run</title>
<style>
:root { color-scheme: light dark; --page: #f9f9f7; --card: #ffffff; --ink: #1a1a19;
  --muted: #6b6a66; --grid: #e4e3df; --series-0: #8a8984; --series-1: #2a78d6;
  --series-2: #eb6834; --series-3: #1a9e6f; }
@media (prefers-color-scheme: dark) { :root { --page: #0f0f0e; --card: #1a1a19; --ink: #f2f1ed;
  --muted: #a3a29c; --grid: #33332f; --series-0: #8a8984; --series-1: #3987e5;
  --series-2: #d95926; --series-3: #1fa877; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 70rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1.25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: .85rem; margin: 0 0 .25rem; }
section > p { color: var(--muted); margin: 0 0 1rem; max-width: 46rem; font-size: .95rem; }
.cards, .figures, .answers { display: grid; gap: 1rem; }
.cards { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.figures { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.answers { grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }
.cards > div, figure, article, table { background: var(--card); border: 1px solid var(--grid);
  border-radius: 10px; }
.cards > div { padding: 1rem 1.25rem; color: var(--muted); font-size: .9rem; }
.cards b { display: block; font-size: 1.9rem; line-height: 1.2; color: var(--ink); }
figure { margin: 0; padding: .9rem; }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .4rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
.wide table { width: 100%; }
th, td { padding: .5rem .9rem; text-align: right; font-size: .92rem; white-space: nowrap; }
tr + tr > * { border-top: 1px solid var(--grid); }
th:first-child { text-align: left; }
tr:first-child th:not(:only-of-type) { color: var(--muted); font-weight: 500; white-space: normal; }
article { padding: 1rem 1.25rem; margin-bottom: 1rem; }
article pre { margin: 0 0 1rem; white-space: pre-wrap; overflow-wrap: anywhere;
  color: var(--muted); font: .88rem/1.5 ui-monospace, monospace; }
article p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .92rem; }
h3 span { color: var(--muted); font-weight: 400; }
</style>
</head>
<body>
<h1>InstructGPT, small: pretraining, SFT, reward model, PPO</h1>
{{body}}
</body>
</html>
"""
