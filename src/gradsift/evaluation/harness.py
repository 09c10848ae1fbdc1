"""Tasks of the Language Model Evaluation Harness (package lm-eval, extra `eval`), with the model that is loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from gradsift.base.errors import ConfigError, ModelError
from gradsift.base.settings import Settings
from gradsift.context import Setup
from gradsift.evaluation.metric import Figure, Measured, Notebook
from gradsift.evaluation.setup import Subject
from gradsift.model.adapters import own_randomness
from gradsift.model.models import host, load_tokenizer
from gradsift.store.storage import checksum_file

_DATA_FILE = re.compile(r"[^\s'\"\[\]{},:]+\.(?:jsonl|json|csv|tsv|parquet|txt|py)\b")
_BOOTSTRAP = 1000  # resamples, for the few metrics that are no mean over documents


class LMEval(Settings):
    """Tasks of lm-eval by name, its own or those of a folder of yours.

    tasks: names of tasks, groups or tags.
    num_fewshot: examples before each question; None is the task's own number.
    limit: only the first so many documents of each task (a number), or a share of them (below 1).
    include_path: a folder with task files (yaml), searched before lm-eval's own.
    apply_chat_template: ask through the chat template, as an instruction-tuned model expects it.
    batch_size: questions at a time.

    Figures: `TASK/METRIC` with lm-eval's own standard error, the task's filter after a colon where it has one, and the
    value of each document by its number.
    """

    kind: Literal["lm_eval"] = "lm_eval"
    tasks: tuple[str, ...] = Field(min_length=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    limit: float | None = Field(default=None, gt=0)
    include_path: str | None = None
    apply_chat_template: bool = False
    batch_size: int = Field(default=8, ge=1)

    @property
    def label(self) -> str:
        """What tables call it."""
        return f"lm-eval {', '.join(self.tasks)}"

    def bind(self, setup: Setup) -> BoundLMEval:
        """Look for the package and the folder (ConfigError); tasks are read when they are measured."""
        if not _installed():
            raise ConfigError(
                f"lm-eval runs {', '.join(self.tasks)}, and it is not installed: pip install 'gradsift[eval]'"
            )
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ConfigError(f"--include-path {self.include_path} is not a folder: give the one with your task files")
        return BoundLMEval(self)


@dataclass(frozen=True)
class BoundLMEval:
    """The metric, with lm-eval at hand."""

    metric: LMEval

    def identity(self) -> dict[str, Any]:
        """Settings, lm-eval's version, and the files of the user's folder with the data that they name."""
        settings = self.metric.model_dump(mode="json", exclude={"include_path", "batch_size"})
        files = {} if self.metric.include_path is None else dict(_files(Path(self.metric.include_path)))
        return {"settings": settings, "lm_eval": metadata.version("lm-eval"), "files": files}

    def measure(self, subject: Subject, notebook: Notebook) -> Measured:
        """Run the tasks; ConfigError where lm-eval does not know one, ModelError where it fails."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        metric, setup = self.metric, subject.setup
        manager = self._manager()
        network = host(setup.model, setup.dtype, setup.device).with_adapter(subject.checkpoint.adapter)
        limit = metric.limit if metric.limit is None or metric.limit < 1 else int(metric.limit)
        # lm-eval gives the tokenizer a padding token where it has none: one of its own.
        model = HFLM(pretrained=network, tokenizer=load_tokenizer(setup.model), batch_size=metric.batch_size)
        try:
            with own_randomness():
                found: Any = simple_evaluate(
                    model=model, tasks=list(metric.tasks), num_fewshot=metric.num_fewshot, limit=limit,
                    task_manager=manager, apply_chat_template=metric.apply_chat_template, bootstrap_iters=_BOOTSTRAP,
                    log_samples=True,
                )  # fmt: skip
        except Exception as error:  # data sets, metrics and post-processing of any kind run in there
            said = next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "no message")
            raise ModelError(
                f"lm-eval cannot run {', '.join(metric.tasks)}: {type(error).__name__}: {said}. "
                "Where the hub is out of reach, use tasks with local data (--include-path)"
            ) from error
        figures, notes = _figures(found)
        if not figures:
            raise ModelError(f"lm-eval gave no figure for {', '.join(metric.tasks)}; {'; '.join(notes)}")
        details = {
            "lm_eval": metadata.version("lm-eval"),
            "versions": {task: found["versions"].get(task) for task in found["results"]},
            "num_fewshot": dict(found.get("n-shot", {})),
        }
        return Measured(metric.label, metric.kind, tuple(figures), tuple(notes), details)

    def _manager(self) -> Any:
        """Finds task files; lm-eval's own thousands are left out where the folder has all that is asked for."""
        from lm_eval.tasks import TaskManager

        metric = self.metric
        if metric.include_path is not None:
            manager = TaskManager(include_path=metric.include_path, include_defaults=False)
            if all(manager.match_tasks([task]) for task in metric.tasks):
                return manager
        manager = TaskManager(include_path=metric.include_path)
        unknown = [task for task in metric.tasks if not manager.match_tasks([task])]
        if unknown:
            raise ConfigError(
                f"lm-eval {metadata.version('lm-eval')} knows no task {unknown[0]!r}: `lm-eval ls tasks` lists them; "
                "a task of yours needs --include-path, the folder of its yaml file"
            )
        return manager


def _installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def _figures(found: Mapping[str, Any]) -> tuple[list[Figure], list[str]]:
    """One figure for each metric and filter of each task and group."""
    figures, notes = [], []
    for task, values in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if not filter_name or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if not math.isfinite(value):
                notes.append(f"{task}: {name} is {value} and is left out")
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            per_item = _per_item(samples, name, filter_name)
            counted = found.get("n-samples", {}).get(task, {}).get("effective") or len(per_item)
            better = found.get("higher_is_better", {}).get(task, {}).get(name)
            figures.append(
                Figure(
                    f"{task}/{name}" + (f":{filter_name}" if filter_name != "none" else ""),
                    float(value),
                    float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                    int(counted or values.get("sample_len") or 0),
                    higher_is_better=better is not False,
                    per_item={f"{task}#{id_}": number for id_, number in per_item.items()},
                )
            )
    return figures, notes


def _per_item(samples: Any, name: str, filter_name: str) -> dict[str, float]:
    """Values by document, where the metric has a number for each."""
    own = [sample for sample in samples if sample.get("filter", "none") == filter_name and name in sample]
    if not all(isinstance(sample[name], int | float) and math.isfinite(sample[name]) for sample in own):
        return {}
    return {str(sample["doc_id"]): float(sample[name]) for sample in own}


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Task files with their checksums, and the data files that their texts name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith((".", "__")) for part in path.relative_to(folder).parts):
            yield str(path.relative_to(folder)), checksum_file(path)
            if path.suffix in (".yaml", ".yml"):
                for name in sorted(set(_DATA_FILE.findall(path.read_text(encoding="utf-8", errors="replace")))):
                    if Path(name).is_file():
                        yield hashlib.sha256(name.encode()).hexdigest()[:16], checksum_file(Path(name))
