"""The summary of a load: one row of the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from server import dial
from server.bench.load import Reply, Run
from server.dial import PlainR

R = PlainR | Literal["auto"] | None
"""`r` as asked: a number, a list of one per block, "auto", or None for the deployment's."""

REFUSED = (429, 503)
TOO_LATE = 504
LAG_S = 0.002
HEAD = (
    f"{'r':>6} {'load':>11} {'sent':>7} {'answers/s':>9} {'goodput/s':>9} {'goodput %':>9} {'p50 ms':>8} {'p90 ms':>8} "
    f"{'p99 ms':>8} {'mean r':>6} {'late':>6} {'refused':>7} {'failed':>6}"
)


@dataclass(frozen=True, slots=True)
class LoadRow:
    """One `r` under one load.

    Attributes:
        r: The requested value: a number, "auto", or None for the deployment's.
        load: "50/s" or "64 clients".
        per_s: Rate of an open loop.
        clients: Number of clients of a closed loop.
        sent: Requests; each is good, late, refused or failed.
        seconds: Duration of the load, until its last answer.
        throughput: Requests answered with 200, per second.
        goodput: Requests answered with 200 within the deadline, per second.
        goodput_share: Those, as a share of all requests.
        p50_ms: Median latency of the answers with 200; from the due time in an open loop.
        mean_r: Mean over the answers.
        late: Answered after the deadline, or given up by the server because of it (504).
        refused: 429 and 503.
        failed: Any other status, or no answer.
        lateness_ms: 99th percentile of the sender's lateness; of its event loop's in a closed loop.
        problems: An example message for each status except 200.
    """

    r: R
    load: str
    per_s: float | None
    clients: int | None
    sent: int
    seconds: float
    throughput: float
    goodput: float
    goodput_share: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    mean_r: float | None
    late: int
    refused: int
    failed: int
    lateness_ms: float
    problems: dict[str, str]

    @property
    def lagged(self) -> bool:
        """Whether the sender distorts the latencies: it was late by more than 2 ms and a tenth of the p99."""
        return self.lateness_ms > max(1e3 * LAG_S, 0.1 * (self.p99_ms or 0.0))

    def __str__(self) -> str:
        milliseconds = (f"{'' if ms is None else f'{ms:.1f}':>8}" for ms in (self.p50_ms, self.p90_ms, self.p99_ms))
        mean_r = "" if self.mean_r is None else f"{self.mean_r:.1f}"
        return (
            f"{text_of(self.r):>6} {self.load:>11} {self.sent:>7} {self.throughput:>9.1f} "
            f"{self.goodput:>9.1f} {100 * self.goodput_share:>9.1f} {' '.join(milliseconds)} {mean_r:>6} "
            f"{self.late:>6} {self.refused:>7} {self.failed:>6}"
        )


def text_of(r: R) -> str:
    """`r` as the command line and the query take it; nothing for the deployment's."""
    return "" if r is None else r if isinstance(r, str) else dial.text_of(r)


def name_of(r: R) -> str:
    return "the deployment's r" if r is None else f"r={text_of(r)}"


def percentile(rising: Sequence[float], share: float) -> float | None:
    """The smallest value that is not exceeded by this share of the values; None if there are none."""
    return rising[max(0, math.ceil(share * len(rising)) - 1)] if rising else None


def is_good(reply: Reply, deadline_s: float | None) -> bool:
    """Whether it was answered in time."""
    return reply.status == 200 and (deadline_s is None or reply.seconds <= deadline_s)


def row_of(
    run: Run,
    r: R,
    *,
    per_s: float | None = None,
    clients: int | None = None,
    deadline_s: float | None = None,
) -> LoadRow:
    """Summarises a load at a rate per second, or with a number of clients."""
    answered = [reply for reply in run.replies if reply.status == 200]
    good = sum(is_good(reply, deadline_s) for reply in answered)
    refused = sum(reply.status in REFUSED for reply in run.replies)
    given_up = sum(reply.status == TOO_LATE for reply in run.replies)
    seconds = sorted(reply.seconds for reply in answered)
    ms = {share: None if (s := percentile(seconds, share)) is None else 1e3 * s for share in (0.5, 0.9, 0.99)}
    numbers = [reply.said for reply in answered if reply.said is not None]
    problems = {str(reply.status or "no answer"): reply.said for reply in run.replies if reply.status != 200}
    return LoadRow(
        r=r,
        load=f"{clients} clients" if per_s is None else f"{per_s:g}/s",
        per_s=per_s,
        clients=clients,
        sent=len(run.replies),
        seconds=run.seconds,
        throughput=len(answered) / run.seconds,
        goodput=good / run.seconds,
        goodput_share=good / len(run.replies) if run.replies else 0.0,
        p50_ms=ms[0.5],
        p90_ms=ms[0.9],
        p99_ms=ms[0.99],
        mean_r=sum(numbers) / len(numbers) if numbers else None,
        late=len(answered) - good + given_up,
        refused=refused,
        failed=len(run.replies) - len(answered) - refused - given_up,
        lateness_ms=1e3 * (percentile(sorted(run.lateness_s), 0.99) or 0.0),
        problems=problems,
    )
