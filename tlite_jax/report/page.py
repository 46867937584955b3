"""A run as one HTML page that needs no network: everything it shows is in it."""

import html
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from tlite_jax.report.charts import CLIP, Line, chart, short
from tlite_jax.report.learning import learning
from tlite_jax.report.markup import duration, lines, side_by_side, table
from tlite_jax.report.read import Consumed, RunData
from tlite_jax.telemetry.goodput import Account, Start
from tlite_jax.telemetry.plots import smoothed

_MOST_LINES = 8  # in one chart
_MOST_BUCKETS = 200  # in the table
_MOST_FINDINGS = 50
_SLOW_DEVICE, _STOOD_STILL = 1.1, 0.1
_PART_NAMES = {
    "step": "steps that count",
    "compile": "compiling",
    "init": "starting",
    "restore": "restoring",
    "data_wait": "waiting for data",
    "checkpoint": "blocked by checkpoints",
    "evaluation": "evaluation",
    "lost": "steps lost and done again",
    "restart_wait": "waiting for a restart",
    "other": "other",
}


def render(run: RunData, *, refresh_seconds: int | None = None) -> str:
    """The page.

    Args:
      run: from `read_run`.
      refresh_seconds: the page loads itself anew that often; None: never.
    """
    style = resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")
    script = resources.files(__package__).joinpath("pointer.js").read_text(encoding="utf-8")
    refresh = f'<meta http-equiv="refresh" content="{refresh_seconds}">' if refresh_seconds else ""
    name = html.escape(str(run.directory))
    sections = [_head(run), learning(run), _forgetting(run), _mixture(run), _speed(run), _hours(run), _facts(run)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>{refresh}'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body>{CLIP}{''.join(sections)}<script>{script}</script></body></html>\n"
    )


def _head(run: RunData) -> str:
    config, total = run.config, run.total_steps
    last = run.records[-1] if run.records else {}
    losses = run.series("loss")[1]
    tiles = {
        "step": f"{run.step:,}" + (f" of {total:,}" if total else ""),
        "tokens": short(run.step * config.train.batch_size * config.data.sequence_length),
        "loss": f"{smoothed(losses[np.isfinite(losses)])[-1]:.4f}" if np.isfinite(losses).any() else "",
        "tokens/s": _latest(run, "tokens_per_second"),
        "tokens/s/device": _latest(run, "tokens_per_second_per_device"),
        "mfu": _latest(run, "mfu", percent=True),
        "mfu_causal": _latest(run, "mfu_causal", percent=True),
        "goodput": f"{run.account.goodput:.1%}" if run.account else "",
        "time left": _time_left(run),
    }
    cells = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in tiles.items() if value)
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(last["time"])) if last else "nothing logged yet"
    hashes = f"semantic {config.semantic_hash()} · execution {config.execution_hash()}"
    return (
        f'<h1>{html.escape(str(run.directory))}</h1><p class="sub">{_status(run)} · last metrics {written} · {hashes}'
        f'</p><dl class="tiles">{cells}</dl>'
    )


def _status(run: RunData) -> str:
    if run.total_steps and run.step >= run.total_steps:
        return "done"
    last = run.account.starts[-1] if run.account else None
    if last is not None and last.status is not None:
        return html.escape(last.status)
    if not run.records:
        return "not started"
    return f"silent for {duration(run.seconds_silent)}" if run.seconds_silent > 600 else "running"


def _latest(run: RunData, name: str, *, percent: bool = False) -> str:
    """The median of the last 20 values."""
    values = run.series(name)[1]
    values = values[np.isfinite(values)][-20:]
    if not len(values):
        return ""
    return f"{np.median(values):.1%}" if percent else short(float(f"{np.median(values):.4g}"))


def _time_left(run: RunData) -> str:
    speeds = run.series("tokens_per_second")[1][-20:]
    speeds = speeds[np.isfinite(speeds) & (speeds > 0)]
    if not run.total_steps or run.step >= run.total_steps or not len(speeds):
        return ""
    tokens = run.config.train.batch_size * run.config.data.sequence_length
    return duration((run.total_steps - run.step) * tokens / float(np.median(speeds)))


