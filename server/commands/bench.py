"""`tome-server bench`: how fast a running server answers, at each `r` under each load."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from server.commands.output import check_place
from server.dial import parse_r
from server.errors import InvalidError, SettingsError
from server.settings import Settings

if TYPE_CHECKING:
    from server.bench.rate import Found, Probe
    from server.bench.rows import LoadRow, R
    from server.bench.session import Session

HELP = "measure how fast a running server answers, at each r under each load"
SETTINGS: tuple[str, ...] = ("api_key", "api_key_file")
CLIENTS = 32  # clients that measure roughly how much a server can do
LEARN_S = 5.0
N = TypeVar("N", int, float)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Sends photos to a running server, one a request: at a rate, by the clock, whether or not it keeps up, with "
        "latency from the time at which a request was due; or from clients that wait for their answers. The last line "
        "is JSON."
    )
    parser.add_argument("--url", default="http://localhost:8000", help="the server (default: http://localhost:8000)")
    parser.add_argument("--images", required=True, type=Path, metavar="FOLDER", help="photos to send, as they are")
    parser.add_argument("--limit", type=int, default=1000, metavar="N", help="the most photos to use (default: 1000)")
    # Not the settings r and model, which say what to serve.
    parser.add_argument(
        "--r",
        dest="ladder",
        nargs="+",
        metavar="R",
        help="each r to measure: a number, a list like 16,14,12, or auto (default: the deployment's r)",
    )
    parser.add_argument(
        "--model", dest="model_name", metavar="NAME", help="name of a model on the server (default: its first)"
    )
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument("--rate", nargs="+", metavar="N", help="requests per second, at random times (Poisson)")
    loads.add_argument(
        "--concurrency", nargs="+", metavar="N", help="clients, each with one request at a time (default: 64)"
    )
    loads.add_argument("--find-rate", action="store_true", help="find the highest rate that keeps --p99-ms")
    parser.add_argument(
        "--p99-ms", type=float, metavar="MS", help="with --find-rate: the most milliseconds for 99 of 100 requests"
    )
    parser.add_argument("--duration", type=float, default=30, metavar="S", help="seconds of each load (default: 30)")
    parser.add_argument("--warmup", type=float, default=3, metavar="S", help="seconds before each r (default: 3)")
    parser.add_argument("--deadline-ms", type=float, metavar="MS", help="milliseconds after which an answer is useless")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of times and photos (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the table into this file (needs matplotlib)")


def run(settings: Settings, args: argparse.Namespace) -> int:
    from server.bench.client import Target
    from server.bench.rows import name_of
    from server.bench.session import Session
    from server.images.photos import choose_photos

    _check(args)
    try:
        target = Target.parse(args.url)
    except ValueError as error:
        raise SettingsError(f"--url: {error}") from None
    ladder = _ladder(args.ladder)
    rates, crowds = _numbers("rate", args.rate, float), _numbers("concurrency", args.concurrency, int)
    photos = [file.read_bytes() for file in choose_photos(args.images, args.limit, args.seed, least=1)]
    headers = {"x-api-key": settings.api_key} if settings.api_key else None
    session = Session(
        target, photos, model=args.model_name, deadline_ms=args.deadline_ms, headers=headers, seed=args.seed
    )
    for r in ladder:  # an error now is better than one after minutes
        if problem := session.check(r):
            raise SettingsError(f"{target}{'' if r is None else f' at {name_of(r)}'}: {problem}")
    deadline = "no deadline" if args.deadline_ms is None else f"deadline {args.deadline_ms:g} ms"
    title = f"{target}, {len(photos)} photos, {args.duration:g} s a load, {deadline}"
    print(title)
    facts = {"url": str(target), "photos": len(photos), "duration_s": args.duration, "deadline_ms": args.deadline_ms}
    if args.find_rate:
        result = [_find(session, r, args) for r in ladder]
        print(json.dumps(facts | {"p99_ms": args.p99_ms, "rates": result}))
    else:
        rows = _measure(session, ladder, rates, crowds or ([] if rates else [64]), args)
        if args.plot:
            _draw(rows, title, args.plot)
        print(json.dumps(facts | {"rows": [asdict(row) | {"lagged": row.lagged} for row in rows]}))
    return 0


def _measure(
    session: Session, ladder: Sequence[R], rates: Sequence[float], crowds: Sequence[int], args: argparse.Namespace
) -> list[LoadRow]:
    """A row for each `r` under each load, printed as it comes."""
    from server.bench.rows import HEAD, row_of

    deadline_s = None if args.deadline_ms is None else args.deadline_ms / 1e3
    rows: list[LoadRow] = []

    def add(row: LoadRow) -> None:
        rows.append(row)
        print(row, flush=True)

    print(HEAD, flush=True)
    for r in ladder:
        if args.warmup:
            session.with_clients(r, CLIENTS, args.warmup)
        for per_s in rates:
            add(row_of(session.at_rate(r, per_s, args.duration), r, per_s=per_s, deadline_s=deadline_s))
        for clients in crowds:
            add(row_of(session.with_clients(r, clients, args.duration), r, clients=clients, deadline_s=deadline_s))
    _explain(rows)
    return rows


def _explain(rows: Sequence[LoadRow]) -> None:
    """Prints why requests failed, and which loads were too fast for this sender."""
    problems = {status: said for row in rows for status, said in row.problems.items()}
    for status, said in sorted(problems.items()):
        print(f"{status}, for example: {said}")
    for row in rows:
        if row.lagged:
            print(
                f"{_name(row.r)}{row.load}: this sender was late itself, by {row.lateness_ms:.1f} ms (p99), and "
                "latencies hold that; send less, or from another machine"
            )


def _find(session: Session, r: R, args: argparse.Namespace) -> dict[str, Any]:
    """Finds the highest rate at one `r`; prints it, and returns it for the JSON."""
    from server.bench.progress import tell
    from server.bench.rate import Probe, find_rate
    from server.bench.rows import name_of, row_of

    bound_s = args.p99_ms / 1e3
    probes: list[dict[str, Any]] = []

    def probe(per_s: float) -> Probe:
        run = session.at_rate(r, per_s, args.duration)
        row = row_of(run, r, per_s=per_s)
        over = sum(reply.status == 200 and reply.seconds > bound_s for reply in run.replies)
        return Probe(row.sent, over, row.sent - round(row.throughput * row.seconds), row.lagged)

    def hear(per_s: float, seen: Probe) -> None:
        probes.append({"per_s": per_s, "passed": seen.passed, "sure": seen.sure, **asdict(seen)})
        tell(f"{name_of(r)} at {per_s:.1f}/s {'passes' if seen.passed else 'fails'}: {_seen(seen, args.p99_ms)}")

    session.with_clients(r, CLIENTS, args.warmup)
    lone = row_of(session.with_clients(r, 1, min(args.duration, LEARN_S)), r)
    if lone.p50_ms is None or lone.p50_ms > args.p99_ms:
        print(f"{_name(r)}no rate: {_lone(lone)}", flush=True)
        return {"r": r, "per_s": 0.0, "fails_at": None, "sure": True, "lone_p50_ms": lone.p50_ms, "probes": probes}
    capacity = row_of(session.with_clients(r, CLIENTS, min(args.duration, LEARN_S)), r).throughput
    found = find_rate(probe, capacity, hear)
    print(_name(r) + _words(found, args.p99_ms), flush=True)
    return {
        "r": r,
        "per_s": found.per_s,
        "fails_at": found.fails_at,
        "sure": found.sure,
        "lone_p50_ms": lone.p50_ms,
        "probes": probes,
    }


def _words(found: Found, bound_ms: float) -> str:
    """The found rate and its certainty, as text."""
    sure = "both sure at 95 %" if found.sure else "not sure at 95 %: longer, with --duration"
    fails = f"{found.fails_at:.1f}/s fails ({_seen(found.failed, bound_ms)})"
    if found.passed is None:
        return f"no rate: even {fails}"
    lagged = "; this sender was late itself at times" if found.passed.lagged or found.failed.lagged else ""
    return f"{found.per_s:.1f} requests/s ({_seen(found.passed, bound_ms)}); {fails}; {sure}{lagged}"


def _seen(seen: Probe, bound_ms: float) -> str:
    low, high = (100 * end for end in seen.interval)
    unanswered = f", {seen.unanswered} refused or failed" if seen.unanswered else ""
    return f"{seen.over} of {seen.sent} over {bound_ms:g} ms, {low:.2f} to {high:.2f} %{unanswered}"


def _lone(row: LoadRow) -> str:
    if row.p50_ms is None:
        return f"no answer to a lone client: {', '.join(row.problems.values())}"
    return f"a lone client's requests take {row.p50_ms:.1f} ms (median)"


def _name(r: R) -> str:
    from server.bench.rows import name_of

    return "" if r is None else f"{name_of(r)}: "


def _check(args: argparse.Namespace) -> None:
    """Refuses numbers out of range, and options that exclude each other."""
    for name in ("duration", "limit", "p99_ms", "deadline_ms"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise SettingsError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0")
    if not 0 <= args.warmup < math.inf:
        raise SettingsError(f"--warmup is {args.warmup:g}; it must be 0 or above")
    if args.find_rate != (args.p99_ms is not None):
        raise SettingsError("--find-rate and --p99-ms go together")
    if args.plot and args.find_rate:
        raise SettingsError("--plot draws a table; --find-rate has none")
    if args.plot:
        check_place("--plot", args.plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise SettingsError("--plot needs matplotlib; install it with: pip install matplotlib")


def _ladder(words: Sequence[str] | None) -> list[R]:
    """Each `r` once; the server knows which ones its model takes."""
    if words is None:
        return [None]
    try:
        return list(dict.fromkeys("auto" if word == "auto" else parse_r(word) for word in words))
    except InvalidError as error:
        raise SettingsError(f"--r: {error.message}") from None


def _numbers(name: str, words: Sequence[str] | None, kind: Callable[[str], N]) -> list[N]:
    """Words as numbers above 0."""

    def number(word: str) -> N:
        try:
            read = kind(word)
            if 0 < read < math.inf:
                return read
        except ValueError:
            pass
        raise SettingsError(f"--{name} holds {word!r}; it must list numbers above 0, like --{name} 50 100")

    return [number(word) for word in words or ()]


def _draw(rows: Sequence[LoadRow], title: str, file: Path) -> None:
    from server.bench.plot import draw

    try:
        draw(rows, title, file)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not write
        raise SettingsError(f"--plot is {file}: {error}") from None
