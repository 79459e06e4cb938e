# syntax=docker/dockerfile:1
# The test suite on a machine without GPUs, with a real vLLM and a real Slurm.
#
#   Build   docker build -f containers/cpu.Dockerfile -t nemo-jepo-cpu:0.1.0 .
#   Test    docker run --rm --shm-size=2g nemo-jepo-cpu:0.1.0
#   Demo    docker run --rm --shm-size=2g nemo-jepo-cpu:0.1.0 make demo
#   Slurm   enroot import --output nemo-jepo-cpu-0.1.0.sqsh dockerd://nemo-jepo-cpu:0.1.0
#
# Versions of Python packages are those of pyproject.toml and the Makefile.
ARG BASE_IMAGE=python:3.11-slim-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM ${BASE_IMAGE}
ARG TORCH_INDEX

# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        g++ git make munge slurm-client slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1001 --create-home --shell /bin/bash jepo
USER 1001
WORKDIR /home/jepo/nemo_jepo
COPY --chown=1001 . .

ENV PIP_NO_CACHE_DIR=1
# Importing is what fails first when versions do not fit.
RUN make vllm PIP_OPTIONS="--extra-index-url $TORCH_INDEX" \
    && .venv/bin/python -c "import torch, megatron.core, vllm, nemo.core, nemo_jepo.cli; print(torch.__version__)"

CMD ["make", "test-all"]
