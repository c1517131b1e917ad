#   docker build -t minigpt .                                                          for the CPU
#   docker build -t minigpt:gpu --build-arg TORCH_INDEX=https://pypi.org/simple .      for NVIDIA GPUs
# How to use the image: docs/docker.md.

ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM ${PYTHON_IMAGE}
# PyTorch's compiler starts the C and C++ compilers. On a GPU the loss is compiled in every run.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# The largest layer. A change of the code does not repeat it.
# Where the wheel of PyTorch comes from: a version such as 2.13.0+cpu is preferred to PyPI's 2.13.0, which has CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt /tmp/
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint /tmp/requirements.txt torch

ARG EXTRAS=fast,peft,gguf
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir --constraint /tmp/requirements.txt "$(ls /wheels/*.whl)[$EXTRAS]"

# Any user may write to these folders, so that `docker run --user` works. The runs are in /work/runs.
ENV HOME=/home/minigpt
RUN useradd --uid 1000 --create-home minigpt \
    && mkdir -p /work/runs "$HOME/.cache" \
    && chown -R minigpt:minigpt /work "$HOME" \
    && chmod -R a+rwX /work "$HOME"
USER minigpt
WORKDIR /work
VOLUME /work/runs

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["minigpt"]
CMD ["train", "quickstart", "--overwrite_output_dir"]
