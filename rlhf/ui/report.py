"""RUN_DIR/report.html: one self-contained page with the curves of a run and answers before and after.

Reads metrics.jsonl, evaluations.jsonl, data.json and config.yaml, nothing else; loads nothing from a network.
Everything that a model or a data set wrote is escaped."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.buffer.audit import ExperienceView
from rlhf.buffer.schema import FILE_NAME
from rlhf.evaluation.heldout import Answer, Evaluation, HeldoutReport, from_json, rise_in_deviations
from rlhf.observers import EVALUATIONS_FILE, METRICS_FILE, read_steps, replace_durably
from rlhf.ui.charts import Series, line_chart, share_chart

REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"
DATA_FILE = "data.json"

# Title of a chart -> its lines: name in the legend, metric.
CHARTS = {
    "Reward": [("mean", "reward/mean")],
    "Negative log-likelihood (nats a token)": [("trained tokens", "loss/nll")],
    "Preference loss": [("mean over pairs", "loss/preference")],
    "Rewards of the pairs": [
        ("chosen", "rewards/chosen"),
        ("rejected", "rewards/rejected"),
        ("margin", "rewards/margins"),
    ],
    "Pairs whose chosen answer has the higher reward (share)": [("mean", "rewards/accuracies")],
    "KL to the reference (nats a completion)": [("k1", "kl/k1"), ("k3", "kl/k3")],
    "Completion length (tokens)": [("mean", "completion/length_mean")],
    "Trainer against rollout engine (|log-prob difference|)": [
        ("mean", "mismatch/logprob_abs_mean"),
        ("largest", "mismatch/logprob_abs_max"),
    ],
    "Tokens a second": [("generated", "tokens/generated_per_s"), ("trained", "tokens/trained_per_s")],
    "Entropy (nats a token)": [("mean", "entropy")],
    "Gradient norm": [("before clipping", "grad_norm")],
    "Seconds a step": [
        ("whole step", "time/step_s"),
        ("waiting for samples", "time/wait_s"),
        ("update", "time/update_s"),
    ],
    "Seconds without sampling (summed over rollout engines)": [("idle", "time/engine_idle_s")],
    "Correction of stale samples (share of tokens)": [
        ("rejected", "off_policy/rejected_fraction"),
        ("truncated", "off_policy/truncated_fraction"),
        ("effective size", "off_policy/ess_fraction"),
    ],
}
# The histogram of ages: name in the legend, metric. Drawn where a sample of the run was stale.
AGES = [
    ("0", "staleness/fraction_0"),
    ("1", "staleness/fraction_1"),
    ("2", "staleness/fraction_2"),
    ("3–4", "staleness/fraction_3_to_4"),
    ("5–8", "staleness/fraction_5_to_8"),
    (">8", "staleness/fraction_over_8"),
]
AGE_COLOURS = ("g0", "g1", "g2", "g3", "g4", "g5")
# What a card says of an evaluation without answers, where it was measured.
HELDOUT_CARDS = ("loss/nll", "rewards/accuracies")
COLOURS = ("a", "b", "c")
COUNTED = ("faults/", "groups/dropped", "groups/equal_dropped", "pairs/ties", "pairs/identical", "pairs/empty")

STYLE = """ :root{color-scheme:light
dark;--bg:#fbfbfa;--card:#fff;--ink:#1d1f23;--soft:#6b7079;--rule:#e4e5e8;--a:#2f6fde;--b:#d9822b;--c:#2a9d74}
@media(prefers-color-scheme:dark){:root{--bg:#15171a;--card:#1d2024;--ink:#e8e9eb;--soft:#9aa0a8;--rule:#32363c;
--a:#7aa7f7;--b:#f0a860;--c:#5fcfa5}} *{box-sizing:border-box}body{margin:0 auto;max-width:1060px;padding:28px 18px
60px;background:var(--bg);color:var(--ink); font:15px/1.5 system-ui,sans-serif}h1{font-size:24px;margin:0 0
2px}h2{font-size:18px;margin:34px 0 10px} p.sub{color:var(--soft);margin:0 0
18px}.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 14px}.card
b{display:block;font-size:20px} .card
span{color:var(--soft);font-size:13px}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(330px,1fr));gap:12px}
figure{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:10px 12px 4px}
figcaption{font-weight:600;font-size:13.5px}svg{width:100%;height:auto;display:block}.grid{stroke:var(--rule);stroke-width:1}
.tick{fill:var(--soft);font-size:10.5px}polyline{fill:none;stroke-width:1.8;stroke-linejoin:round}
polyline.a{stroke:var(--a)}polyline.b{stroke:var(--b)}polyline.c{stroke:var(--c)}circle.a{fill:var(--a)}circle.b{fill:var(--b)}
circle.c{fill:var(--c)}
.g0{fill:#2f6fde}.g1{fill:#2a9d74}.g2{fill:#c9a227}.g3{fill:#d9822b}.g4{fill:#c8452f}.g5{fill:#7b3f98}.key.g0{color:#2f6fde}
.key.g1{color:#2a9d74}.key.g2{color:#c9a227}.key.g3{color:#d9822b}.key.g4{color:#c8452f}.key.g5{color:#7b3f98}.key{font-weight:400;font-size:12px;margin-left:10px}.key.a{color:var(--a)}.key.b{color:var(--b)}
.key.c{color:var(--c)}.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;table-layout:fixed;
background:var(--card); border:1px
solid var(--rule);border-radius:10px}td,th{border-top:1px solid var(--rule);padding:9px 12px;text-align:left;
vertical-align:top}th{font-size:13px;color:var(--soft);border-top:0}td{white-space:pre-wrap;overflow-wrap:anywhere;min-width:150px}
.reward{display:block;color:var(--soft);font-size:13px;margin-bottom:3px}details{margin-top:30px}
pre{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px;overflow-x:auto;font-size:13px}
"""


def write_report(run_dir: Path) -> Path:
    """Writes the page from what the run directory holds so far, and returns its path."""
    metrics = read_steps(run_dir / METRICS_FILE)[0]
    evaluations = [from_json(row) for row in read_steps(run_dir / EVALUATIONS_FILE)[0]]
    config = run_dir / CONFIG_FILE
    path = run_dir / REPORT_FILE
    data = run_dir / DATA_FILE
    dropped = json.loads(data.read_text())["dropped"] if data.exists() else {}
    buffer = run_dir / FILE_NAME
    if buffer.exists():
        set_aside = ExperienceView(buffer).drop_reasons()
        dropped |= {f"a prompt was set aside: {reason}": count for reason, count in set_aside.items()}
    resolved = config.read_text() if config.exists() else ""
    replace_durably(path, page(run_dir.name, metrics, evaluations, resolved, dropped))
    return path


def write_data(run_dir: Path, said: str, dropped: Mapping[str, int]) -> None:
    """RUN_DIR/data.json: the data in a line, and how many rows were left out before the run, by reason."""
    replace_durably(run_dir / DATA_FILE, json.dumps({"data": said, "dropped": dict(dropped)}, indent=1) + "\n")


def page(
    title: str,
    metrics: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    config: str,
    dropped: Mapping[str, int],
) -> str:
    """The page as text; a pure function."""
    steps = f"{len(metrics)} steps" if metrics else "no step is trained yet"
    body = [
        f"<h1>{html.escape(title)}</h1><p class='sub'>{steps}</p>",
        f"<div class='cards'>{''.join(_cards(metrics, evaluations))}</div>",
        f"<h2>Curves</h2><div class='charts'>{''.join(_charts(metrics, evaluations))}</div>",
        _answers(evaluations),
        _counts(metrics, dropped),
        f"<details><summary>Run file, resolved</summary><pre>{html.escape(config)}</pre></details>",
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width,initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _cards(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> list[str]:
    cards = []
    before, after = (evaluations[0], evaluations[-1]) if len(evaluations) > 1 else (None, None)
    if isinstance(before, HeldoutReport) and isinstance(after, HeldoutReport):
        cards.append(_card(f"{before.reward_mean:.3g} → {after.reward_mean:.3g}", "held-out reward, before → after"))
        cards.append(_card(f"{rise_in_deviations(before, after):+.2f} σ", "rise in standard deviations"))
    elif before and after:
        earlier, later = before.scalars(), after.scalars()
        cards += [
            _card(f"{earlier[name]:.4g} → {later[name]:.4g}", f"held-out {name}, before → after")
            for name in earlier.keys() & later.keys() & set(HELDOUT_CARDS)
        ]
    if metrics:
        last = metrics[-1]
        shown = [("reward/mean", "reward, last step"), ("kl/k1", "KL, last step"), ("policy_version", "policy version")]
        cards += [_card(f"{last[name]:.4g}", label) for name, label in shown if name in last]
        seconds = [row["time/step_s"] for row in metrics if "time/step_s" in row]
        if seconds:
            cards.append(_card(f"{math.fsum(seconds) / len(seconds):.1f} s", "a step on average"))
    return cards


def _card(value: str, label: str) -> str:
    return f"<div class='card'><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"


def _charts(metrics: Sequence[Mapping[str, Any]], evaluations: Sequence[Evaluation]) -> list[str]:
    charts = []
    for name in dict.fromkeys(name for evaluation in evaluations for name in evaluation.scalars()):
        points = [(e.step, e.scalars()[name]) for e in evaluations if name in e.scalars()]
        title = "Held-out reward" if name == "reward_mean" else f"Held-out: {name}"
        charts.append(line_chart(title, [Series("mean", points, "a")]))
    for title, lines in CHARTS.items():
        series = [
            Series(name, [(row["step"], row[metric]) for row in metrics if metric in row], css)
            for (name, metric), css in zip(lines, COLOURS, strict=False)
        ]
        charts.append(line_chart(title, [line for line in series if line.points]))
    charts.append(_ages(metrics))
    return [chart for chart in charts if chart] or ["<p>Nothing was measured yet.</p>"]


def _ages(metrics: Sequence[Mapping[str, Any]]) -> str:
    """How old the samples of each step were; nothing where all were fresh."""
    rows = [row for row in metrics if all(metric in row for _, metric in AGES)]
    if not any(row["staleness/fraction_0"] < 1 for row in rows):
        return ""
    seen = [(name, metric, css) for (name, metric), css in zip(AGES, AGE_COLOURS, strict=True)]
    layers = [
        Series(name, [(row["step"], row[metric]) for row in rows], css)
        for name, metric, css in seen
        if any(row[metric] for row in rows)
    ]
    return share_chart("Age of samples when trained (versions, share of samples)", layers)


def _answers(evaluations: Sequence[Evaluation]) -> str:
    """The shown prompts of the first and the last evaluation, side by side."""
    if not evaluations or not evaluations[0].samples:
        return ""
    before, after = evaluations[0], evaluations[-1]
    later = {answer.prompt: answer for answer in after.samples}
    rows = "".join(
        f"<tr><td>{html.escape(answer.prompt)}</td><td>{_answer(answer)}</td><td>{_answer(later.get(answer.prompt))}</td></tr>"
        for answer in before.samples
    )
    return (
        "<h2>Held-out prompts, before and after</h2><div class='wide'><table><tr><th>prompt</th>"
        f"<th>after {before.step} steps</th><th>after {after.step} steps</th></tr>{rows}</table></div>"
    )


def _answer(answer: Answer | None) -> str:
    if answer is None:
        return "<span class='reward'>not answered</span>"
    reward = "could not be scored" if answer.reward is None else f"reward {answer.reward:.3g}"
    cut = ", cut at the length limit" if answer.finish_reason == "length" else ""
    return f"<span class='reward'>{reward}{cut}</span>{html.escape(answer.completion)}"


def _counts(metrics: Sequence[Mapping[str, Any]], dropped: Mapping[str, int]) -> str:
    """Sums of everything that was dropped or went wrong."""
    names = sorted({name for row in metrics for name in row if name.startswith(COUNTED)})
    sums: dict[str, float] = {f"rows of the data left out: {reason}": count for reason, count in dropped.items()}
    sums |= {name: math.fsum(row[name] for row in metrics if name in row) for name in names}
    listed = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{total:g}</td></tr>" for name, total in sums.items() if total
    )
    if not listed:
        return "<h2>Faults and drops</h2><p class='sub'>none were recorded</p>"
    return f"<h2>Faults and drops</h2><table><tr><th>what</th><th>how many</th></tr>{listed}</table>"
