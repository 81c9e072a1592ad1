"""The status page: what the processes report, merged, as figures and as HTML.

A leaf of the package, functions of their arguments only. Everything that is shown is made here, also for the
page's script (status.js), which puts it where this module has put it before: `shown` in the JSON is text that
is ready to be read, the rest are numbers for other programs. All text is escaped; file names also get <bdi>,
because they may contain what turns the direction of writing.
"""

from __future__ import annotations

import time
from html import escape
from typing import Any

#: Seconds of the chart, and its height in the units of its viewBox.
WIDTH, HEIGHT = 300, 60

#: Seconds between two loads of the page where there is no script.
RELOAD = 5

#: Of the figures that are sums over all processes.
_SUMS = ("sessions", "uploads", "downloads", "waiting", "descriptors", "memory", "cpu")


def merged(reports: list[dict[str, Any]], columns: dict[int, dict[str, int]]) -> dict[str, Any]:
    """One status of what all processes report (`Reporter.status`) and have counted (`Counts.columns`)."""
    now = time.time()
    reports = sorted(reports, key=lambda each: each["slot"])
    status: dict[str, Any] = {
        "now": now,
        "state": "started" if any(each["state"] == "started" for each in reports) else "draining",
        **{key: _sum([each[key] for each in reports]) for key in _SUMS},
        "lag_max": max(each["lag_max"] for each in reports),
        "workers": [{k: v for k, v in each.items() if k not in ("history", "listed")} for each in reports],
        "totals": {},
        "history": _history([each["history"] for each in reports]),
        "listed": [{**session, "worker": each["slot"]} for each in reports for session in each["listed"]],
    }
    for column in columns.values():
        for field, count in column.items():
            if ":" not in field:
                status["totals"][field] = status["totals"].get(field, 0) + count
    for session in status["listed"]:
        session["shown"] = _session(session, now)
    status["shown"] = _figures(status)
    status["chart"] = _chart(status["history"], now)
    return status


def _sum(values: list[Any]) -> Any:
    """None if one is not known."""
    return None if None in values else sum(values)


def _history(histories: list[list[Any]]) -> list[list[float]]:
    """Points of the same second are one: the sum of all, of the lag the longest."""
    points: dict[int, list[float]] = {}
    for second, up, down, sessions, lag in (point for history in histories for point in history):
        known = points.setdefault(second, [second, 0, 0, 0, 0.0])
        known[1:] = [known[1] + up, known[2] + down, known[3] + sessions, max(known[4], lag)]
    return [points[second] for second in sorted(points)]


# --- figures


