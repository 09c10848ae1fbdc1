"""What a user can get wrong, through the command line: exit code and message, never a traceback.

Each case is an edit of a command that works. A message is given as the part of it that tells the case apart; it has to
stand on standard error, in one line that begins with `error: `.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiny_world import Cli, World, pool_rows, save_model, target_rows, write_rows

Setup = Callable[[World, Path], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A command with something wrong in it.

    options: after the options of the working command
    replaced: named options of the working command with other values, `None` without it; `{here}` is the test's folder
    setup: makes files in the test's folder and may return further `replaced`, or `options` to append
    """

    name: str
    message: str
    command: str = "select"
    options: tuple[str, ...] = ()
    replaced: dict[str, str | None] = field(default_factory=dict)
    setup: Setup | None = None
    code: int = 1


def pool_of(text: str, name: str = "bad.jsonl") -> Setup:
    def write(_tiny: World, here: Path) -> dict[str, Any]:
        (here / name).write_text(text)
        return {"pool": here / name}

    return write


def adapter_with(change: Callable[[Path], object]) -> Setup:
    """The last checkpoint of a warm-up, changed."""

    def make(tiny: World, here: Path) -> dict[str, Any]:
        folder = here / "adapter"
        shutil.copytree(tiny.adapters[-1], folder)
        change(folder)
        return {"adapter": folder}

    return make


def weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file)


def untrained(folder: Path) -> None:
    weights(folder, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)


def of_wider_model(folder: Path) -> None:
    weights(folder, lambda name, tensor: tensor.repeat(1, 2) if "lora_A" in name else tensor.repeat(2, 1))


def of_other_modules(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["c_attn"]}))


def with_unknown_rate(tiny: World, here: Path) -> dict[str, Any]:
    folder = adapter_with(lambda copied: (copied / "checkpoint.json").unlink())(tiny, here)["adapter"]
    return {"options": ["--adapter", tiny.adapters[0], "--adapter", str(folder)]}


def no_moments(folder: Path) -> None:
    (folder / "adam.safetensors").unlink()


def bad_optimizer_pt(folder: Path) -> None:
    no_moments(folder)
    (folder / "optimizer.pt").write_bytes(b"this is not a pickle")


