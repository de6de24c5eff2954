# partal_nb as a command in a container, for any user.
#   docker build -t partal_nb .                            on a CPU
#   docker build -t partal_nb --build-arg TORCH=cuda .     on NVIDIA GPUs; run it with --gpus all
#   docker run --rm -u "$(id -u)" -v "$PWD/runs:/study/runs" partal_nb run --out runs/demo
#   docker run --rm -u "$(id -u)" -v "$PWD/runs:/study/runs" --network host partal_nb explore runs/demo
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# PyPI's PyTorch brings the CUDA libraries, 5 GB of them; PyTorch's own index has one without.
ARG TORCH=cpu
RUN if [ "$TORCH" = cpu ]; then \
        pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu; fi

COPY . /src
RUN pip install --no-cache-dir /src && rm -rf /src

# Whoever runs it may write here, also a user that the image does not know (docker run -u).
ENV HOME=/study PARTAL_CACHE=/study/cache PYTHONUTF8=1
RUN mkdir -p /study/cache /study/runs && chmod -R 1777 /study
WORKDIR /study
USER 1000
ENTRYPOINT ["partal"]
CMD ["--help"]
