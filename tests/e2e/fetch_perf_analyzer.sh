#!/usr/bin/env bash
# Puts a perf_analyzer that runs on glibc 2.34 or newer into a folder, with the two libraries that it loads. From 2.52 on it
# needs glibc 2.38, which Debian 12 and Ubuntu 22.04 do not have. Needs Debian or Ubuntu on x86-64; no root.
#   tests/e2e/fetch_perf_analyzer.sh FOLDER
#   PERF_ANALYZER=FOLDER/perf_analyzer python -m pytest tests/e2e/test_perf_analyzer.py
set -euo pipefail
folder=$(realpath --canonicalize-missing "${1:?name a folder}")
work=$(mktemp --directory)
trap 'rm -r "$work"' EXIT
mkdir -p "$folder"
cd "$work"
python3 -m pip download --quiet --no-deps --only-binary :all: --platform manylinux1_x86_64 tritonclient==2.51.0
python3 -m pip download --quiet --no-deps nvidia-cuda-runtime-cu12
apt-get download libb64-0d
for wheel in *.whl; do python3 -m zipfile --extract "$wheel" .; done
dpkg-deb --extract libb64-0d_*.deb .
cp --dereference tritonclient-*.data/data/bin/perf_analyzer nvidia/cuda_runtime/lib/libcudart.so.12 \
  usr/lib/x86_64-linux-gnu/libb64.so.0d "$folder"
chmod +x "$folder/perf_analyzer"
LD_LIBRARY_PATH=$folder "$folder/perf_analyzer" --version