def foreign_optimizer_pt(folder: Path) -> None:
    no_moments(folder)
    state = {0: {"step": 1, "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}}
    torch.save({"state": state, "param_groups": [{"params": [0]}]}, folder / "optimizer.pt")


def model_with(change: Callable[[Path], object]) -> Setup:
    def make(tiny: World, here: Path) -> dict[str, Any]:
        shutil.copytree(tiny.model, here / "model")
        change(here / "model")
        return {"model": here / "model"}

    return make


def remove(pattern: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob(pattern):
            file.unlink()

    return change


def nan_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def nan_model_with_adapter(tiny: World, here: Path) -> dict[str, Any]:
    return model_with(nan_weight)(tiny, here) | {"adapter": tiny.adapters[0]}


def wider_model(tiny: World, here: Path) -> dict[str, Any]:
    return {"model": save_model(here / "wide", hidden=64), "adapter": tiny.adapters[0]}


def used_run(tiny: World, here: Path) -> None:
    tiny("warmup", here / "run").succeeded()


def used_run_other_pool(tiny: World, here: Path) -> dict[str, Any]:
    used_run(tiny, here)
    return {"pool": write_rows(here / "other.jsonl", pool_rows(10))}


def used_run_other_model(tiny: World, here: Path) -> dict[str, Any]:
    used_run(tiny, here)
    return {"model": save_model(here / "other", seed=1)}


def used_run_other_length(tiny: World, here: Path) -> dict[str, Any]:
    used_run(tiny, here)
    return {"options": ["--max-length", "32"]}


def damaged_run_json(tiny: World, here: Path) -> dict[str, Any]:
    used_run(tiny, here)
    (here / "run" / "run.json").write_text('{"kind": ')
    return {}


def target_of(text: str) -> Setup:
    def write(_tiny: World, here: Path) -> dict[str, Any]:
        (here / "target.jsonl").write_text(text)
        return {"target": here / "target.jsonl"}

    return write


def readonly_out(tiny: World, here: Path) -> dict[str, Any]:
    """A place nobody may make folders in, root included."""
    return {"out": "/proc/gradsift"}


def target_is_pool(tiny: World, here: Path) -> dict[str, Any]:
    return {"target": tiny.pool}


def tokenizer_without_z(folder: Path) -> None:
    """A tokenizer that takes every Z out of a text before it cuts it into tokens."""
    file = folder / "tokenizer.json"
    dropped = {"type": "Replace", "pattern": {"String": "Z"}, "content": ""}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": dropped}))


def mute_tokenizer(tiny: World, here: Path) -> dict[str, Any]:
    return model_with(tokenizer_without_z)(tiny, here) | {"adapter": tiny.adapters[0]}


def asked(tiny: World, here: Path) -> dict[str, Any]:
    return {"target": tiny.target}


def out_is_file(tiny: World, here: Path) -> dict[str, Any]:
    return {"out": tiny.pool}


def out_below_file(tiny: World, here: Path) -> dict[str, Any]:
    return {"out": f"{tiny.pool}/run"}


GOOD = "".join(json.dumps(row) + "\n" for row in pool_rows(2))
LONG = json.dumps({"prompt": "red " * 300, "completion": "blue"}) + "\n"
UNUSABLE = '{"prompt": "a"}\n{"prompt": "b", "completion": " "}\nnonsense\n'

CASES = [
    # --- rows
    Case("empty pool", "pool: bad.jsonl is empty: no rows found", setup=pool_of("")),
    Case("empty target", "target: target.jsonl is empty: no rows found", setup=target_of("")),
    Case("only a broken line", "First problem, bad.jsonl:1: not valid JSON", setup=pool_of('{"prompt": \n')),
    Case("missing columns", "Columns found: question, answer", setup=pool_of('{"question": "a", "answer": "b"}\n')),
    Case("unknown role", "message 1 has the role 'wizard'; known are system, developer, user, human, assistant",
         setup=pool_of('{"messages": [{"role": "wizard", "content": "a"}]}\n')),
    Case("empty answers", "message 2 is an assistant turn without text",
         setup=pool_of('{"prompt": "a", "completion": " "}\n')),
    Case("rows longer than the limit",
         "1 nothing_to_learn. First: no answer token to predict: 2 answer tokens at the end",
         setup=pool_of(LONG)),
    Case("no usable row, several reasons", "none of the 3 rows of bad.jsonl can be used", setup=pool_of(UNUSABLE)),
    Case("binary file", "not valid JSON", setup=pool_of("\x00\x01\x02")),
    Case("unreadable kind of file", "is of a type that cannot be read; wanted .jsonl", setup=pool_of("x", "pool.txt")),
    Case("no such pool", "pool: {here}/none.jsonl does not exist", replaced={"pool": "{here}/none.jsonl"}),
    Case("no such target", "target: {here}/none.jsonl does not exist", replaced={"target": "{here}/none.jsonl"}),
    Case("no such target to explain", "target: {here}/none.jsonl does not exist", "explain",
         replaced={"target": "{here}/none.jsonl"}),
    Case("subtask column missing", "has no column 'level'; its columns are completion, id, prompt, task",
         options=("--subtask", "level")),
    Case("a row without subtask", "1 of 2 target rows have nothing in column 'task', first 'b'",
         options=("--subtask", "task"),
         setup=target_of('{"id": "a", "prompt": "x", "completion": "y", "task": "z"}\n'
                         '{"id": "b", "prompt": "x", "completion": "y"}\n')),
    Case("group column missing", "has no column 'level'; its columns are id, messages, source, weight_kg",
         options=("--group-by", "level")),
    Case("mapped column missing", "wanted column 'question'; found id, messages, source, weight_kg",
         options=("--columns", "prompt=question")),
    Case("target is the pool", "every pool row is also in the target: nothing is left to choose from",
         setup=target_is_pool, code=2),
    # --- models and adapters
    Case("unknown hub model",
         "cannot load the model 'no/such-model': it is no local folder, and the Hugging Face hub did",
         replaced={"model": "no/such-model"}),
    Case("no such model folder", "model {here}/none: there is no such folder", replaced={"model": "{here}/none"}),
    Case("model is a file", "bad.jsonl is a file: give the folder that holds config.json",
         setup=lambda tiny, here: {"model": pool_of("")(tiny, here)["pool"]}),
    Case("model folder without configuration", "is not a model folder: it has no config.json",
         setup=model_with(remove("config.json"))),
    Case("an adapter as the model", "is an adapter: give its base as --model",
         setup=lambda tiny, here: {"model": tiny.adapters[-1]}),
    Case("model folder without weights", "has a config.json but no weights (*.safetensors)",
         setup=model_with(remove("*.safetensors"))),
    Case("model folder without tokenizer", "has no tokenizer (tokenizer.json): copy the tokenizer files",
         setup=model_with(remove("*token*"))),
    Case("truncated weights", "cannot load the model in {here}/model: ",
         setup=model_with(lambda folder: (folder / "model.safetensors").write_bytes(b"123"))),
    Case("a NaN weight, warming up", "the training loss is nan at step 1 of 24", setup=model_with(nan_weight)),
    Case("a NaN weight, collecting",
         "all 24 pool rows have a non-finite adam gradient, first ('p00', 'the loss is nan')",
         setup=nan_model_with_adapter),
    Case("no such adapter folder", "{here}/none is not a folder: --adapter needs a PEFT adapter's folder or a hub id",
         options=("--adapter", "{here}/none")),
    Case("unknown hub adapter", "cannot find the adapter 'no/such-adapter': it is no local folder",
         options=("--adapter", "no/such-adapter")),
    Case("folder that is no adapter",
         "is not a PEFT adapter: it needs adapter_config.json and adapter_model.safetensors",
         setup=lambda tiny, here: {"adapter": tiny.model}),
    Case("untrained adapter", "is untrained: every LoRA B is zero", setup=adapter_with(untrained)),
    Case("adapter of a wider model",
         "q_proj.lora_A.default.weight has shape [4, 64] in the adapter, [4, 32] on this model",
         setup=adapter_with(of_wider_model)),
    Case("model wider than the adapter's",
         "has shape [4, 32] in the adapter, [4, 64] on this model. Use the model named",
         setup=wider_model),
    Case("adapter of another architecture", "was trained for another model: Target modules {{'c_attn'}} not found",
         setup=adapter_with(of_other_modules)),
    Case("damaged adapter configuration", "adapter_config.json is damaged",
         setup=adapter_with(lambda folder: (folder / "adapter_config.json").write_text("{"))),
    Case("truncated adapter weights", "cannot load adapter {here}/adapter: ",
         setup=adapter_with(lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"12"))),
    Case("adapter without optimizer state", "comes without optimizer state, which the Adam direction needs",
         setup=adapter_with(no_moments), code=2),
    Case("corrupt optimizer.pt", "cannot read optimizer state {here}/adapter/optimizer.pt",
         setup=adapter_with(bad_optimizer_pt)),
    Case("optimizer.pt of another adapter", "has 1 parameters in groups of [1], the adapter 8 trained ones",
         setup=adapter_with(foreign_optimizer_pt)),
    Case("truncated moments", "cannot read optimizer state {here}/adapter/adam.safetensors",
         setup=adapter_with(lambda folder: (folder / "adam.safetensors").write_bytes(b"12"))),
    Case("learning rate of one checkpoint unknown",
         "the learning rate of {here}/adapter is unknown while others say theirs",
         setup=with_unknown_rate),
    # --- run folders
    Case("--out is a file", "pool.jsonl is a file: --out needs a folder", setup=out_is_file),
    Case("--out below a file", "cannot make the folder {tiny}/pool.jsonl/run: a part of its path is a file",
         setup=out_below_file),
    Case("--out cannot be made", "cannot write to /proc/gradsift: No such file or directory. Choose another --out",
         setup=readonly_out),
    Case("run folder of another pool", "run: its pool is pool.jsonl (24 rows), wanted other.jsonl (10 rows), whose",
         setup=used_run_other_pool),
    Case("run folder of another model", "{here}/run belongs to another run: model.weights is ",
         setup=used_run_other_model),
    Case("run folder of another length", "{here}/run belongs to another run: max_length is 64, wanted 32. Give the",
         setup=used_run_other_length),
    Case("damaged run.json", "{here}/run/run.json is damaged", setup=damaged_run_json),
    Case("report of an empty folder", "{here}/none holds no results yet: run `gradsift select`", "report",
         options=("{here}/none",), code=2),
    # --- options
    Case("budget above the pool", "budget 25 is larger than the pool: 24 examples can be chosen from",
         options=("--budget", "25"), code=2),
    Case("budget zero", "--budget is 0.0: it should be greater than 0", options=("--budget", "0"), code=2),
    Case("budget negative", "--budget is -1.0: it should be greater than 0", options=("--budget", "-1"), code=2),
    Case("budget with a fraction", "budget 2.5 is neither a share between 0 and 1 nor a whole number",
         options=("--budget", "2.5"), code=2),
    Case("budget not a number", "--budget 'many': wanted a number of examples, or a share such as 0.05 or 5%",
         options=("--budget", "many"), code=2),
    Case("budget nan", "--budget is nan: it should be a finite number", options=("--budget", "nan"), code=2),
    Case("budget above 100%", "--budget '150%': a share lies between 0% and 100%",
         options=("--budget", "150%"), code=2),
    Case("unknown preset", "--preset 'x' is unknown: there are less, nice, compact", options=("--preset", "x"), code=2),
    Case("unknown estimator", "--estimator 'x' is unknown: there are less, datainf, projected_inverse, trak, ekfac",
         options=("--estimator", "x"), code=2),
    Case("unknown optimizer", "--optimizer 'x' is unknown: there are adam or sgd",
         options=("--optimizer", "x"), code=2),
    Case("unknown projection", "--projection 'x' is unknown: there are sparse, rademacher, kronecker or none",
         options=("--projection", "x"), code=2),
    Case("unknown row dtype", "--row-dtype 'x' is unknown: there are float16, bfloat16, float32",
         options=("--row-dtype", "x"), code=2),
    Case("unknown selection", "--selection 'x' is unknown: there are top_k, most_helpful, ",
         options=("--selection", "x"), code=2),
    Case("unknown aggregation", "--aggregation 'x' is unknown: there are max_of_means, mean or round_robin",
         options=("--aggregation", "x"), code=2),
    Case("unknown schedule", "--schedule 'x' is unknown: there are linear, cosine or constant",
         options=("--schedule", "x"), code=2),
    Case("unknown dtype", "--dtype 'x' is unknown: there are auto, float32", options=("--dtype", "x"), code=2),
    Case("unknown device", "--device 'gpu' is unknown: there are auto, cpu, cuda", options=("--device", "gpu"), code=2),
    Case("unknown supervision", "--supervise 'x' is unknown: there are all_turns, last_turn, all_tokens or trl",
         options=("--supervise", "x"), code=2),
    Case("dim below the modules", "projection dim 3 is smaller than the number of modules 8",
         options=("--projection-dim", "3", "--estimator", "datainf"), code=2),
    Case("dim zero", "projection dim 0 and nonzeros 1 must be at least 1", options=("--projection-dim", "0"), code=2),
    Case("dim not a number", "--projection-dim is 'x': it should be a valid integer",
         options=("--projection-dim", "x"), code=2),
    Case("no epochs", "--epochs is 0: it should be greater than or equal to 1", options=("--epochs", "0"), code=2),
    Case("fraction above one", "--fraction is 2.0: it should be less than or equal to 1",
         options=("--fraction", "2"), code=2),
    Case("learning rate nan", "--learning-rate is nan: it should be a finite number",
         options=("--learning-rate", "nan"), code=2),
    Case("unknown LoRA module", "has no linear module named c_attn: choose --lora-modules (target",
         options=("--lora-modules", "c_attn")),
    Case("no LoRA module", "--lora-modules is empty: name at least one", options=("--lora-modules", ","), code=2),
    Case("modules not a pattern", "modules pattern '(' is not a regular expression",
         options=("--modules", "("), code=2),
    Case("modules match nothing", "no linear module's name matches 'c_attn'", options=("--modules", "c_attn"), code=2),
    Case("modules without moments", "use --optimizer sgd for other modules",
         options=("--modules", "q_proj.base_layer"), code=2),
    Case("shards of no rows", "shard_rows is 0: it must be at least 1", options=("--shard-rows", "0"), code=2),
    Case("negative seed", "seed is -1: it must be a whole number from 0", options=("--seed", "-1"), code=2),
    Case("limit too short", "24 nothing_to_learn", options=("--max-length", "5")),
    Case("limit of one", "--max-length is 1: it should be greater than or equal to 2",
         options=("--max-length", "1"), code=2),
    Case("trade-off above one", "--trade-off is 2.0: it should be less than or equal to 1",
         options=("--selection", "facility_location", "--trade-off", "2"), code=2),
    Case("trade-off of top-k", "--trade-off goes with facility_location, not with --selection top_k: leave",
         options=("--trade-off", "0.2"), code=2),
    Case("columns not pairs", "--columns 'x': wanted pairs such as prompt=question",
         options=("--columns", "x"), code=2),
    Case("unknown column role", "--columns: unknown key 'promt'; did you mean 'prompt'?",
         options=("--columns", "promt=a"), code=2),
    Case("target columns not pairs", "--target-columns 'x': wanted pairs", options=("--target-columns", "x"), code=2),
    Case("unknown field", "--set estimator.nope: unknown key 'nope'; known keys: ",
         options=("--set", "estimator.nope=1"), code=2),
    Case("unknown views", "--views 'x': wanted adam, plain or segments, or several with commas between", "collect",
         options=("--views", "x"), code=2),
    Case("unknown option", "No such option '--budgte'. Did you mean '--budget'?", options=("--budgte", "5"), code=2),
    Case("no target", "no target: give --target, a file of examples of what the model should get better at",
         replaced={"target": None}, code=2),
    # --- rewards and responses
    Case("no reward", "ranks by a reward, and none is named: give --reward, such as numeric:answer", "reward", code=2),
    Case("a reward's column missing", "the reward numeric reads the column 'answr', which the targets do not have",
         "reward", options=("--reward", "numeric:answr"), code=2),
    Case("a column missing, selecting", "the reward exact reads the column 'answr'",
         options=("--estimator", "nice", "--reward", "exact:answr"), code=2),
    Case("programs that may not run", "then give --allow-code-execution", "reward",
         options=("--reward", "unit_tests"), code=2),
    Case("a judge without a model", "the reward judge asks a language model, and none is named: give --judge-model",
         "reward", options=("--reward", "judge:grade"), code=2),
    Case("a judge that nobody asks", "asked by the reward judge, and by raters of alpagasus and deita, and none of",
         "reward", options=("--reward", "sentiment", "--judge-model", "j"), code=2),
    Case("a judge's address alone", "--judge-url is the address of a judge, and none is named: give --judge-model",
         "reward", options=("--reward", "judge", "--judge-url", "http://localhost:1/v1"), code=2),
    Case("a judge's address that is none", "--judge-url: base_url is 'here': wanted http://host:port/v1", "reward",
         options=("--reward", "judge", "--judge-model", "j", "--judge-url", "here"), code=2),
    Case("too few weights", "--reward-weight is given 1 times for 2 --reward: give one for each", "reward",
         options=("--reward", "sentiment", "--reward", "format", "--reward-weight", "2"), code=2),
    Case("a weight that is no number", "--reward-weight is nan: it should be a finite number", "reward",
         options=("--reward", "sentiment", "--reward-weight", "nan"), code=2),
    Case("an assistant's address alone", "--assistant-url is of an assistant, and none is named: give --assistant",
         "sample", options=("--assistant-url", "http://localhost:1/v1"), code=2),
    Case("an address with a password", "--assistant-url: base_url holds a user, a password or a query", "sample",
         options=("--assistant", "g", "--assistant-url", "http://me:secret@localhost/v1"), code=2),
    Case("a suffix for nobody", "--assistant-suffix is of an assistant, and none is named", "sample",
         options=("--assistant-suffix", "x"), code=2),
    Case("assistant and server", "--assistant and --server-url: responses come from one of them", "sample",
         options=("--assistant", "g", "--server-url", "http://localhost:1/v1"), code=2),
    Case("a served name without a server", "--server-model is a name on a server, and none is named", "sample",
         options=("--server-model", "x"), code=2),
    Case("one served name for two checkpoints", "server.model is 'one' for several of the checkpoints", "sample",
         options=("--server-url", "http://localhost:1/v1", "--server-model", "one"), code=2),
    Case("unknown sampling", "--sampling: preset is 'x': choose general, alpaca_eval, code, assisted", "sample",
         options=("--sampling", "x"), code=2),
    Case("no samples", "--samples is 0: it should be greater than or equal to 1", "sample",
         options=("--samples", "0"), code=2),
    Case("several greedy samples", "samples is 20 at temperature 0, which always gives the same", "sample",
         options=("--temperature", "0"), code=2),
    Case("no response tokens", "--max-new-tokens is 0: it should be greater than or equal to 1", "sample",
         options=("--max-new-tokens", "0"), code=2),
    Case("unknown variant", "--policy-variant 'x' is unknown: there are plain, discrete, rejection, weighted_",
         "reward", options=("--reward", "sentiment", "--policy-variant", "x"), code=2),
    Case("unknown baseline", "--baseline 'x' is unknown: there are none, mean or leave_one_out", "reward",
         options=("--reward", "sentiment", "--baseline", "x"), code=2),
    Case("a baseline that does not go", "baseline mean does not go with the variant ppo", "reward",
         options=("--reward", "sentiment", "--baseline", "mean", "--policy-variant", "ppo"), code=2),
    Case("samples of a method that draws none", "--samples goes with nice, nice_if, nice_ekfac, nice_magic, not with",
         options=("--samples", "5"), code=2),
    Case("one sample to rank by", "samples is 1: halves of one sample cannot be compared",
         options=("--estimator", "nice", "--reward", "sentiment", "--samples", "1"), code=2),
    # --- what to explain
    Case("nothing to explain", "nothing to explain: give a prompt, or a target file of prompts", "explain", code=2),
    Case("prompt and target", "explain either a prompt or the rows of a target file: give one of them", "explain",
         options=("--prompt", "x"), setup=asked, code=2),
    Case("empty prompt", "--prompt is empty", "explain", options=("--prompt", " "), code=2),
    Case("prompt with an unknown role", "message 1 has the role 'wizard'; known are system, developer, user", "explain",
         replaced={"target": None}, options=("--prompt", '[{"role": "wizard", "content": "x"}]')),
    Case("prompt with a call of a tool", "message 1 of the role 'user' calls tools",
         "explain", replaced={"target": None},
         options=("--prompt", '[{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]')),
    Case("prompt that ends with an answer", "the prompt ends with an assistant turn", "explain",
         options=("--prompt", '[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]')),
    Case("k above the pool", "k is 25: choose between 1 and the 24 examples of the pool", "explain",
         options=("--prompt", "x", "-k", "25"), code=2),
    Case("k zero", "--budget '0': wanted a number of examples of at least 1, or several such as 1,5", "explain",
         options=("--prompt", "x", "-k", "0"), code=2),
    Case("empty output", "--output is empty", "explain", options=("--prompt", "x", "--output", ""), code=2),
    Case("one output for many rows", "--output is the answer to one prompt", "explain", options=("--output", "x"),
         setup=asked, code=2),
    Case("unknown row", "has no row with id 't99'; its ids look like t0, t1, t2", "explain", options=("--row", "t99"),
         setup=asked, code=2),
    Case("a row of no file", "--row, --sample and --use-answers go with the rows of a --target", "explain",
         options=("--prompt", "x", "--row", "t1"), code=2),
    Case("only an answer in the row", "no prompt can be explained; first: the prompt is empty", "explain",
         setup=target_of('{"messages": [{"role": "assistant", "content": "hello"}]}\n')),
    Case("k not a number", "--budget 'many': wanted a number of examples of at least 1, or several such as 1",
         "explain", options=("--prompt", "x", "-k", "many"), code=2),
    Case("one k not a number", "--budget '1,x': wanted a number of examples", "explain",
         options=("--prompt", "x", "-k", "1,x"), code=2),
    Case("k with a fraction", "--budget '2.5': wanted a number of examples", "explain",
         options=("--prompt", "x", "-k", "2.5"), code=2),
    Case("k above the candidates",
         "k is 6, but only the 5 highest-ranked examples compete: lower k or raise --candidates", "explain",
         options=("--prompt", "x", "-k", "1,6", "--candidates", "5"), code=2),
    Case("no candidates", "--candidates is 0: it should be greater than or equal to 1", "explain",
         options=("--prompt", "x", "--candidates", "0"), code=2),
    Case("empty target to explain", "target: target.jsonl is empty: no rows found", "explain", setup=target_of("")),
    Case("no usable row to explain",
         "target: none of the 2 rows of target.jsonl can be used (missing_columns 1, bad_json 1)", "explain",
         setup=target_of('{"id": "a"}\nnonsense\n')),
    Case("an output without a token",
         "no prompt can be explained; first: the model's tokenizer makes no token of the given output 'ZZ'", "explain",
         options=("--prompt", "x", "--output", "ZZ"), setup=mute_tokenizer),
    Case("unknown strategy", "--selection 'x' is unknown: there are top_k, most_helpful, most_harmful", "explain",
         options=("--prompt", "x", "--selection", "x"), code=2),
    Case("part of no strategy", "--selection 'aide:most_harmful': 'most_harmful' does not go with aide; wanted a name",
         "explain", options=("--prompt", "x", "-s", "aide:most_harmful"), code=2),
    Case("trade-off of a ranking", "--selection 'most_helpful:0.5': '0.5' does not go with most_helpful", "explain",
         options=("--prompt", "x", "-s", "most_helpful:0.5"), code=2),
    Case("trade-off of a strategy above one",
         "--selection 'facility_location:2': '2' is neither a trade-off between 0 and 1 nor one of most_helpful",
         "explain", options=("--prompt", "x", "-s", "facility_location:2"), code=2),
    Case("trade-off of a strategy not a number", "--selection 'facility_location:nan': 'nan' is neither a trade-off",
         "explain", options=("--prompt", "x", "-s", "facility_location:nan"), code=2),
    Case("trade-off of all strategies above one", "--trade-off is 2.0: it should be less than or equal to 1", "explain",
         options=("--prompt", "x", "-s", "facility_location", "--trade-off", "2"), code=2),
    Case("one strategy twice", "the strategy 'most helpful' is given twice: give each once", "explain",
         options=("--prompt", "x", "-s", "most_helpful", "-s", "most_helpful"), code=2),
    Case("unknown estimator to explain",
         "--estimator 'x' is unknown: there are less, datainf, projected_inverse, trak, ekfac, magic", "explain",
         options=("--prompt", "x", "-e", "less", "-e", "x"), code=2),
    Case("an estimator of rewards", "--estimator 'nice' is unknown: there are less, datainf", "explain",
         options=("--prompt", "x", "-e", "nice"), code=2),
    Case("one estimator twice", "the estimator 'BM25' is given twice: give each once", "explain",
         options=("--prompt", "x", "-e", "bm25", "-e", "bm25"), code=2),
    Case("damping of an estimator without", ", not with --estimator less: leave it out", "explain",
         options=("--prompt", "x", "--damping", "0.1"), code=2),
    Case("damping zero", "--damping is '0': it should be 'auto', 'spectral' or a number above 0", "explain",
         options=("--prompt", "x", "-e", "datainf", "--damping", "0"), code=2),
    Case("unknown coefficients", "--coefficients 'x' is unknown: there are MSE, MSEProjUSimp,", "explain",
         options=("--prompt", "x", "--coefficients", "x"), code=2),
    Case("unknown aggregation over outputs",
         "--over-outputs 'x' is unknown: there are ratio_of_means, mean_of_ratios or median_db", "explain",
         options=("--prompt", "x", "--over-outputs", "x"), code=2),
    Case("sample above the file", "--sample is 5, but there are only 4 rows to draw from", "explain",
         options=("--sample", "5"), setup=asked, code=2),
    Case("sample of nothing", "--sample is 0: it should be greater than or equal to 1", "explain",
         options=("--sample", "0"), setup=asked, code=2),
    Case("sample and row", "give either --row, one row, or --sample, a number of rows", "explain",
         options=("--sample", "2", "--row", "t1"), setup=asked, code=2),
    Case("sample of a whole pool", "--sample draws prompts from the pool's other rows)", "explain",
         options=("--sample", "2"), code=2),
    Case("sample of no row left out", "--pool-sample takes all 24 rows of the pool: lower it, and --sample has prompts",
         "explain", options=("--sample", "2", "--pool-sample", "24"), code=2),
    Case("sample above the rows left out", "--sample is 13, but there are only 12 rows to draw from", "explain",
         options=("--sample", "13", "--pool-sample", "0.5"), code=2),
    Case("pool sample above the pool", "a sample of 100 cannot be drawn from 24 rows: give a share below 1, or a whole",
         "explain", options=("--prompt", "x", "--pool-sample", "100"), code=2),
    Case("pool sample of a row and a half", "a sample of 1.5 cannot be drawn from 24 rows", "explain",
         options=("--prompt", "x", "--pool-sample", "1.5"), code=2),
    Case("k above the pool's sample", "k is 5: choose between 1 and the 4 examples of the pool", "explain",
         options=("--prompt", "x", "--pool-sample", "4"), code=2),
    Case("adapter of a wider model to explain",
         "q_proj.lora_A.default.weight has shape [4, 64] in the adapter, [4, 32] on this model", "explain",
         options=("--prompt", "x"), setup=adapter_with(of_wider_model)),
    Case("explaining in a run folder of another model", "{here}/run belongs to another run: model.weights is ",
         "explain", options=("--prompt", "x"), setup=used_run_other_model),
    Case("unknown route", "--route 'x' is unknown: there are auto, stored or trained", "validate",
         options=("--prompt", "x", "--route", "x"), code=2),
    Case("no step", "--step-rate is 0.0: it should be greater than 0", "validate",
         options=("--prompt", "x", "--step-rate", "0"), code=2),
    Case("no random set", "--random-sets is 0: it should be greater than or equal to 1", "validate",
         options=("--prompt", "x", "--random-sets", "0"), code=2),
    Case("nothing to validate", "nothing to explain: give a prompt, or a target file of prompts", "validate", code=2),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_mistake_gets_its_message(case: Case, tiny: World, tmp_path: Path) -> None:
    """The exit code is 2 for what was typed wrong and 1 for what went wrong, and the message names what is wrong."""
    made = case.setup(tiny, tmp_path) if case.setup else {}
    options = [*made.pop("options", []), *case.options]
    if "adapter" in made:
        options += ["--adapter", str(made.pop("adapter"))]
    options = [option.replace("{here}", str(tmp_path)) for option in options]
    if case.command == "report":
        result = Cli("report", *options)
    else:
        replaced = {n: v and v.replace("{here}", str(tmp_path)) for n, v in case.replaced.items()} | made
        like = "explain" if case.command == "validate" else case.command  # it takes all options of explain
        arguments = tiny.arguments(like, replaced.pop("out", tmp_path / "run"), *options, **replaced)
        result = Cli(case.command, *arguments[1:])
    message = case.message.replace("{here}", str(tmp_path)).replace("{tiny}", str(tiny.folder))
    message = message.replace("{{", "{").replace("}}", "}")
    assert (result.code, message in result.err) == (case.code, True), result.err
    assert result.out == ""
    if case.code == 1 or result.err.startswith("error: "):  # else it is the command line's own
        assert result.err.startswith("error: ")
        assert result.err.count("\n") == 1
        assert "should not have happened" not in result.err
        assert "pydantic" not in result.err


# --- recipes: the text after the four lines that work, and the message

RECIPES = [
    ("unknown key", "budgte: 3", "recipe.yaml line 5: unknown key 'budgte'; did you mean 'budget'?"),
    ("unknown key within", "gradients:\n  projecton: {}",
     "line 6: unknown key 'gradients.projecton'; did you mean 'projection'?"),
    ("unknown key beside a preset", "warmup:\n  preset: less\n  epoch: 2",
     "line 7: unknown key 'warmup.epoch'; did you mean 'epochs'?"),
    ("unknown key of a method", "estimator: {kind: less, optimiser: sgd}",
     "line 5: unknown key 'estimator.optimiser'; did you mean 'optimizer'?"),
    ("a key like no other", "zzz: 1", "line 5: unknown key 'zzz'; known keys: adapter, aggregation"),
    ("wrong type", "max_length: many", "line 5: max_length is 'many': it should be a valid integer"),
    ("text for settings", "gradients: less",
     "line 5: gradients is 'less': wanted settings of its own, such as {key: value}"),
    ("unknown method", "estimator: loss", "line 5: estimator 'loss' is unknown: there are less, datainf"),
    ("number for settings", "warmup: 3", "line 5: warmup is 3: wanted settings of its own"),
    ("text for a list", "adapter: x", "line 5: adapter is 'x': wanted a list, such as ['x']"),
    ("method without kind", "estimator: {optimizer: adam}",
     "wanted {kind: …}, where the kind is one of less, datainf, projected_inverse, trak, ekfac, ji2s, m"),
    ("unknown kind", "selection: {kind: top}",
     "line 5: selection 'top' is unknown: there are top_k, most_helpful, most_harmful"),
    ("unknown preset", "warmup: {preset: x}",
     "recipe.yaml: warmup preset 'x' is unknown: there are less, nice, compact"),
    ("refused value", "gradients: {token_budget: 0}", "recipe.yaml: token_budget is 0: it must be at least 1"),
    ("broken YAML", "warmup: [1", "recipe.yaml line 6 is not YAML"),
    ("tab", "\tseed: 1", "recipe.yaml line 5 is not YAML: found character '\\t'"),
    ("explain without prompt", "explain: {k: 3}", "nothing to explain: give a prompt, or a target file of prompts"),
    ("k above the pool", "explain: {prompt: x, k: 99}", "k is 99: choose between 1 and the 24 examples of the pool"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [r[1:] for r in RECIPES], ids=[r[0] for r in RECIPES])
def test_a_mistake_in_a_recipe_gets_its_line(text: str, message: str, tiny: World, tmp_path: Path) -> None:
    """Keys and values that are wrong are named with file and line, and the nearest key there is."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tiny.model}\npool: {tiny.pool}\ntarget: {tiny.target}\nout: {tmp_path / 'run'}\n{text}\n")
    result = Cli("run", path, "--quiet")
    assert (result.code, message in result.err) == (2, True), result.err
    assert result.err.count("\n") == 1
    assert "pydantic" not in result.err


def test_recipes_that_are_none(tmp_path: Path) -> None:
    """A missing file, a folder, bytes that are no text, a list, and one without its three keys."""
    assert "cannot read recipe" in Cli("run", tmp_path / "none.yaml").err
    assert "Is a directory" in Cli("run", tmp_path).err
    for content, message in (
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"", "holds no settings"),
        (b"- 1\n", "holds no settings"),
        (b"pool: x\n", "'model' is missing"),
    ):
        (tmp_path / "recipe.yaml").write_bytes(content)
        result = Cli("run", tmp_path / "recipe.yaml")
        assert (result.code, message in result.err) == (2, True), result.err


def test_init_overwrites_nothing(tmp_path: Path) -> None:
    """An existing file stays without --force, and a path below a file is refused with a message."""
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 1\n")
    assert "is there already" in Cli("init", path).err
    assert path.read_text() == "seed: 1\n"
    assert "a part of the path is a file, not a folder" in Cli("init", path / "other.yaml").err
    Cli("init", path, "--force").succeeded()
    assert "model:" in path.read_text()


def test_a_gpu_that_is_not_there(tiny: World, tmp_path: Path) -> None:
    """--device cuda on a machine without one says so before any work."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    result = tiny("select", tmp_path / "run", "--device", "cuda")
    assert result.err == "error: --device cuda: no CUDA device is available here; use --device cpu\n"
    assert not (tmp_path / "run" / "data").exists()


# --- what goes on in spite of something wrong


def test_one_broken_line_stops_nothing(tiny: World, tmp_path: Path) -> None:
    """The rest of the pool is used, and the line is listed with its number."""
    pool = tmp_path / "pool.jsonl"
    pool.write_text(GOOD + '{"prompt": \n' + "".join(json.dumps(row) + "\n" for row in pool_rows(10)[2:]))
    found = tiny("select", tmp_path / "run", "--budget", "2", "--json", pool=pool).succeeded().json
    assert found["skipped"] == {"bad_json": 1}
    listed = json.loads((tmp_path / "run" / "skipped.jsonl").read_text())
    assert (listed["source"], listed["line"]) == ("pool.jsonl", 3)


@pytest.fixture
def one_nan_token(tiny: World, tmp_path: Path) -> dict[str, Any]:
    """A model that knows no `Z`, and a pool with one row that says it."""
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(tiny.model).encode("Z")
    model = tmp_path / "model"
    shutil.copytree(tiny.model, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = pool_rows()
    rows[3]["messages"][1]["content"] = "it says Z"
    return {"model": model, "pool": write_rows(tmp_path / "nan.jsonl", rows)}


def test_one_non_finite_row_stops_nothing(tiny: World, tmp_path: Path, one_nan_token: dict[str, Any]) -> None:
    """It is left out, never chosen, and listed; every other row is scored."""
    options = ("--adapter", tiny.adapters[-1])
    arguments = tiny.arguments("select", tmp_path / "run", "--budget", "23", "--json", *options, **one_nan_token)
    result = Cli(*[a for a in arguments if a != "--quiet"]).succeeded()
    assert "1 of 24 pool rows were left out: p03 (the loss is nan)" in result.err
    chosen = result.json["selections"][0]
    assert len(set(chosen["ids"])) == 23
    assert "p03" not in chosen["ids"]
    assert result.json["skipped"] == {"non_finite_gradient": 1}
    asked = ("explain", tmp_path / "run", *options, "--prompt", "what says the cow", "--max-new-tokens", 4)
    refused = tiny(*asked, "-k", "24", **one_nan_token)
    assert "k is 24, but only 23 examples of the pool have a finite gradient" in refused.err
    found = tiny(*asked, "-k", "23", "--selection", "most_helpful", "--json", **one_nan_token).succeeded().json
    assert len(found["explanations"][0]["results"][0]["examples"]) == 23


def test_targets_without_a_finite_gradient(tiny: World, tmp_path: Path, one_nan_token: dict[str, Any]) -> None:
    """All of them: an error that says so. One of them: it is left out with a warning."""
    bad = [{**row, "completion": "Z"} for row in target_rows(2)]
    model, options = one_nan_token["model"], ("--adapter", tiny.adapters[-1])
    result = tiny("select", tmp_path / "a", *options, model=model, target=write_rows(tmp_path / "bad.jsonl", bad))
    assert "all 2 target rows have a non-finite plain gradient" in result.err
    mixed = write_rows(tmp_path / "mixed.jsonl", [bad[0], *target_rows(4)[1:]])
    tiny("select", tmp_path / "b", *options, model=model, target=mixed).succeeded()


def test_an_altered_shard_is_collected_again(tiny: World, tmp_path: Path) -> None:
    """A flipped byte and a truncated file are found, said, and mended to the same scores."""
    out = tmp_path / "run"
    options = ("--shard-rows", "8", "--json", "--budget", "5")
    first = tiny("select", out, *options).succeeded().json["selections"]
    shards = sorted(out.glob("gradients/*/*.safetensors"))
    assert len(shards) > 4
    content = bytearray(shards[0].read_bytes())
    content[-1] ^= 1
    shards[0].write_bytes(content)
    shards[-1].write_bytes(shards[-1].read_bytes()[:-20])
    arguments = [a for a in tiny.arguments("select", out, *options) if a != "--quiet"]
    again = Cli(*arguments).succeeded()
    assert again.json["selections"] == first
    assert again.err.count("truncated or altered: collecting it again") == 2


def test_truncated_results_are_made_again(tiny: World, tmp_path: Path) -> None:
    """Scores, selection and page are written anew by the next call; `report` alone says what to do."""
    out = tmp_path / "run"
    first = tiny("select", out, "--budget", "5", "--json").succeeded().json["selections"]
    files = [*out.glob("scores/*/scores.parquet"), out / "scores.parquet", out / "selected.jsonl", out / "report.json"]
    before = {file: file.read_bytes() for file in files}
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    assert "report.json is damaged: run `gradsift select`" in Cli("report", out).err
    assert tiny("select", out, "--budget", "5", "--json").succeeded().json["selections"] == first
    assert (out / "selected.jsonl").read_bytes() == before[out / "selected.jsonl"]
    assert (out / "scores.parquet").read_bytes() == before[out / "scores.parquet"]
    Cli("report", out).succeeded()


def test_an_adapter_that_does_not_fit_spoils_nothing(tiny: World, tmp_path: Path) -> None:
    """After a refused adapter, the right one gives what it gives in a fresh process: the model is as it was."""
    right = ("--adapter", tiny.adapters[-1], "--budget", "5", "--json")
    before = tiny("select", tmp_path / "before", *right).succeeded().json["selections"]
    wrong = adapter_with(of_wider_model)(tiny, tmp_path)["adapter"]
    assert tiny("select", tmp_path / "wrong", "--adapter", wrong).code == 1
    assert tiny("select", tmp_path / "after", *right).succeeded().json["selections"] == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True, check=False
    )  # fmt: skip
    if not mounted or mounted.returncode != 0:
        pytest.skip("a disk that fills up needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # files may be mapped until their objects are collected


def test_a_full_disk(tiny: World, small_disk: Path) -> None:
    """The message says that the disk is full; with room, the same command goes on and ends well."""
    options = ("--adapter", tiny.adapters[-1], "--projection", "none", "--row-dtype", "float32", "--shard-rows", "4")
    result = tiny("collect", small_disk / "run", *options)
    assert result.code == 1
    assert "the disk is full: free space or choose another --out" in result.err
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    (store,) = tiny("collect", small_disk / "run", "--json", *options).succeeded().json
    assert store["rows"] == 24
