import io
import re

from rich.console import Console

from engine.quickstart.report import COLUMNS, MODELS, summary_table, write_report
from tests.hostile import EVERYTHING, dangers

SUMMARY = {
    "rm_pair_accuracy": 0.8125,
    "seconds": {"pretrain": 60.0, "ppo_ptx": 120.0},
    "base": {"labeler_score": 0.1, "win_rate_vs_sft": 0.05, "win_rate_interval": [0.02, 0.11]},
    "sft": {"labeler_score": 0.5, "win_rate_vs_sft": 0.5, "kl_from_init": 1.25},
    "ppo_ptx": {
        "labeler_score": 0.75,
        "win_rate_vs_sft": 0.68,
        "win_rate_interval": [0.62, 0.73],
        "kl_from_init": 4.321,
        "pretrain_loss": 3.21,
        "response_tokens": 31.4,
        "eos_rate": 0.98,
    },
}
CURVES = {
    "pretrain": [
        {"step": s, "train/pretrain_loss": 5.0 - s, "valid/pretrain_loss": 5.1 - s}
        for s in range(4)
    ],
    "rm": [{"step": s, "train/loss": 0.7, "train/pair_accuracy": 0.5 + s / 10} for s in range(4)],
    "ppo": [{"step": s, "score/kl": s, "score/reward_mean": s / 2} for s in range(20)],
    "ppo_ptx": [{"step": s, "score/kl": s / 2, "score/reward_mean": s / 3} for s in range(20)],
}
SAMPLES = [
    {
        "prompt": 'Name: <Aromi>\nFood: "Thai" & cheap',
        "answers": {
            "sft": "It is <b>cheap</b>.",
            "ppo_ptx": "Aromi & co <script>alert(1)</script>",
        },
        "scores": {"sft": 0.25},
    }
]


def written(tmp_path, summary=SUMMARY, curves=CURVES, samples=SAMPLES) -> str:
    write_report(tmp_path / "report.html", summary, curves, samples)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_stands_alone(tmp_path):
    page = written(tmp_path)
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith("#") for link in links), links  # parts of a plot name each other
    assert "url(http" not in page
    assert "@import" not in page
    assert "<script" not in page


def test_texts_of_models_and_users_are_escaped(tmp_path):
    page = written(tmp_path)
    assert "Name: &lt;Aromi&gt;\nFood: &quot;Thai&quot; &amp; cheap" in page
    assert "It is &lt;b&gt;cheap&lt;/b&gt;." in page
    assert "Aromi &amp; co &lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_numbers_of_the_summary_are_on_the_page(tmp_path):
    page = written(tmp_path)
    for text in ("81.2%", "68% (62% to 73%)", "4.32", "3.210", "31.4", "98%", "3.0 min", "0.25"):
        assert text in page, text


def test_every_panel_that_has_data_is_drawn(tmp_path):
    captions = re.findall("<figcaption>(.*?)</figcaption>", written(tmp_path))
    assert captions == [
        "preferred to SFT, with 95% interval",
        "reward against KL, a point an iteration",
        "pretrain: pretraining loss",
        "rm: loss",
        "rm: pair accuracy",
        "reward",
        "KL to the init policy (nats)",
    ]


def test_plots_follow_the_theme_of_the_page(tmp_path):
    page = written(tmp_path)
    svgs = re.findall("<svg.*?</svg>", page, re.DOTALL)
    assert len(svgs) == 7
    assert not re.findall("#0101[0-9]{2}", page)
    assert all("var(--series-" in svg for svg in svgs)
    defined = set(re.findall(r"(--[a-z0-9-]+):", page))
    assert set(re.findall(r"var\((--[a-z0-9-]+)\)", page)) <= defined


def test_same_input_gives_the_same_file(tmp_path):
    assert written(tmp_path) == written(tmp_path)


def test_an_empty_run_still_has_a_page(tmp_path):
    page = written(tmp_path, {}, {}, [])
    assert "<figure>" not in page
    assert page.rstrip().endswith("</html>")


def test_a_stage_with_values_that_are_not_finite_is_drawn(tmp_path):
    rows = [{"step": s, "train/loss": float("nan") if s == 2 else 1.0} for s in range(4)]
    assert "sft" not in SUMMARY["seconds"]
    assert "SFT: loss" in written(tmp_path, {}, {"sft": rows}, [])


def screen(summary: dict, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary_table(summary))
    return console.export_text()


def test_screen_table_has_a_row_a_model():
    text = screen(SUMMARY, 140)
    assert "81.2% of held-out pairs right" in text
    rows = text.splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["base", "SFT", "PPO-ptx"]
    assert "68% (62% to 73%)" in rows[2]


def test_screen_table_is_whole_at_80_columns():
    longest = {
        "labeler_score": -10.125,
        "win_rate_vs_sft": 1.0,
        "win_rate_interval": [0.99, 1.0],
        "kl_from_init": 123.45,
        "pretrain_loss": 10.825,
        "response_tokens": 100.5,
        "eos_rate": 1.0,
    }
    text = screen(dict.fromkeys(MODELS, longest), 80)
    assert "…" not in text
    cells = ["-10.125", "100% (99% to 100%)", "123.45", "10.825", "100.5", "100%"]
    for name, row in zip(MODELS.values(), text.splitlines()[-len(MODELS) :], strict=True):
        assert re.split(" {2,}", row.strip()) == [name, *cells]
    words = " ".join(heading for heading, _ in COLUMNS.values()).split()
    assert set(words) <= set(text.split())


def test_screen_table_is_cut_and_not_refused_on_a_narrow_screen():
    assert "…" in screen(SUMMARY, 50)
    assert screen(SUMMARY, 10)


def test_hostile_text_is_neither_markup_nor_hidden_nor_a_formula(tmp_path):
    nasty = f"<img src=x onerror=alert(1)>\"'&$\\frac{{ {EVERYTHING}"
    curves = {
        nasty: CURVES["ppo"],
        f"{nasty}2": CURVES["ppo"],
        f"{nasty}3": [{"step": 0, "train/loss": 1.0}],
    }
    samples = [{"prompt": nasty, "answers": {nasty: nasty, "sft": "{{body}}"}}]
    page = written(tmp_path, SUMMARY | {"seconds": {nasty: 1.0}}, curves, samples)
    assert dangers(page) == []
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=alert(1)&gt;&quot;&#x27;&amp;$\\frac{ \\x1b]52;") >= 4
    assert page.count("<html") == 1


def test_the_page_allows_itself_nothing_but_its_own_style(tmp_path):
    page = written(tmp_path)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy"\s+content="([^"]*)"', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert page.index("Content-Security-Policy") < page.index("<style")


def test_a_reward_model_that_judges_itself_is_no_labeler(tmp_path):
    own = SUMMARY | {"judge": "reward_model"}
    page = written(tmp_path, own)
    assert "Nobody independent has judged these answers" in page
    assert "68%" in page
    for word in ("labeler", "preferred"):
        assert word not in page, word
    assert "The labeler is the one that ranked" in written(tmp_path, SUMMARY | {"judge": "labeler"})
    out = io.StringIO()
    Console(file=out, width=80).print(summary_table(own))
    assert "reward" in out.getvalue() and "preferred" not in out.getvalue()
