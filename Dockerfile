# The server with its bundled model, as a user of its own.
#   docker build -t tome-server .
#   docker run --rm -p 8000:8000 tome-server
# PIP_OPTIONS goes to pip: "--extra-index-url URL" of a CPU build of torch makes a much smaller image.

FROM python:3.11-slim AS build
ARG PIP_OPTIONS=""
WORKDIR /src
RUN python -m venv /opt/tome-server
ENV PATH=/opt/tome-server/bin:$PATH
# The dependencies are a layer of their own, which a change of our code leaves alone.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['openvino'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir --constraint constraints.txt ${PIP_OPTIONS} --requirement requirements.txt
COPY README.md LICENSE ./
COPY tome_core tome_core
COPY server server
RUN pip install --no-cache-dir --no-deps ${PIP_OPTIONS} .

FROM python:3.11-slim
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/tome-server tome
COPY --from=build /opt/tome-server /opt/tome-server
ENV PATH=/opt/tome-server/bin:$PATH TOME_HOST=0.0.0.0 TOME_STATE_DIR=/var/lib/tome-server
USER tome
VOLUME /var/lib/tome-server
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=12s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/readyz' % os.environ.get('TOME_PORT', 8000), timeout=11)"]
ENTRYPOINT ["tome-server"]
CMD ["serve"]
