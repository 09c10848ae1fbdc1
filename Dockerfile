# gradsift on a CPU: `docker build -t gradsift .`, then
# `docker run --rm -v "$PWD:/work" gradsift select --model MODEL --pool pool.jsonl --target math.jsonl --out runs/math`.
# With a GPU: `--build-arg TORCH="torch>=2.6"`, and `docker run --gpus all`.
FROM python:3.11-slim
ARG TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
RUN pip install --no-cache-dir $TORCH
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt '.[datasets,openai,s3]' && useradd --create-home user
USER user
WORKDIR /work
ENV HF_HOME=/work/.cache/huggingface GRADSIFT_CACHE=/work/.cache/gradsift
ENTRYPOINT ["gradsift"]
