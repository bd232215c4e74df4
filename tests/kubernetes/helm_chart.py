"""Lints and renders the Helm chart by Helm's own library.

A program of its own: the library brings the runtime of Go and its signal handlers. It reads the values of a release and
prints, both as JSON, what lint finds and the files, or why Helm refuses the values.
"""

from __future__ import annotations

import json
import sys

import helm_python

if __name__ == "__main__":
    chart, values = sys.argv[1], json.load(sys.stdin)
    answer: dict[str, object] = {}
    try:
        with helm_python.Chart.load(chart) as loaded:
            loaded.validate_schema(values)
            answer["files"] = loaded.render(values, name="photos", namespace="vision")
        answer["lint"] = [
            each for each in helm_python.lint(chart, values, strict=True)["messages"] if each["severity"] > 1
        ]
    except helm_python.HelmError as error:
        answer["error"] = str(error)
    json.dump(answer, sys.stdout)
