# Two images from one file:
#   docker build --target operator -t finetune-operator .
#   docker build --target trainer  -t finetune-trainer  .
# Layers go from what changes seldom to what changes often: base, dependencies, our own code. A change in our code rebuilds one small layer.
ARG BASE_IMAGE=python:3.11-slim


# What each image installs, read from pyproject.toml. A change elsewhere in that file gives the same two files, down to their dates, so the
# layers made from them stay cached.
FROM ${BASE_IMAGE} AS requirements
COPY pyproject.toml /src/
RUN python -c "import pathlib, tomllib; \
    project = tomllib.loads(pathlib.Path('/src/pyproject.toml').read_text())['project']; \
    [pathlib.Path(f'/src/{extra}.txt').write_text('\n'.join(project['dependencies'] + project['optional-dependencies'][extra])) \
     for extra in ('operator', 'trainer', 'quantization', 'lm-eval')]" \
    && touch --date=@0 /src/*.txt


# Our code as a wheel: the build tool stays out of the images.
FROM ${BASE_IMAGE} AS wheel
COPY constraints.txt /src/
RUN pip install --no-cache-dir --root-user-action=ignore -c /src/constraints.txt hatchling
COPY pyproject.toml README.md LICENSE /src/
COPY operator /src/operator
COPY trainer /src/trainer
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist /src


# The user has a name and a home because torch and the hub's client ask for them; USER is a number so that runAsNonRoot can check it.
FROM ${BASE_IMAGE} AS operator
RUN groupadd --gid 10001 finetune \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/finetune --shell /usr/sbin/nologin finetune \
    && python -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/home/finetune PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/finetune
COPY constraints.txt /opt/finetune/
COPY --from=requirements /src/operator.txt /opt/finetune/requirements.txt
RUN pip --python /opt/venv/bin/python install --no-cache-dir -c /opt/finetune/constraints.txt -r /opt/finetune/requirements.txt
COPY --from=wheel /dist /opt/finetune/
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /opt/finetune/*.whl
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["python", "-m", "finetune_operator"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-operator" \
      org.opencontainers.image.description="Kubernetes operator that tunes language models" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.url="https://finetune.dev" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"


FROM ${BASE_IMAGE} AS trainer
# torch.compile needs a compiler where the training runs: on a GPU Triton builds what starts its kernels in C, on a CPU the kernels are C++.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 finetune \
    && useradd --uid 10001 --gid 10001 --create-home --home-dir /home/finetune --shell /usr/sbin/nologin finetune \
    && python -m venv --without-pip /opt/venv
ENV PATH=/opt/venv/bin:$PATH HOME=/home/finetune PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/finetune
COPY constraints.txt /opt/finetune/
COPY --from=requirements /src/trainer.txt /opt/finetune/requirements.txt
# The import is a check that the stack fits together.
RUN pip --python /opt/venv/bin/python install --no-cache-dir -c /opt/finetune/constraints.txt -r /opt/finetune/requirements.txt \
    && python -c "import torch, ray.train, transformers, peft"
# --build-arg QUANTIZATION=1 for model.quantization. Left out by default: importing it takes every worker seconds, quantized or not.
ARG QUANTIZATION=""
COPY --from=requirements /src/quantization.txt /opt/finetune/
RUN test -z "${QUANTIZATION}" || pip --python /opt/venv/bin/python install --no-cache-dir -c /opt/finetune/constraints.txt -r /opt/finetune/quantization.txt
# --build-arg LM_EVAL=1 for evaluation.suites[].lmEval.
ARG LM_EVAL=""
COPY --from=requirements /src/lm-eval.txt /opt/finetune/
RUN test -z "${LM_EVAL}" || pip --python /opt/venv/bin/python install --no-cache-dir -c /opt/finetune/constraints.txt -r /opt/finetune/lm-eval.txt
COPY --from=wheel /dist /opt/finetune/
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps /opt/finetune/*.whl
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m", "finetune_trainer"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="finetune-trainer" \
      org.opencontainers.image.description="Head and workers of a fine-tuning job: Ray Train, transformers, peft" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.url="https://finetune.dev" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