def size(count: float) -> str:
    """Bytes, to three digits."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Seconds, in the two largest units."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _figures(status: dict[str, Any]) -> dict[str, str]:
    last = status["history"][-1] if status["history"] else [0, 0, 0, 0, 0.0]
    totals = status["totals"]
    more = status["sessions"] - len(status["listed"])
    states = [each["state"] for each in status["workers"]]
    return {
        "state": "Serving" if status["state"] == "started" else "Draining: no new sessions",
        "sessions": str(status["sessions"]),
        "down": f"{size(last[2])}/s",
        "up": f"{size(last[1])}/s",
        "downloads": str(status["downloads"]),
        "uploads": str(status["uploads"]),
        "waiting": str(status["waiting"]),
        "lag": f"{status['lag_max'] * 1000:.0f} ms",
        "logins": str(totals.get("logins_ok", 0)),
        "logins_failed": str(totals.get("logins_failed", 0)),
        "transferred": size(totals.get("bytes_download", 0) + totals.get("bytes_upload", 0)),
        "failed": str(sum(totals.get(f"transfers_{way}_failed", 0) for way in ("upload", "download"))),
        "memory": "unknown" if status["memory"] is None else size(status["memory"]),
        "descriptors": "unknown" if status["descriptors"] is None else str(status["descriptors"]),
        "workers": str(states.count("started"))
        + (f" + {states.count('draining')} draining" if "draining" in states else ""),
        "more": f"and {more} more" if more > 0 else "",
    }


#: The figures in their order, what they are called, and what that means.
_TILES = (
    ("sessions", "Sessions", "now"),
    ("downloads", "Downloads", "of files, now"),
    ("uploads", "Uploads", "of files, now"),
    ("down", "Down", "bytes a second that clients download"),
    ("up", "Up", "bytes a second that clients upload"),
    ("transferred", "Transferred", "bytes of files since the start"),
    ("failed", "Failed transfers", "since the start"),
    ("logins", "Logins", "since the start"),
    ("logins_failed", "Failed logins", "since the start"),
    ("waiting", "Waiting turns", "sessions that wait for a file system, an authorizer, ..."),
    ("lag", "Hub lag", "the longest of the last minute"),
    ("memory", "Memory", "resident, of all processes"),
    ("descriptors", "Descriptors", "open, of all processes"),
    ("workers", "Workers", "processes that serve"),
)


def _session(session: dict[str, Any], now: float) -> dict[str, Any]:
    transfer = session["transfer"]
    shown: dict[str, Any] = {
        "user": session["user"] or "not logged in",
        "address": session["address"],
        "since": duration(now - session["since"]),
        "file": "",
        "amount": "",
        "rate": "",
        "progress": None,
    }
    if transfer is not None:
        shown["doing"] = transfer["command"]
        shown["file"] = transfer["path"] or "(listing)"
        shown["amount"] = size(transfer["position"])
        shown["rate"] = f"{size(transfer['rate'])}/s"
        if transfer["size"]:
            shown["amount"] += f" of {size(transfer['size'])}"
            shown["progress"] = min(transfer["position"] / transfer["size"], 1.0)
    elif session["command"]:
        shown["doing"] = session["command"]
    elif session["idle_since"] is not None:
        shown["doing"] = f"idle for {duration(now - session['idle_since'])}"
    else:
        shown["doing"] = ""
    if session["waiting_since"] is not None:
        shown["amount"] += f" waits for {duration(now - session['waiting_since'])}"
    return shown


def _chart(history: list[list[float]], now: float) -> dict[str, str]:
    """Two lines as points of SVG, and what their top stands for."""
    recent = [point for point in history if point[0] > now - WIDTH]
    top = max((max(point[1], point[2]) for point in recent), default=0) or 1

    def line(index: int) -> str:
        return " ".join(
            f"{WIDTH - now + point[0]:.0f},{HEIGHT - (HEIGHT - 2) * point[index] / top - 1:.1f}"
            for point in recent
        )

    return {"up": line(1), "down": line(2), "top": f"{size(top)}/s" if top > 1 else "nothing"}


# --- HTML


def render(status: dict[str, Any], token: str | None) -> str:
    """The page; with buttons that disconnect if there is a *token*."""
    shown, chart = status["shown"], status["chart"]
    tiles = "".join(
        f'<div title="{escape(text)}"><dt>{name}</dt><dd data-shown="{key}">{escape(shown[key])}</dd></div>\n'
        for key, name, text in _TILES
    )
    rows = "".join(_row(session, token) for session in status["listed"])
    empty = _row(None, token)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<noscript><meta http-equiv="refresh" content="{RELOAD}"></noscript>
<title>FTP server</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="status.css">
<script src="status.js" defer></script>
</head>
<body>
<header><h1>FTP server</h1> <p id="state" data-shown="state">{escape(shown["state"])}</p></header>
<p id="lost" role="status" hidden>The server does not answer.</p>
<main>
<figure>
<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="Transfer rates">
<polyline id="down" points="{chart["down"]}"/><polyline id="up" points="{chart["up"]}"/>
</svg>
<figcaption><span class="key down">down</span> <span class="key up">up</span>
<span>last {WIDTH // 60} minutes, top: <span id="top">{escape(chart["top"])}</span></span></figcaption>
</figure>
<dl>
{tiles}</dl>
<h2 id="of">Sessions</h2>
<table aria-labelledby="of">
<thead><tr><th scope="col">User</th><th scope="col">Doing</th><th scope="col">Transfer</th>
<th scope="col">Rate</th><th scope="col">Connected</th>{'<th scope="col"></th>' if token else ""}</tr></thead>
<tbody id="sessions">
{rows}</tbody>
</table>
<p id="more" data-shown="more">{escape(shown["more"])}</p>
</main>
<template id="row">{empty}</template>
</body>
</html>
"""


def _row(session: dict[str, Any] | None, token: str | None) -> str:
    """One session; None for a template of it."""
    name = "" if session is None else session["id"]
    shown = {} if session is None else session["shown"]

    def text(key: str) -> str:
        return f'<span class="{key}">{escape(shown.get(key, ""))}</span>'

    progress = shown.get("progress")
    transfers = session is not None and session["transfer"] is not None
    value = "" if progress is None else f' value="{progress:.3f}"'
    form = ""
    if token:
        form = (
            '<td class="act"><form method="post" action="disconnect">'
            f'<input type="hidden" name="session" value="{escape(name)}">'
            f'<input type="hidden" name="token" value="{escape(token)}">'
            "<button>Disconnect</button></form></td>"
        )
    return (
        f'<tr id="s-{escape(name)}"><td>{text("user")} {text("address")}</td>'
        f'<td>{text("doing")} <bdi class="file">{escape(shown.get("file", ""))}</bdi></td>'
        f'<td><progress max="1"{value}{"" if transfers else " hidden"}></progress> {text("amount")}</td>'
        f"<td>{text('rate')}</td><td>{text('since')}</td>{form}</tr>\n"
    )
