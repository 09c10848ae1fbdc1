"""A tiny model with a ChatML tokenizer, pools and targets for it, and the command line called in this process."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradsift.context import Pool

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ANIMALS = ("cat", "dog", "owl", "fox", "hen", "cow", "bee", "ant")


def save_model(folder: Path, *, seed: int = 0, layers: int = 1, hidden: int = 32) -> str:
    """A Llama with random weights and a byte-level tokenizer, as `from_pretrained` wants them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["system user assistant\n", *COLOURS, *ANIMALS, "what colour is the it says"]
    raw.train_from_iterator(texts * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def pool_rows(count: int = 24) -> list[dict[str, Any]]:
    """Questions about colours and about sounds in turn, each with columns of its own."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        animal, colour = ANIMALS[number % 8], COLOURS[(number // 2) % 8]
        if number % 2 == 0:
            question, answer, kind = f"what colour is the {animal} {number}", f"the {animal} is {colour}", "colour"
        else:
            question, answer, kind = f"what says the {animal} {number}", f"it says {animal * 2}", "sound"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"id": f"p{number:02}", "messages": messages, "source": kind, "weight_kg": number / 4})
    return rows


def target_rows(count: int = 4) -> list[dict[str, Any]]:
    """Questions about colours that are not in the pool, with a subtask each."""
    return [
        {
            "id": f"t{number}",
            "prompt": f"what colour is the {ANIMALS[number % 8]} of {number}",
            "completion": f"the {ANIMALS[number % 8]} is {COLOURS[number % 8]}",
            "task": ("odd", "even")[number % 2],
        }
        for number in range(count)
    ]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


LM_EVAL_TASK = """task: colours
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def write_lm_eval_task(folder: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A task `colours` for lm-eval, to be found by `include_path`; rows have question, choices and gold."""
    folder.mkdir(parents=True)
    (folder / "colours.yaml").write_text(LM_EVAL_TASK.format(file=write_rows(folder / "colours.jsonl", rows)))
    return str(folder)


# Enough training for gradients that tell examples apart, in well under a second.
WARMUP = ("--fraction", "0.5", "--epochs", "2", "--rank", "4", "--alpha", "8", "--learning-rate", "1e-2",
          "--batch-size", "4", "--dropout", "0")  # fmt: skip
GRADIENTS = ("--projection-dim", "256")
COMMON = ("--max-length", "64", "--quiet", "--device", "cpu")
_OPTIONS = {
    "select": (*WARMUP, *GRADIENTS),
    "score": (*WARMUP, *GRADIENTS),
    "collect": (*WARMUP, *GRADIENTS),
    "explain": (*WARMUP, *GRADIENTS),
    "bench": (*WARMUP, *GRADIENTS),
    "plan": (*WARMUP, *GRADIENTS),
    "sample": WARMUP,
    "reward": WARMUP,
    "warmup": WARMUP,
}


def without(options: tuple[str, ...], given: tuple[object, ...]) -> list[str]:
    """Options and their values but for those that are given otherwise."""
    kept: list[str] = []
    for option in options:
        if option.startswith("--"):
            keep = option not in given
        if keep:
            kept.append(option)
    return kept


class Cli:
    """`gradsift …` in this process: exit code, standard output, standard error."""

    def __init__(self, *arguments: object) -> None:
        import transformers
        from click.testing import CliRunner

        from gradsift.cli import app

        self.arguments = [str(argument) for argument in arguments]
        verbosity = transformers.utils.logging.get_verbosity()
        try:  # the command line calms libraries by the environment, which this process has long read
            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            result = CliRunner().invoke(app, self.arguments)
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        assert "Traceback" not in self.err + self.out, self.err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def succeeded(self) -> Cli:
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        return self


@dataclass
class World:
    """A model, a pool and a target in a folder, and commands on them."""

    folder: Path
    model: str
    pool: str
    target: str

    @classmethod
    def make(cls, folder: Path, *, layers: int = 1) -> World:
        return cls(
            folder,
            save_model(folder / "model", layers=layers),
            write_rows(folder / "pool.jsonl", pool_rows()),
            write_rows(folder / "target.jsonl", target_rows()),
        )

    def arguments(self, command: str, out: Path | str, *more: object, **replaced: object) -> list[str]:
        """A command line on this world; `target=None` and the like leave an option out."""
        given: dict[str, object] = {"model": self.model, "pool": self.pool, "out": out}
        if command in ("select", "score", "plan", "sample", "reward", "bench"):
            given["target"] = self.target
        given |= replaced
        named = [str(part) for name, value in given.items() if value is not None for part in (f"--{name}", value)]
        defaults = [*without(_OPTIONS[command], more), *without(COMMON, more)]
        return [command, *named, *defaults, *map(str, more)]

    def __call__(self, command: str, out: Path | str, *more: object, **replaced: object) -> Cli:
        return Cli(*self.arguments(command, out, *more, **replaced))

    @cached_property
    def adapters(self) -> list[str]:
        """Two checkpoints of a warm-up, with Adam's moments and learning rates."""
        return [entry["adapter"] for entry in self("warmup", self.folder / "adapters", "--json").succeeded().json]

    def open_pool(self, out: Path | str, source: Any = None, **options: Any) -> Pool:
        """The pool, or other rows, opened with both checkpoints; rows are not projected."""
        from gradsift.context import open_pool
        from gradsift.gradients.collect import Gradients
        from gradsift.gradients.projection import Projection

        given = {
            "adapters": self.adapters,
            "gradients": Gradients(projection=Projection(kind="none"), dtype="float32"),
            "max_length": 64,
            "device": "cpu",
        }
        return open_pool(
            self.pool if source is None else source, model=self.model, out=str(out), **{**given, **options}
        )

    def with_adapters(self) -> list[str]:
        """Options that take both checkpoints."""
        return [part for adapter in self.adapters for part in ("--adapter", adapter)]

    def variant(self, name: str, source: str | Path) -> Path:
        """A copy of a folder to change."""
        copied = self.folder / name
        if copied.exists():
            shutil.rmtree(copied)
        shutil.copytree(source, copied)
        return copied


def run_in_process(arguments: list[str], errors: str) -> None:
    """`gradsift …` on one thread, with standard error in a file: what another process is to run."""
    import os
    import sys

    import torch

    from gradsift.cli import app

    torch.set_num_threads(1)
    file = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    app(arguments)


def forking() -> Any:
    """Processes that have the libraries imported, since they are forks of this one; where autograd keeps threads for a
    GPU, which a fork loses, they are forks of a server."""
    import multiprocessing

    import torch

    needed = ["tiny_world", "gradsift.jobs.select_explain", "gradsift.warmup.trainer", "peft", "datasets", "click"]
    if torch.cuda.is_available():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(needed)
        return context
    for name in needed:
        importlib.import_module(name)
    return multiprocessing.get_context("fork")