def _forgetting(run: RunData) -> str:
    names = run.names("bits_per_byte")
    if not names:
        return (
            "<h2>Forgetting</h2><p class='none'>no evaluation yet: set data.prepare.held_out and evaluation.every</p>"
        )
    # Labels tell more than buckets, which often repeat them.
    names.sort(key=lambda name: (name != "all", "=" not in name))
    labels = [name for name in names if name == "all" or "=" in name]
    rows, changes = [], []
    has_kl = bool(run.names("kl"))
    for name in names:
        x, bits = run.series(f"bits_per_byte/{name}")
        deltas = run.series(f"bits_per_byte_delta/{name}")[1]
        delta = deltas if len(deltas) == len(bits) else bits - bits[0]
        if name in labels or not labels:
            changes.append((abs(float(delta[-1])), Line(name, x, delta, dots=True)))
        kl = run.series(f"kl/{name}")[1]
        cells = [f"{bits[-1] - delta[-1]:.4f}", f"{bits[-1]:.4f}", _signed(float(delta[-1]), f"{delta[-1]:+.4f}")]
        rows.append([html.escape(name), *cells, *([f"{kl[-1]:.4f}" if len(kl) else ""] if has_kl else [])])
    header = ["held-out text", "base", "now", "change", *(["KL(base‖now)"] if has_kl else [])]
    most = sorted(changes, key=lambda pair: -pair[0])[:_MOST_LINES]
    y_label = "bits per byte, change from the base (below 0 is better)"
    charts = [chart([line for _, line in most], x_label="tokens", y_label=y_label, zero=True)]
    if has_kl:
        charts.append(_group(run, "kl", "KL(base‖now), nats a token"))
    if run.series("objective")[0].size:
        charts.append(chart(lines(run, ["objective"], dots=True), x_label="tokens", y_label="objective"))
    others = [prefix for prefix in ("task", "tasks", "eval") if run.names(prefix)]
    charts += [_group(run, prefix, "benchmark tasks") for prefix in others]
    return f"<h2>Forgetting</h2>{_alerts(run)}{table(header, rows)}{side_by_side(charts)}"


def _alerts(run: RunData) -> str:
    parts = []
    for name in run.names("alert"):
        x, raised = run.series(f"alert/{name}")
        if raised.any():
            now = "and still is" if raised[-1] else "but is not any more"
            first = short(float(x[np.argmax(raised > 0)]))
            what = html.escape(name)
            parts.append(f'<p class="alert">{what} passed its limit, first at {first} tokens, {now}</p>')
    return "".join(parts)


def _mixture(run: RunData) -> str:
    if not run.consumed:
        return ""
    planned, consumed = (sum(getattr(one, key) for one in run.consumed) for key in ("planned", "consumed"))
    parts = ["<h2>Mixture, planned against consumed</h2>"]
    for label in sorted({label for one in run.consumed for label in one.labels}):
        values: dict[str, list[Consumed]] = {}
        for one in run.consumed:
            values.setdefault(one.labels.get(label, "(none)"), []).append(one)
        if 1 < len(values) <= 30:
            rows = [_share(value, ones, planned, consumed) for value, ones in sorted(values.items())]
            parts.append(table([label, "planned", "consumed", "difference", "rows"], rows))
    rows = []
    for one in sorted(run.consumed, key=lambda one: -one.planned)[:_MOST_BUCKETS]:
        epochs = [f"{count / one.rows:.3f}" for count in (one.planned, one.consumed)]
        rows.append([html.escape(one.name), f"{one.rows:,}", *epochs, *_share("", [one], planned, consumed)[1:]])
    header = ["bucket", "rows there", "epochs planned", "so far", "planned", "consumed", "difference", "rows"]
    more = len(run.consumed) - len(rows)
    note = f'<p class="note">and {more} smaller ones</p>' if more > 0 else ""
    summary = f"{len(run.consumed)} buckets"
    parts.append(f"<details open><summary>{summary}</summary>{table(header, rows)}{note}</details>")
    return "".join(parts)


def _share(name: str, ones: Sequence[Consumed], planned: int, consumed: int) -> list[str]:
    """[name, planned share, consumed share, difference in points, rows consumed]."""
    plan = sum(one.planned for one in ones) / planned
    rows = sum(one.consumed for one in ones)
    if not consumed:
        return [html.escape(name), f"{plan:.2%}", "", "", "0"]
    share = rows / consumed
    return [html.escape(name), f"{plan:.2%}", f"{share:.2%}", f"{100 * (share - plan):+.2f}", f"{rows:,}"]


