# Two images from one file:
#   docker build --target worker -t elesh-worker .   workers without torch: decisions are predicted
#   docker build --target full   -t elesh-full .     workers that measure, the simulated trainer, all
# PYTORCH_INDEX takes the address of PyTorch's own CPU index (its "Get Started" page shows it);
# without it the full image holds the larger CUDA build.
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/elesh
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY contracts contracts
COPY elesh elesh
RUN /opt/elesh/bin/pip install -c constraints.txt .

FROM build AS build-full
ARG PYTORCH_INDEX=""
RUN PIP_EXTRA_INDEX_URL="${PYTORCH_INDEX}" /opt/elesh/bin/pip install -c constraints.txt '.[demo]'

FROM ${PYTHON_IMAGE} AS runtime
ENV PATH=/opt/elesh/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
USER 10001:10001
CMD ["elesh", "worker"]

FROM runtime AS worker
COPY --from=build /opt/elesh /opt/elesh

FROM runtime AS full
COPY --from=build-full /opt/elesh /opt/elesh
