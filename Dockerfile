# gradsift in a container: `docker build -t gradsift .`, then, in the folder with the files,
# `docker run --rm --user "$(id -u)" -v "$PWD:/data" gradsift select --model MODEL --pool pool.jsonl …`; with `--gpus all`
# on a GPU. Without CUDA (5 GB less): `--build-arg TORCH="torch==2.13.0 --index-url …"`, an index of builds for the CPU.
FROM python:3.11-slim
ARG TORCH="torch==2.13.0"
RUN pip install --no-cache-dir $TORCH
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[datasets,openai,s3]'
WORKDIR /data
# A user whom the image does not know has no home otherwise.
ENV HOME=/tmp HF_HOME=/data/.cache/huggingface GRADSIFT_CACHE=/data/.cache/gradsift
ENTRYPOINT ["gradsift"]
