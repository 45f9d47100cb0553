# The gateway, without torch and without an engine: point NEWEL_ENGINE__URL at one.
#
#   docker build -t newel . && docker run -p 127.0.0.1:8080:8080 -e NEWEL_ENGINE__URL=http://gpu-1:8000/v1 \
#     -v newel:/var/lib/newel --read-only --tmpfs /tmp newel
#
# 9080 has the operators' routes and the metrics: publish it to none but them.
#
# BASE_IMAGE is any image with Python 3.11 to 3.13 as `python3`, with its venv module.
ARG BASE_IMAGE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
WORKDIR /src
RUN python3 -m venv /opt/newel
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY guardrails guardrails
COPY alignment alignment
COPY app app
RUN --mount=type=cache,target=/root/.cache/pip /opt/newel/bin/pip install --constraint constraints.txt ".[postgres,redis,otel]"
# The encoder of the guard's classifiers is made with libraries that only training has, in an environment of their own.
RUN --mount=type=cache,target=/root/.cache/pip python3 -m venv /opt/quantise \
    && /opt/quantise/bin/pip install --constraint constraints.txt onnx onnxruntime tokenizers \
    && NEWEL_HOME=/opt/newel/share/newel /opt/newel/bin/newel guard pull --python /opt/quantise/bin/python

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="newel" \
      org.opencontainers.image.description="The gateway of newel, a guardrailed chatbot stack" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/newel /opt/newel
RUN install --directory --owner=10001 --group=10001 --mode=0750 /var/lib/newel
ENV PATH=/opt/newel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NEWEL_HOST=0.0.0.0 \
    NEWEL_PORT=8080 \
    NEWEL_ADMIN__HOST=0.0.0.0 \
    NEWEL_ADMIN__PORT=9080 \
    NEWEL_HOME=/var/lib/newel \
    NEWEL_ENCODER=/opt/newel/share/newel/models/all-minilm-l6-v2-int8
USER 10001:10001
WORKDIR /var/lib/newel
VOLUME /var/lib/newel
EXPOSE 8080 9080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['NEWEL_PORT']}/livez\", timeout=2)"]
ENTRYPOINT ["newel", "serve"]
