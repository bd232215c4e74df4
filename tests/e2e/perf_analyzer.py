"""Triton's perf_analyzer, where a machine has one that runs."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

RUN_TIMEOUT_S = 120.0


class Report(NamedTuple):
    """What a run measured.

    Attributes:
        per_s: Requests answered in a second.
        text: What it printed.
    """

    per_s: float
    text: str


class PerfAnalyzer:
    """A perf_analyzer that runs here.

    Args:
        binary: The program. Libraries that lie beside it are found.

    Raises:
        OSError: It does not run; the message says why.
    """

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        paths = [str(binary.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        self._environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths))}
        done = self._run(["--version"])
        if done.returncode:
            lines = (done.stderr + done.stdout).splitlines()
            why = next((line for line in lines if "GLIBC_" in line or "cannot open" in line), " ".join(lines[-1:]))
            raise OSError(why.strip() or f"{binary} ends with status {done.returncode}")

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._binary, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RUN_TIMEOUT_S,
        )

    def measure(
        self, url: str, model: str, data: Path, *options: str, r: int, requests: int, concurrency: int = 2
    ) -> Report:
        """Sends a number of requests by HTTP, each with the header `x-r`; fails the test where one has no answer.

        Args:
            url: The server.
            model: Its model.
            data: The inputs, as a JSON file of perf_analyzer's.
            options: Further options, such as the service kind.
            r: The value of the header.
            requests: How many; it may send a few more, which it does not count.
            concurrency: How many at a time.
        """
        table = data.with_suffix(".csv")
        flags = ["-m", model, "-i", "http", "-u", url.removeprefix("http://"), "-H", f"x-r: {r}", "-f", str(table)]
        counts = ["--request-count", str(requests), "--concurrency-range", str(concurrency)]
        done = self._run([*flags, "--input-data", str(data), *counts, *options])
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        (row,) = csv.DictReader(table.read_text().splitlines())
        return Report(float(row["Inferences/Second"]), text)


def find(environment: Mapping[str, str], beside: Path) -> PerfAnalyzer | str:
    """The perf_analyzer of this machine, or why there is none that runs.

    Args:
        environment: `PERF_ANALYZER` may name the binary; else it is looked for in `PATH`.
        beside: A folder that is searched before `PATH`, such as Python's.
    """
    folders = os.pathsep.join([str(beside), environment.get("PATH", "")])
    found = environment.get("PERF_ANALYZER") or shutil.which("perf_analyzer", path=folders)
    how = "tests/e2e/fetch_perf_analyzer.sh fetches one that needs glibc 2.34"
    if found is None:
        return f"there is no perf_analyzer; its wheel needs glibc 2.38, and {how}"
    try:
        return PerfAnalyzer(Path(found).resolve())
    except OSError as error:
        return f"perf_analyzer does not run: {error}; {how}"
