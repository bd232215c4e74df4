# The server with its bundled model: no compiler, no pip, a user of its own, a root file system that may be read-only.
#   docker build -t tome-server .          # Docker 25 or later
#   docker run --rm -p 8000:8000 tome-server
#   docker run --rm -p 8000:8000 --gpus all tome-server
# What the package registry has of torch is CUDA's build: it runs everywhere, and is large. Build arguments:
#   PIP_OPTIONS       goes to pip: "--extra-index-url URL" of a CPU build of torch makes a much smaller image
#   EXTRAS            extras of ours to install, apart by spaces
#   RUNTIME_PACKAGES  Debian packages: "gcc libc6-dev" lets Triton build its launcher, without which a GPU runs unfused
FROM python:3.11-slim AS build
ARG PIP_OPTIONS=""
ARG EXTRAS="openvino redis grpc"
WORKDIR /src
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++
# The dependencies are a layer of their own, which a change of our code neither builds nor pulls again.
COPY pyproject.toml constraints.txt ./
RUN python -m venv --without-pip /opt/tome-server \
    && python -c "import sys, tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *sum((p['optional-dependencies'][e] for e in sys.argv[1:]), []), sep='\n')" ${EXTRAS} > requirements.txt \
    && pip --python /opt/tome-server install --no-cache-dir --constraint constraints.txt ${PIP_OPTIONS} --requirement requirements.txt \
    && find /opt/tome-server -type d -name tests -prune -exec rm -r {} +
COPY README.md LICENSE ./
COPY tome_core tome_core
COPY server server
RUN pip --python /opt/tome-server install --no-cache-dir --no-deps ${PIP_OPTIONS} --target /opt/code .
# What every first start would make: the operator that merges in OpenVINO, for all CPUs, and the bundled model's translations.
ENV PATH=/opt/code/bin:/opt/tome-server/bin:$PATH PYTHONPATH=/opt/code TOME_STATE_DIR=/tmp/state TOME_BACKEND=openvino
RUN if [ -d /opt/tome-server/lib/python*/site-packages/openvino ]; then \
    python -P -m tome_core.openvino_operator \
    && tome-server classify --r 16 server/static/samples/lighthouse.jpg \
    && mv /tmp/state/openvino /opt/code/server/bundled/; fi

FROM python:3.11-slim
ARG RUNTIME_PACKAGES=""
# As process 1 Python would ignore SIGTERM until the supervisor listens for it; tini does not. Its version is the base image's.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini ${RUNTIME_PACKAGES} \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* \
    && groupadd --gid 10001 tome \
    && useradd --uid 10001 --gid tome --no-log-init --create-home --home-dir /var/lib/tome-server tome \
    && install --directory --owner tome --group tome /models
COPY --from=build /opt/tome-server /opt/tome-server
COPY --from=build /opt/code /opt/code
ENV PATH=/opt/code/bin:/opt/tome-server/bin:$PATH PYTHONPATH=/opt/code \
    TOME_HOST=0.0.0.0 TOME_STATE_DIR=/var/lib/tome-server HF_HOME=/models/huggingface
USER 10001:10001
VOLUME ["/models", "/var/lib/tome-server"]
EXPOSE 8000
HEALTHCHECK --start-period=300s --start-interval=1s --interval=5s --timeout=12s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/readyz' % os.environ.get('TOME_PORT', 8000), timeout=11)"]
ENTRYPOINT ["tini", "--", "tome-server"]
CMD ["serve"]
