"""The ladder of `r=auto` from a curve: the rows worth choosing."""

from __future__ import annotations

from server.batching.policy import Rung
from server.curve import Curve, CurveRow


def steps_of(curve: Curve) -> list[Rung]:
    """The ladder of a curve with speeds: r=0, then each row faster than all rows of the same or better agreement."""

    def of(row: CurveRow) -> Rung:
        assert row.line is not None, "the caller times what was not measured"
        return Rung(row.r, *row.line, row.agreement)

    unmerged, *others = map(of, curve.rows)
    ladder = [unmerged]
    full = curve.max_batch_size
    for step in sorted(others, key=lambda step: (-(step.agreement or 0.0), step.batch_s(full))):
        if step.batch_s(full) < ladder[-1].batch_s(full):
            ladder.append(step)
    return ladder