def _speed(run: RunData) -> str:
    names = {"tokens_per_second_per_device": "tokens a second and device", "tokens_per_second": "tokens a second"}
    found = [(name, label) for name, label in names.items() if run.series(name)[0].size][:1]
    charts = [chart(lines(run, [name]), x_label="tokens", y_label=label, zero=True) for name, label in found]
    if run.series("mfu")[0].size:
        charts.append(
            chart(lines(run, ["mfu", "mfu_causal"]), x_label="tokens", y_label="model FLOPs utilisation", zero=True)
        )
    return f"<h2>Throughput</h2>{side_by_side(charts)}" if charts else ""


def _hours(run: RunData) -> str:
    if run.account is None or not run.account.seconds:
        return ""
    account = run.account
    return f"<h2>Where the hours went</h2>{_goodput(account)}{_starts(account.starts)}{_stragglers(run)}"


def _stragglers(run: RunData) -> str:
    """Processes that the others waited for, as often as one became slow or kept up again; the newest last."""
    rows = []
    for one in run.stragglers[-_MOST_FINDINGS:]:
        said = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"]))
        ratio = f"{one['ratio']:.1f}" if one["slow"] else ""
        process = f"{one['process']} ({one['host']})"
        rows.append([f"{one['step']:,}", said, html.escape(process), ratio, html.escape(_cause(one))])
    header = ["step", "said", "process", "times slower", "of its time"]
    return f"<h3>Slow processes</h3>{table(header, rows)}" if rows else ""


def _cause(finding: Mapping[str, Any]) -> str:
    if not finding["slow"]:
        return "keeps up with the others again"
    parts = [f"data wait {finding['data_wait']:.0%}", f"other work of its host {finding['other']:.0%}"]
    if finding["device_ratio"] >= _SLOW_DEVICE:
        parts.insert(0, f"its devices are {finding['device_ratio']:.1f} times slower")
    if finding["stalled"] >= _STOOD_STILL:
        parts.append(f"stood still {finding['stalled']:.0%}")
    if finding.get("delayed", 0.0) >= _STOOD_STILL:  # runs of before do not have it
        parts.append(f"waited for a CPU {finding['delayed']:.0%}")
    return ", ".join(parts)


def _goodput(account: Account) -> str:
    bars, rows = [], []
    for number, (part, name) in enumerate(_PART_NAMES.items()):
        seconds = account.parts[part]
        share = seconds / account.seconds
        colour = 2 if part == "step" else 4 if part == "lost" else (0, 1, 3, 5, 6, 7)[number % 6]
        if seconds > 0:
            bars.append(f'<i class="c{colour}" style="width:{100 * share:.2f}%" title="{name} {share:.1%}"></i>')
            rows.append([f'<i class="c{colour} key"></i>{name}', duration(seconds), f"{share:.2%}"])
    rows.append(["together", duration(account.seconds), ""])
    return f'<div class="bar">{"".join(bars)}</div>{table(["", "time", "share"], rows)}'


def _starts(starts: Sequence[Start]) -> str:
    rows = []
    for number, start in enumerate(starts):
        begun = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start.begin_time))
        ended = start.status or ("" if number + 1 == len(starts) else "killed")
        steps = f"{start.first_step:,} to {start.last_step:,}"
        rows.append([str(number + 1), begun, steps, duration(start.seconds), html.escape(ended)])
    return table(["start", "begun", "steps", "lasted", "ended"], rows)


def _facts(run: RunData) -> str:
    parts = ["<h2>Run</h2>"]
    if run.account and run.account.starts[-1].environment:
        facts = run.account.starts[-1].environment
        parts.append(table(["environment of the last start", ""], _flat(facts)))
    config = html.escape(run.config_text)
    parts.append(f"<details><summary>config.yaml</summary><pre>{config}</pre></details>")
    return "".join(parts)


def _flat(values: Mapping[str, object], prefix: str = "") -> list[list[str]]:
    rows = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append([html.escape(f"{prefix}{key}"), html.escape(str(value))])
    return rows


def _group(run: RunData, prefix: str, y_label: str) -> str:
    names = run.names(prefix)
    last = {name: float(run.series(f"{prefix}/{name}")[1][-1]) for name in names}
    most = sorted(names, key=lambda name: -last[name])[:_MOST_LINES]
    lines = [Line(name, *run.series(f"{prefix}/{name}"), dots=True) for name in most]
    return chart(lines, x_label="tokens", y_label=y_label, zero=True)


def _signed(value: float, text: str) -> str:
    """Green below 0, red above."""
    return f'<span class="{"bad" if value > 0 else "good"}">{text}</span>'
