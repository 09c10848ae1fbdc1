"""gradsift's numbers beside those of the published code of its methods.

    python benchmarks/conformance.py                         # compare, and write docs/conformance.md
    python benchmarks/conformance.py --check                 # compare; fail where a number or the page is off
    python benchmarks/conformance.py --setup less dattri     # virtual environments for some of the published codes
    python benchmarks/conformance.py --record less dattri --checkout less=~/LESS

Published code runs in an environment of its own under `.cache/peers/`, by a program in `conformance/programs` that
imports nothing of gradsift; inputs and outputs stay as `conformance/NAME.json`. Papers' code is no package: clone it,
and name the folder with `--checkout`. What has no environment or no checkout is left out and told.

gradsift is compared with the recorded numbers, so `tests/test_conformance.py` needs none of this. One class here is one
published code: `compared` holds what must agree, `departures` what gradsift does otherwise on purpose, with its effect
on the same inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from peers.peer import Environment, process_environment
from scipy.stats import spearmanr
from torch import Tensor

from gradsift.data.chat import ChatFormat
from gradsift.data.load import Columns, load_examples
from gradsift.evaluation.evaluate import evaluate
from gradsift.evaluation.harness import LMEval
from gradsift.evaluation.length_controlled import (
    LengthControlled,
    fit_logistic,
    length_controlled_win_rate,
    length_feature,
)
from gradsift.evaluation.setup import open_model
from gradsift.explanation.coefficients import CoefficientModel, coefficients
from gradsift.explanation.relevance import Relevance, aggregate_relevance, relevance_auc, selection_relevance, to_db
from gradsift.generation.sampling import Response, Sampling
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import find_modules
from gradsift.gradients.collect import Adam
from gradsift.gradients.policy import PolicyGradient, label_sequence, weighted_sequences
from gradsift.gradients.projection import Projection, Projector, plan_segments
from gradsift.gradients.rows import gradient_rows
from gradsift.influence.aggregate import max_of_means
from gradsift.influence.bm25 import Reading, bm25_scores
from gradsift.influence.datainf import datainf_scores, projected_inverse_scores
from gradsift.influence.dsir import DSIR, dsir_log_ratios, hashed_counts
from gradsift.influence.less import less_scores, unit_rows
from gradsift.influence.trak import TRAK, trak_scores
from gradsift.loss import token_mean
from gradsift.selection.facility_location import cost_from_scores, facility_location, similarity_from_gradients
from gradsift.selection.select import budget_count
from gradsift.selection.strategies import (
    Aide,
    Divine,
    FacilityLocation,
    LeastInfluential,
    MostHarmful,
    MostHelpful,
    MostInfluential,
    choose,
)
from gradsift.selection.top_k import top_k
from gradsift.selection.transport import tsds_probabilities
from gradsift.types import Sequence as TokenSequence
from gradsift.types import TokenizedExample
from gradsift.validation.one_step import StepModel, jensen_shannon, labels_of, log_likelihood
from gradsift.warmup.train import Warmup

REPOSITORY = Path(__file__).resolve().parents[1]
NUMBERS = REPOSITORY / "benchmarks" / "conformance"
PROGRAMS = NUMBERS / "programs"
PAGE = REPOSITORY / "docs" / "conformance.md"
TORCH = ("torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "numpy==2.4.6")

# Weights of tokens and the norms of Llama are in float32, everything else about the tiny model is in float64.
WEIGHTS = 1e-6
WARMUP = "warm-up: epochs, LoRA's r, α and dropout, rate, warm-up share, weight decay, length of a row, batch"
EXACT_SEARCH = 483  # the most candidates for which TSDS's index has as many cells as it looks into

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Compared:
    """One quantity from both sides.

    quantity:  what it is
    published: the function or file of the published code that computed `wanted`
    ours:      the function of gradsift that computed `found`
    tolerance: largest difference that is rounding, relative to the largest entry of `wanted`
    """

    quantity: str
    published: str
    ours: str
    found: Any
    wanted: Any
    tolerance: float = 1e-9

    @property
    def difference(self) -> float:
        """max |found − wanted| / max |wanted|; of choices and token ids, the share that differs."""
        found, wanted = np.asarray(self.found), np.asarray(self.wanted)
        assert found.shape == wanted.shape, (self.quantity, found.shape, wanted.shape)
        if self.exact:
            return float((found != wanted).mean())
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    @property
    def exact(self) -> bool:
        """Whole numbers, of which none may differ."""
        return np.asarray(self.wanted).dtype.kind in "iu"

    @property
    def agrees(self) -> bool:
        return self.difference <= (0 if self.exact else self.tolerance)


@dataclass(frozen=True)
class Departure:
    """What gradsift does otherwise on purpose.

    published, ours: the two readings
    effect:          of ours against theirs on the inputs compared here
    option:          what gives the published reading
    """

    published: str
    ours: str
    effect: str
    option: str = "none"


class Published:
    """A published code. Subclasses say what is compared; `record` is what their program recorded."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    environment: ClassVar[tuple[str, ...]]  # what pip installs
    unwanted: ClassVar[tuple[str, ...]] = ()
    package: ClassVar[str | None] = None  # its name on PyPI; None where a checkout is needed
    needs: ClassVar[str | None] = None  # a module that gradsift's side needs and an extra installs

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    @classmethod
    def load(cls) -> Published:
        return cls(json.loads((NUMBERS / f"{cls.name}.json").read_text()))

    @property
    def version(self) -> str:
        """Of the package, or the commit."""
        if self.package is None:
            return f"commit {self.record['commit'][:7]}"
        return str(self.record["packages"][self.package])

    def compared(self) -> Iterable[Compared]:
        raise NotImplementedError

    def departures(self) -> Iterable[Departure]:
        return ()

    @cached_property
    def agreement(self) -> tuple[list[Compared], list[Departure]]:
        """Both, computed once."""
        return list(self.compared()), list(self.departures())

    @classmethod
    def place(cls) -> Environment:
        return Environment(cls.name, cls.environment, cls.unwanted)

    @classmethod
    def run(cls, checkout: Path | None) -> None:
        """Run the program in its environment; it writes what it found."""
        command = [cls.place().program("python"), "-W", "ignore", PROGRAMS / f"with_{cls.name}.py"]
        with tempfile.TemporaryDirectory() as scratch:
            environment = process_environment(1, Path(scratch))
            del environment["PYTHONSAFEPATH"]  # the programs import what lies beside them
            done = subprocess.run(
                [*map(str, command), *([str(checkout)] if checkout else []), str(NUMBERS / f"{cls.name}.json")],
                env=environment,
                check=False,
            )
        if done.returncode:
            sys.exit(f"{cls.title}: its program exited with {done.returncode}; what it said is above")


# --- what several of them need ------------------------------------------------------------------------------------


@cache
def module(name: str) -> ModuleType:
    """A module beside the programs, which they import in their own environments: models and inputs."""
    spec = importlib.util.spec_from_file_location(name, PROGRAMS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def rows_of(
    sequences: Sequence[TokenSequence], count: int, moments: Mapping[str, Any] | None = None, **adam: Any
) -> Array:
    """gradsift's rows of the tiny model, unprojected `[row entry]`, parameters in the model's order.

    moments: by parameter name; with them, Adam's directions, with `adam` as their options.
    """
    model = module("tiny_lora").tiny_lora()
    modules = find_modules(model).captured
    projection = Projection(kind="none")
    projector = Projector(
        plan_segments({c.name: c.shape for c in modules}, projection), projection, dtype=torch.float64
    )
    directions = {
        c.name: AdamDirection(*moments[c.name.replace(".weight", ".default.weight")].values(), **adam)
        for c in modules
    } if moments else None  # fmt: skip
    view = "adam" if moments else "plain"
    found = gradient_rows(
        model, modules, projector, sequences, row_count=count, token_budget=64, views=[view], adam=directions
    )
    return found.rows[view].numpy()


def examples(count: int, seed: int) -> list[TokenizedExample]:
    """Conversations of the tiny model whose answers are supervised."""
    return [
        TokenizedExample(
            str(number), np.array(tokens.ids, dtype=np.int32), np.array([label >= 0 for label in tokens.labels])
        )
        for number, tokens in enumerate(module("tiny_lora").conversations(count, seed))
    ]


def labelled(count: int, seed: int) -> list[TokenSequence]:
    """One row each, with the mean loss of the answer."""
    return [token_mean(example, row) for row, example in enumerate(examples(count, seed))]


def trained(recipe: Mapping[str, Any], script: Mapping[str, float]) -> tuple[list[float], list[float]]:
    """The settings of a recipe's warm-up, and those of a training script of LESS's kind."""
    settings = dict(recipe["warmup"])
    ours = Warmup.preset(settings.pop("preset"), **settings)
    pairs = {
        "num_train_epochs": ours.epochs, "lora_r": ours.rank, "lora_alpha": ours.alpha, "lora_dropout": ours.dropout,
        "learning_rate": ours.learning_rate, "warmup_ratio": ours.warmup_ratio, "weight_decay": ours.weight_decay,
        "max_seq_length": recipe["max_length"],
    }  # fmt: skip
    batch = script["per_device_train_batch_size"] * script["gradient_accumulation_steps"]
    return [*map(float, pairs.values()), ours.batch_size], [*(script[name] for name in pairs), batch]


def recipe(name: str) -> Any:
    return yaml.safe_load((REPOSITORY / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean_of_ratios(gains: Sequence[float]) -> float:
    relevances = [Relevance(gain, to_db(gain), torch.ones(1), gain, 1.0) for gain in gains]
    return aggregate_relevance(relevances, how="mean_of_ratios")


def largest(found: Any, wanted: Any) -> float:
    """Difference between two numbers."""
    return float(np.abs(np.subtract(found, wanted)).max())


def rank_correlation(first: Any, second: Any) -> float:
    return float(spearmanr(np.ravel(first), np.ravel(second)).statistic)


def cosines(first: Array, second: Array) -> Array:
    """Row by row."""
    return np.asarray((unit_rows(torch.tensor(first)) * unit_rows(torch.tensor(second))).sum(dim=1))


# --- one published code each --------------------------------------------------------------------------------------


class Less(Published):
    name = "less"
    title = "LESS (Xia et al. 2024)"
    source = "https://github.com/princeton-nlp/LESS"
    environment = TORCH

    @cached_property
    def _rows(self) -> list[TokenSequence]:
        return labelled(len(self.record["sgd"]), seed=1)

    def _directions(self, **options: Any) -> Array:
        return rows_of(
            self._rows, len(self._rows), module("tiny_lora").moments(module("tiny_lora").tiny_lora(), seed=2), **options
        )

    def compared(self) -> Iterable[Compared]:
        plain = rows_of(self._rows, len(self._rows))
        yield Compared("per-example gradients", "obtain_gradients", "gradient_rows", plain, self.record["sgd"], WEIGHTS)
        yield Compared(
            "Adam's update directions, ε inside the root",
            "obtain_gradients_with_adam, prepare_optimizer_state",
            'gradient_rows, AdamDirection(eps_placement="inside")',
            self._directions(eps_placement="inside"),
            self.record["adam"],
            WEIGHTS,
        )
        given = self.record["scores"]
        scores = less_scores([*tensor(given["pool"])], [*tensor(given["target"])], given["rates"])
        subtasks = [position // 2 for position in range(scores.shape[1])]
        yield Compared(
            "scores: cosines weighted over checkpoints, mean within and maximum over subtasks",
            "merge_and_normalize_info, matching.py",
            "less_scores, max_of_means",
            max_of_means(scores, subtasks),
            given["scores"],
            1e-6,  # theirs in float32
        )
        choice = self.record["selection"]
        taken = choice["taken"]["--max_samples 7"]
        yield Compared("rows chosen", "write_selected_data.py", "top_k", top_k(tensor(choice["scores"]), 7), taken)
        chats, ours = self.record["chats"], self._chats
        yield Compared(
            "token ids of conversations in Tulu's format", "encode_with_messages_format", "ChatFormat.tokenize",
            [id_ for chat in ours for id_ in chat.token_ids.tolist()], [id_ for chat in chats for id_ in chat["ids"]],
        )  # fmt: skip
        yield Compared(
            "which of them are labels, but for the line's end after an answer", "encode_with_messages_format",
            "ChatFormat.tokenize", [int(label) for chat in ours for label in chat.supervised],
            [int(label) for chat in chats for label in self._labels(chat)],
        )  # fmt: skip
        yield Compared(
            WARMUP, "base_training_args.sh", "recipes/less-authors.yaml",
            *trained(recipe("less-authors"), self.record["training"]),
        )  # fmt: skip

    @cached_property
    def _chats(self) -> list[TokenizedExample]:
        tokenizer = ChatFormat(module("tiny_lora").byte_tokenizer())
        examples = load_examples([{"messages": chat["messages"]} for chat in self.record["chats"]]).examples
        return [chat for chat in tokenizer.tokenize_batch(examples) if isinstance(chat, TokenizedExample)]

    def _labels(self, chat: Mapping[str, Any]) -> Array:
        """Their labels without the newline that follows the token which ends a turn."""
        ids, labels = np.array(chat["ids"]), np.array(chat["labels"]) >= 0
        end = module("tiny_lora").byte_tokenizer().eos_token_id
        labels[1:] &= ids[:-1] != end
        return labels

    def departures(self) -> Iterable[Departure]:
        alike = cosines(self._directions(), np.array(self.record["adam"]))
        yield Departure(
            "Γ has ε inside the root, `√(v + 1e-8)`: entries with √v below 1e-4 are damped",
            f"ε {Adam().eps_placement}, `√v + 1e-8`, as Adam has it",
            f"cosine of the two directions of a row {alike.min():.2f} to {alike.max():.2f}, where a tenth of the "
            "entries has √v near 1e-5",
            '`Adam(eps_placement="inside")`, `gradients: {adam: {eps_placement: inside}}`',
        )
        choice = self.record["selection"]
        share, rows = 0.05, len(choice["scores"])
        taken = len(choice["taken"][f"--percentage {share}"])
        yield Departure(
            "a share of the rows is cut off to a whole number",
            "it is rounded",
            f"{budget_count(share, rows)} of {rows} rows at 5 %, {taken} in theirs",
            "a number of rows as the budget",
        )
        theirs = sum(label >= 0 for chat in self.record["chats"] for label in chat["labels"])
        ours = sum(int(chat.supervised.sum()) for chat in self._chats)
        yield Departure(
            "the line's end after an answer is a label",
            "the token that ends the turn is the last one, as nothing follows it when the model answers",
            f"{theirs - ours} of {theirs} labels of the conversations above",
        )
        script = self.record["training"]
        batch = script["per_device_train_batch_size"] * script["gradient_accumulation_steps"]
        yield Departure(
            f"the script trains with batches of {batch:g} a process", f"batches of {Warmup.preset('less').batch_size}, "
            "as the paper has them", "not measured", "`--batch-size 32`, `recipes/less-authors.yaml`",
        )  # fmt: skip


class DataInf(Published):
    name = "datainf"
    title = "DataInf (Kwon et al. 2024)"
    source = "https://github.com/ykwon0407/DataInf"
    environment = (*TORCH, "pandas", "tqdm")

    def _sides(self) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of pool and targets by module."""
        count = self.record["pool"]
        modules = [tensor(self.record[name]).flatten(1) for name in ("A", "B")]
        return [module[:count] for module in modules], [module[count:] for module in modules]

    def compared(self) -> Iterable[Compared]:
        pool, targets = self._sides()
        mean = [module.mean(dim=0, keepdim=True) for module in targets]
        dots = less_scores([torch.cat(pool, dim=1)], [torch.cat(targets, dim=1)], normalise=False)
        wanted = {name: -np.array(values) for name, values in self.record["influence"].items()}
        exact = -np.array(self.record["of_mean"]["accurate"])
        yield Compared(
            "inner products", "compute_hvp_identity", "less_scores(normalise=False)", dots, wanted["identity"]
        )
        yield Compared(
            "DataInf's scores, λ a tenth of the mean squared entry of a module",
            "IFEngineGeneration.compute_hvp_proposed",
            "datainf_scores",
            datainf_scores(pool, targets),
            wanted["proposed"],
        )
        yield Compared(
            "the inverse that DataInf approximates, of the mean target",
            "IFEngine.compute_hvp_accurate",
            "projected_inverse_scores",
            projected_inverse_scores(pool, mean)[:, 0],
            exact,
            1e-4,  # theirs in float32, through eigenvectors
        )

    def departures(self) -> Iterable[Departure]:
        stream = np.random.RandomState(12)
        scale = np.arange(1, 1025) ** -0.5
        rows = tensor(stream.standard_normal((84, 1024)) * scale)
        matrix = tensor(stream.choice([-1.0, 1.0], (1024, 128)) / 128**0.5)
        pool, targets = rows[:80], rows[80:]
        whole = datainf_scores([pool], [targets])
        projected = datainf_scores([pool @ matrix], [targets @ matrix])
        same = datainf_scores([pool @ matrix], [targets @ matrix], damping=float(pool.square().mean()) / 10)
        yield Departure(
            "λ is a tenth of the mean squared entry of the whole gradient",
            "the same of the stored, projected rows, whose entries are larger as there are fewer: λ grows by d/k",
            f"80 gradients of 1,024 entries on 128: rank correlation {rank_correlation(projected, same):.3f} between "
            f"the two λ on projected rows, {rank_correlation(whole, same):.2f} of whole and projected rows at one λ",
            "`DataInf(damping=λ)`; `--projection none`",
        )


class Compact(Published):
    name = "compact"
    title = "Compact Example-Based Explanations"
    source = "https://github.com/loris3/ceelm"
    # apricot 0.6.1 fails on numpy 2 in the mixtures that DIVINE and AIDE use.
    environment = ("torch==2.13.0", "transformers==5.24.0", "peft==0.21.2", "numpy==1.26.4", "pandas==2.3.3",
                   "pyarrow==22.0.0", "scipy", "scikit-learn", "apricot-select==0.6.1", "numba", "tqdm",
                   "psutil")  # fmt: skip
    orders: ClassVar = {
        "MostHelpful": MostHelpful(),
        "MostHarmful": MostHarmful(),
        "MostInfluential": MostInfluential(),
        "LeastInfluential": LeastInfluential(),
    }
    coders: ClassVar[Mapping[str, CoefficientModel]] = {
        "MSECoder": "MSE",
        "MSECoderProjUSimp": "MSEProjUSimp",
        "MSECoderProjUSimpSparse": "MSEProjUSimpSparseGSHP",
        "MSECoderProjUSimpSparseSoftThresh": "MSEProjUSimpSparseSoft",
        "MSECoderNNLSL2": "MSENNLSL2NormalEquations",
    }

    def __init__(self, record: Mapping[str, Any]) -> None:
        super().__init__(record)
        self._pool, tests, scores = map(torch.from_numpy, module("random_inputs").gradients(**record["gradients"]))
        # Of the first output. Their scores are negative where an example helps.
        self._test, self._scores = tests[0], -scores[0]

    def compared(self) -> Iterable[Compared]:
        for kind, theirs, strategy in (("naive", "TopK…", None), ("divine", "DIVINE…", Divine())):
            ours = "choose" if strategy is None else "choose(Divine(…))"
            yield Compared(
                f"picks of four orders, k = 1, 5, 8: {kind.replace('divine', 'DIVINE')}", f"explanations.py, {theirs}",
                ours, *self._picks(kind, strategy, (1, 5, 8)),
            )  # fmt: skip
        # At λ = 1 two that cover nobody but each other gain the same, and theirs decides by rounding.
        located = [
            self._picks(f"facility_location {trade_off}", FacilityLocation(trade_off=trade_off), budgets)
            for trade_off, budgets in (
                (0.0, (1, 5, 8)),
                (0.25, (1, 5, 8)),
                (0.5, (1, 5, 8)),
                (0.75, (1, 5, 8)),
                (1.0, (1, 5)),
            )
        ]
        yield Compared(
            "picks of four orders: facility location, λ = 0, ¼, ½, ¾ with k = 1, 5, 8, and λ = 1 with k = 1, 5",
            "explanations.py, FacilityLocation…", "choose(FacilityLocation(…))",
            *([*chain(*side)] for side in zip(*located, strict=True)),
        )  # fmt: skip
        yield Compared(
            "picks, k = 1, 5, 8: AIDE (near the gradient that theirs takes for the output's)", "explanations.py, AIDE",
            "choose(Aide())", *self._aide(self._pool[0]),
        )  # fmt: skip
        for coder, model in self.coders.items():
            t, wanted = self._fits(coder, model)
            yield Compared(
                f"coefficients {model}, k = 1, 3, 8", f"linear_coders.py, {coder}", f'coefficients(model="{model}")',
                t, wanted, 1e-5,  # theirs in float32
            )  # fmt: skip
        fits = [fit for fit in self.record["relevance"] if fit["coder"] in self.coders]
        errors = [self._relevance(fit).squared_error / len(self._test) for fit in fits]
        yield Compared(
            "mean squared error of the reconstruction", "score.py, mse", "selection_relevance", errors,
            [fit["mse"] for fit in fits], 1e-5,
        )  # fmt: skip
        auc = self.record["auc"]
        gains = {int(k): mean_of_ratios(values) for k, values in auc["gains"].items()}
        yield Compared(
            "area under the relevance over budgets", "scoring.ipynb, compute_auc",
            'relevance_auc, aggregate_relevance(how="mean_of_ratios")',
            10 ** (relevance_auc(gains) / 10), auc["area"],
        )  # fmt: skip
        given = self.record["datainf"]
        modules = [tensor(given[name]) for name in ("A", "B")]
        pool, targets = zip(*((part[: given["pool"]], part[given["pool"] :]) for part in modules), strict=True)
        yield Compared(
            "DataInf's scores", "influence_estimation/datainf", "datainf_scores", datainf_scores(pool, targets).T,
            -np.array(given["scores"]), 1e-5,
        )  # fmt: skip
        yield Compared(
            "BM25 of token ids (ours times k1 + 1)", "bm25_inf.py", 'bm25_scores(reading="compact")',
            2.5 * self._bm25("compact"), self.record["bm25"]["scores"], 1e-6,  # both in float32
        )  # fmt: skip
        likely = [[log_likelihood(logits, labels) for logits, labels in side] for side in self._logits]
        effects = self.record["validation"]["effects"]
        before = [effect["log_p_before_ft"] for effect in effects]
        yield Compared(
            "log p of an output before and after a step", "validation_engine.py, get_log_p", "log_likelihood", likely,
            [before, np.add(before, [effect["delta_log_p"] for effect in effects])], 1e-6,
        )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        fits = [fit for fit in self.record["relevance"] if fit["coder"] == "MSECoderProjUSimp"]
        few = max(abs(10 * math.log10(fit["gain"]) - self._relevance(fit).db) for fit in fits)
        first, *others = torch.from_numpy(rows_of(labelled(8, seed=1), 8))
        ours = selection_relevance(first, torch.stack(others))
        rest = first - ours.coefficients @ torch.stack(others)
        many = abs(10 * math.log10(first.var() / rest.var()) - ours.db)
        yield Departure(
            "relevance is a ratio of variances over a gradient's entries (`torch.var`): their means are taken off",
            "of squared norms, as the paper's equation 1 has it",
            f"up to {few:.2f} dB where the mean of 12 entries is a third of their deviation, {many:.2f} dB for a "
            f"gradient of {len(first)} entries of the tiny model",
        )
        yield Departure(
            "`KLT` takes k right singular vectors of k centred gradients; the last, of a singular value of 0, is "
            "whatever direction rounding leaves",
            "the k − 1 that there are, and t = 0 at k = 1",
            f"t differs by up to {largest(*self._fits('KLTCoder', 'KLT')):.2f}",
        )
        sparse = largest(*self._fits("MSECoderProjUSimpSparse", "MSEProjUSimpSparse"))
        yield Departure(
            "`MSEProjUSimpSparse` is the greedy selector with the hyperplane projector: entries may be negative",
            "with the simplex projector, as its name and the paper's constraint say",
            f"t differs by up to {sparse:.2f}",
            "`MSEProjUSimpSparseGSHP`",
        )
        yield Departure(
            "`MSENNLSL2` runs non-negative least squares on the normal equations",
            "on the ridge problem itself",
            f"t differs by up to {largest(*self._fits('MSECoderNNLSL2', 'MSENNLSL2')):.2g}",
            "`MSENNLSL2NormalEquations`",
        )
        ours, theirs = self._aide(self._test)
        yield Departure(
            "AIDE's closeness is to the training gradient that has the output's number (`get_gradient(train, index)`)",
            "to the output's own gradient",
            f"{np.not_equal(ours, theirs).sum()} of {len(theirs)} picks differ",
        )
        alike = rank_correlation(self._bm25("okapi"), self.record["bm25"]["scores"])
        yield Departure(
            "BM25's denominator is `tf + 1 + k1·(…)`, and a token that stands twice in a query counts once",
            "`tf + k1·(…)`, Okapi's, and each token of the query counts",
            f"rank correlation of scores {alike:.3f} on token ids",
            '`BM25(reading="compact")`',
        )
        pairs = zip(*self._logits, strict=True)
        jsd = [float(jensen_shannon(p, q).mean()) for (p, _), (q, _) in pairs]
        ratios = np.divide(jsd, [effect["jsd"] for effect in self.record["validation"]["effects"]])
        yield Departure(
            "prediction shift: `F.kl_div(log p, m)` and `F.kl_div(log q, m)` are KL(m‖p) and KL(m‖q), taken at the "
            "positions of the output's tokens, which predict the ones after them",
            "Jensen and Shannon's KL(p‖m) and KL(q‖m), at the positions that predict the output",
            f"ours is {ratios.min():.2f} to {ratios.max():.2f} times theirs",
        )

    def _bm25(self, reading: Reading) -> Array:
        """Ours `[target pool]`."""
        given = self.record["bm25"]
        pool, targets = ([[str(token) for token in text] for text in given[side]] for side in ("pool", "target"))
        return bm25_scores(pool, targets, k1=1.5, b=0.75, reading=reading).T

    def _picks(self, kind: str, strategy: Any, budgets: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ours and theirs of all orders and budgets, one after the other."""
        ours, theirs = [], []
        for order, naive in self.orders.items():
            own = naive if strategy is None else strategy.model_copy(update={"order": naive.order})
            recorded = self.record["selections"][kind][order]
            found, wanted = self._chosen(own, self._test, {str(budget): recorded[str(budget)] for budget in budgets})
            ours, theirs = ours + found, theirs + wanted
        return ours, theirs

    def _aide(self, target: Tensor) -> tuple[list[int], list[int]]:
        return self._chosen(Aide(), target, self.record["selections"]["aide"])

    def _chosen(self, strategy: Any, target: Tensor, recorded: Mapping[str, list[int]]) -> tuple[list[int], list[int]]:
        wanted = {int(budget): picks for budget, picks in recorded.items()}
        rows = self._pool
        found = choose(strategy, self._scores, lambda at: rows[at], target, list(wanted), candidates=20)
        return [pick for budget in wanted for pick in found[budget][0]], [*chain(*wanted.values())]

    def _relevance(self, fit: Mapping[str, Any]) -> Relevance:
        """Ours of a recorded fit."""
        return selection_relevance(self._test, self._pool[fit["chosen"]], coefficients=self.coders[fit["coder"]])

    def _fits(self, coder: str, model: CoefficientModel) -> tuple[Array, Array]:
        """Coefficients of all budgets, one after the other: ours and theirs."""
        fits = [fit for fit in self.record["relevance"] if fit["coder"] == coder]
        found = [coefficients(self._test, self._pool[fit["chosen"]], model=model).numpy() for fit in fits]
        return np.concatenate(found), np.concatenate([fit["t"] for fit in fits])

    @cached_property
    def _logits(self) -> tuple[list[tuple[Tensor, Tensor]], ...]:
        """Logits that predict each output's tokens, and those tokens, before and after the step."""
        given = self.record["validation"]
        outputs = examples(given["outputs"], seed=31)
        models = (module("tiny_lora").tiny_lora(), module("tiny_lora").moved(given["moved_by"]))
        steps = (StepModel(model, find_modules(model).captured) for model in models)
        return tuple([(step.logits(output), labels_of(output)) for output in outputs] for step in steps)


class Nice(Published):
    name = "nice"
    title = "NICE (Wang et al. 2025)"
    source = "https://github.com/JTWang2000/NICE"
    environment = (*TORCH, "pandas", "tqdm")
    samples: ClassVar = 6
    recipes: ClassVar = {"alpaca": "alpacaeval", "tldr": "tldr", "reward": "rlhf", "codex": "humaneval"}

    def _row(self, prompt: int, rewards: Sequence[float], **policy: Any) -> Array:
        """Our policy gradient of one prompt `[entry]`, of the answers that the program takes."""
        asked = module("tiny_lora").conversations(self.record["prompts"], seed=11)[prompt]
        ids = np.array(asked.prompt, dtype=np.int32)
        answers = module("tiny_lora").other_answers(asked, self.samples, seed=20 + prompt)
        responses = [
            Response("prompt", number, ids, np.array(answer, dtype=np.int32), "stop", "")
            for number, answer in enumerate(answers)
        ]
        sequences = weighted_sequences(responses, rewards, PolicyGradient(**policy))
        return rows_of(sequences, 1)[0]

    def _cases(self, policy: str, **wanted: Any) -> list[tuple[int, list[float], Array]]:
        """Prompt, the samples' rewards and the recorded gradient of what fits."""
        return [
            (case["prompt"], self.record["reward_table"][case["rewards"]][:-1], np.array(case["gradient"]))
            for case in self.record["policy_gradients"]
            if case["policy"] == policy and all(case[name] == value for name, value in wanted.items())
        ]

    def compared(self) -> Iterable[Compared]:
        for mean, reduction in ((False, "sum"), (True, "mean")):
            cases = self._cases("vanilla", token_mean=mean)
            rows = [self._row(prompt, rewards, logprob_reduction=reduction) for prompt, rewards, _ in cases]
            yield Compared(
                f"policy gradients, {reduction} over a response's tokens (ours times M: theirs is a sum over samples)",
                "obtain_policy_gradients", f'PolicyGradient(logprob_reduction="{reduction}"), gradient_rows',
                self.samples * np.array(rows), [gradient for _, _, gradient in cases], WEIGHTS,
            )  # fmt: skip
        kept = [
            case for case in self._cases("rejection", worst_case_protect=False, token_mean=False) if max(case[1]) > 0
        ]
        yield Compared(
            "policy gradients of `rejection`", "obtain_policy_gradients",
            'PolicyGradient(variant="weighted_rejection")',
            [self._row(prompt, rewards, variant="weighted_rejection") for prompt, rewards, _ in kept],
            [gradient for _, _, gradient in kept], WEIGHTS,
        )  # fmt: skip
        fallen = self._cases("rejection", worst_case_protect=True)
        asked = module("tiny_lora").conversations(self.record["prompts"], seed=11)
        weight = self.record["reward_table"]["none positive"][-1]
        pairs = zip(asked, examples(self.record["prompts"], seed=11), strict=True)
        labels = [label_sequence(np.array(tokens.prompt, dtype=np.int32), whole, "sum") for tokens, whole in pairs]
        yield Compared(
            "the labelled answer where no response is kept (theirs weighs it by its reward, ours by 1)",
            "obtain_policy_gradients", 'label_sequence, PolicyGradient(fallback="label")',
            [weight * rows_of([labels[prompt]], 1)[0] for prompt, _, _ in fallen],
            [gradient for _, _, gradient in fallen], WEIGHTS,
        )  # fmt: skip
        given = self.record["scores"]
        scores = less_scores([*tensor(given["pool"])], [*tensor(given["target"])], given["rates"])
        yield Compared(
            "scores of five subtasks of two prompts",
            "merge_and_normalize_info, matching_nice.py",
            "less_scores, max_of_means",
            max_of_means(scores, [position // 2 for position in range(scores.shape[1])]),
            given["scores"],
            1e-6,  # theirs in float32
        )

        recipes = {kind: recipe(f"nice-paper-{name}") for kind, name in self.recipes.items()}
        sampling = self.record["sampling"]
        lengths = [each["estimator"]["sampling"]["max_new_tokens"] for each in recipes.values()]
        yield Compared(
            "length of a response (AlpacaEval, TLDR, RLHF, HumanEval), top-k, top-p, seconds of a unit test",
            "collect_grads, obtain_policy_gradients", "recipes/nice-paper-*.yaml, Sampling",
            [*lengths, Sampling().top_k, Sampling().top_p, recipes["codex"]["reward"]["sandbox"]["timeout"]],
            [*(sampling["max_new_tokens"][f"policy_{kind}"] for kind in recipes), sampling["top_k"], sampling["top_p"],
             sampling["timeout"]],
        )  # fmt: skip
        yield Compared(
            "reward models of RLHF and TLDR", "collect_grads", "recipes/nice-paper-*.yaml",
            [letter for kind in ("reward", "tldr") for letter in map(ord, recipes[kind]["reward"]["model"])],
            [letter for name in sampling["reward_models"] for letter in map(ord, name)],
        )  # fmt: skip
        ours, theirs = zip(*(trained(each, self.record["training"]) for each in recipes.values()), strict=True)
        yield Compared(WARMUP, "base_training_args.sh", "recipes/nice-paper-*.yaml", ours, theirs)
        for kind, task in (("tldr", "tldr"), ("codex", "humaneval")):
            given = self.record["prompts_of"][task]
            columns = Columns(**recipes[kind]["target_columns"])
            (example,) = load_examples([given["row"]], columns=columns).examples
            prompt = example.messages[0]["content"]
            # HumanEval's begins the answer as well, and stands in Tulu's lines.
            theirs = given["prompt"].removeprefix("<|user|>\n").partition("\n<|assistant|>\n")[0]
            yield Compared(
                f"the prompt of a row of {task.replace('tldr', 'TLDR').replace('humaneval', 'HumanEval')}",
                "get_validation_dataset.py", f"recipes/nice-paper-{task}.yaml", [*map(ord, prompt)],
                [*map(ord, theirs)],
            )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        kept = [case for case in self._cases("rejection", token_mean=False) if max(case[1]) > 0]
        ours = np.array([self._row(prompt, rewards, variant="rejection") for prompt, rewards, _ in kept])
        alike = cosines(ours, np.array([gradient for _, _, gradient in kept]))
        yield Departure(
            "`rejection` weighs the responses that it keeps by their rewards",
            "the variant of that name is their mean",
            f"cosine of the two rows {alike.min():.2f} to {alike.max():.2f}",
            '`PolicyGradient(variant="weighted_rejection")`',
        )
        hard = self._cases("hard_rejection", token_mean=False, worst_case_protect=False)
        mixed = [case for case in hard if max(case[1]) > 0]
        soft = np.array([self._row(prompt, rewards, variant="weighted_rejection") for prompt, rewards, _ in mixed])
        alike = cosines(soft, np.array([gradient for _, _, gradient in mixed]))
        yield Departure(
            "`hard_rejection` keeps responses that earn at least as much as the labelled answer",
            "not there: those of positive reward",
            f"cosine of the two rows {alike.min():.2f} to {alike.max():.2f}",
        )
        yield Departure(
            f"temperature 1, and {self.record['sampling']['temperature']['policy_codex']} for HumanEval",
            f"{Sampling().temperature}, as the paper has it (1 for AlpacaEval)",
            "not measured",
            "`sampling: {temperature: 1}`",
        )


class Tsds(Published):
    name = "tsds"
    title = "TSDS (Liu et al. 2024)"
    source = "https://github.com/ZifanL/TSDS"
    environment = ("faiss-cpu==1.15.1", "numpy==2.4.6", "pyyaml", "tqdm")

    def compared(self) -> Iterable[Compared]:
        for case in self._cases(few=True):
            found, wanted = self._both(case)
            count = self._neighbours(case)[0]
            yield Compared(
                f"distribution over 240 candidates, α {case['alpha']:g}, C {case['C']:g}, σ {case['sigma']:g}, "
                f"K {count}", "tsds.py", "tsds_probabilities", found, wanted, 1e-5,  # theirs measures in float32
            )  # fmt: skip

    def _cases(self, few: bool) -> list[Mapping[str, Any]]:
        return [case for case in self.record["cases"] if (case["features"]["count"] <= EXACT_SEARCH) == few]

    def _neighbours(self, case: Mapping[str, Any]) -> tuple[int, int]:
        tenth = case["features"]["count"] // 10
        return min(case["max_K"], tenth), min(case["kde_K"], tenth)

    def _both(self, case: Mapping[str, Any]) -> tuple[Array, Array]:
        pool, targets = map(torch.from_numpy, module("random_inputs").candidates(**case["features"]))
        neighbours, near = self._neighbours(case)
        found = tsds_probabilities(
            pool, targets, alpha=case["alpha"], c=case["C"], sigma=case["sigma"], neighbours=neighbours,
            density_neighbours=near,
        )  # fmt: skip
        wanted = np.zeros(len(pool))
        for position, probability in case["probabilities"].items():
            wanted[int(position)] = probability
        return found.numpy(), wanted

    def departures(self) -> Iterable[Departure]:
        p = np.array(list(self._cases(few=True)[1]["probabilities"].values()))
        distinct = float((1 - (1 - p) ** 24).sum())
        yield Departure(
            "draws with replacement",
            "without, so that a budget of n are n examples",
            f"of 24 draws theirs holds {distinct:.1f} different examples in expectation (α 0.9), ours 24",
            "`TSDS(with_replacement=True)`",
        )
        (case,) = self._cases(few=False)
        found, wanted = self._both(case)
        yield Departure(
            "looks for neighbours in 10 of `√N/2` cells",
            "among all candidates",
            f"none up to {EXACT_SEARCH} candidates, where there are no more cells; at {len(found):,} in 16 dimensions "
            f"{100 * np.abs(found - wanted).sum() / 2:.0f} % of the mass lies on other candidates",
        )


class AlpacaEval(Published):
    name = "alpaca_eval"
    title = "AlpacaEval (Dubois et al. 2024)"
    source = "https://github.com/tatsu-lab/alpaca_eval"
    package = "alpaca-eval"
    environment = ("alpaca_eval==0.6.6", "scikit-learn==1.9.1", "numpy==2.4.6", "pandas==3.1.1", "patsy==1.0.3")
    fits: ClassVar = ("with difficulty", "without difficulty")

    def _inputs(self, case: Mapping[str, Any], fit: str) -> tuple[Any, ...]:
        difficulty = (case["difficulty"],) if fit == "with difficulty" else ()
        return case["preferences"], case["lengths"], case["baseline_lengths"], *difficulty

    def _pairs(self) -> Iterable[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
        return ((case, fit, case["fits"][fit]) for case in self.record["cases"] for fit in self.fits)

    def compared(self) -> Iterable[Compared]:
        found = [length_controlled_win_rate(*self._inputs(case, fit), strength=theirs["strength"])
                 for case, fit, theirs in self._pairs()]  # fmt: skip
        theirs = [fitted for _, _, fitted in self._pairs()]
        yield Compared(
            "length-controlled win rates at the penalty that theirs chose (12 to 800 instructions)",
            "get_length_controlled_winrate", "length_controlled_win_rate(strength=…)",
            [own.win_rate for own in found], [fitted["win_rate"] for fitted in theirs], 1e-4,  # liblinear stops early
        )  # fmt: skip
        yield Compared(
            "the same at the penalty that five-fold cross-validation chooses", "get_length_controlled_winrate",
            "length_controlled_win_rate", [own.win_rate for own in self._chosen],
            [fitted["win_rate"] for fitted in theirs], 5e-3,  # where two penalties fit alike, liblinear's noise decides
        )  # fmt: skip
        yield Compared(
            "θ, φ and ψ", "get_length_controlled_winrate", "length_controlled_win_rate(strength=…)",
            [[own.model, own.length, own.difficulty] for own in found],
            [[fitted["theta"], fitted["phi"], fitted["psi"]] for fitted in theirs], 3e-4,
        )  # fmt: skip
        small = [pair for pair in self._pairs() if pair[0]["instructions"] == 200]
        yield Compared(
            "log-likelihood of each held-out fold at each penalty (200 instructions)",
            "fit_LogisticRegressionCV", "fit_logistic",
            [self._fold_scores(case, fit, self.record["strengths"]) for case, fit, fitted in small],
            [fitted["fold_scores"] for _, _, fitted in small], 3e-5,
        )  # fmt: skip

    def _fold_scores(self, case: Mapping[str, Any], fit: str, strengths: Sequence[float]) -> list[list[float]]:
        preferences, lengths, baseline, *difficulty = map(np.array, self._inputs(case, fit))
        X = np.stack([np.ones(len(preferences)), length_feature(lengths, baseline), *difficulty], axis=1)
        folds = np.array(case["folds"])
        scores = []
        for fold in range(5):
            inside, outside = folds != fold, folds == fold
            fits = [X[outside] @ fit_logistic(X[inside], preferences[inside], strength) for strength in strengths]
            scores.append([float(np.mean(preferences[outside] * z - np.logaddexp(0, z))) for z in fits])
        return scores

    @cached_property
    def _chosen(self) -> list[LengthControlled]:
        return [length_controlled_win_rate(*self._inputs(case, fit)) for case, fit, _ in self._pairs()]

    def departures(self) -> Iterable[Departure]:
        pairs = list(zip(self._chosen, (fitted for _, _, fitted in self._pairs()), strict=True))
        apart = max(abs(own.win_rate - fitted["win_rate"]) for own, fitted in pairs)
        others = sum(abs(math.log(own.strength / fitted["strength"])) > 0.1 for own, fitted in pairs)
        yield Departure(
            "liblinear stops at a tolerance of 1e-4, which decides between penalties that fit alike",
            "the optimum, to 1e-9",
            f"another penalty in {others} of {len(pairs)} fits; win rates differ by up to {100 * apart:.2f} points",
        )
        yield Departure(
            "a pull towards two published baselines that game length",
            "left out: it needs their annotations, which a hub serves",
            "not measured",
        )


class Dsir(Published):
    name = "dsir"
    title = "DSIR (Xie et al. 2023)"
    source = "https://github.com/p-lambda/dsir"
    package = "data-selection"
    environment = ("data-selection==1.0.3", "nltk==3.10.4")

    def _weights(self, buckets: int, smoothing: float) -> Array:
        counts = [hashed_counts(self.record[side], buckets) for side in ("pool", "target")]
        return np.asarray(dsir_log_ratios(*counts, smoothing=smoothing))

    def compared(self) -> Iterable[Compared]:
        for case in self.record["cases"]:
            found = self._weights(case["buckets"], 1e-8)
            yield Compared(
                f"log importance weights, {case['buckets']:,} buckets, on text, code, signs and accents",
                "HashedNgramDSIR.compute_importance_weights", "dsir_log_ratios(smoothing=1e-8)", found,
                case["weights"], 1e-12,
            )  # fmt: skip
            wanted = case["highest"]["0"]
            yield Compared(
                f"the three highest, {case['buckets']:,} buckets", "resample(top_k=True)", "top_k",
                sorted(top_k(torch.from_numpy(found), len(wanted))), wanted,
            )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        case = self.record["cases"][0]
        ours = self._weights(case["buckets"], DSIR().smoothing)
        yield Departure(
            "1e-8 is added to the probability of each bucket",
            f"{DSIR().smoothing:g}, for targets of a few dozen examples",
            f"rank correlation of weights {rank_correlation(ours, case['weights']):.2f} with a target of two texts",
            "`DSIR(smoothing=1e-8)`",
        )
        given = self.record["scripts"]
        counts = [hashed_counts(given[side], given["buckets"]) for side in ("pool", "target")]
        parted = dsir_log_ratios(*counts, smoothing=1e-8)
        changed = [abs(1 - own / other) for own, other in zip(parted, given["weights"], strict=True)]
        yield Departure(
            "words end at combining marks, and Chinese is one word up to the next sign",
            "marks belong to their letters; scripts without spaces are taken apart into pairs of characters",
            f"log weights change by {100 * changed[0]:.0f} % for a text in Hindi, {100 * changed[1]:.0f} % in Chinese",
        )
        kept = set(case["highest"]["10"])
        yield Departure(
            "texts of fewer than 100 words cannot be chosen (`min_example_length`)",
            "no minimum",
            f"at a minimum of 10 words {len(kept - set(case['highest']['0']))} of the three highest are other texts",
        )


class Apricot(Published):
    name = "apricot"
    title = "apricot (Schreiber et al. 2020)"
    source = "https://github.com/jmschrei/apricot"
    package = "apricot-select"
    environment = ("apricot-select==0.6.1", "numba", "numpy==2.4.6", "scikit-learn==1.9.1")

    def compared(self) -> Iterable[Compared]:
        gradients, scores = tensor(self.record["gradients"]), tensor(self.record["scores"])
        for kind in ("cosine_squared", "cosine_shifted"):
            cases = [case for case in self.record["cases"] if case["similarity"] == kind]
            similarity, cost = similarity_from_gradients(gradients, kind), cost_from_scores(scores)
            found = [facility_location(similarity, cost, budget=len(case["picks"]), trade_off=case["trade_off"])
                     for case in cases]  # fmt: skip
            yield Compared(
                f"facility location: first {min(map(len, found))} to {max(map(len, found))} picks of 100, {kind}, "
                "λ = ¼, ½, ¾, 1", "FacilityLocationSelection", "facility_location", [*chain(*found)],
                [*chain(*(case["picks"] for case in cases))],
            )  # fmt: skip


class RankBm25(Published):
    name = "rank_bm25"
    title = "rank_bm25 (BM25)"
    source = "https://github.com/dorianbrown/rank_bm25"
    package = "rank-bm25"
    environment = ("rank-bm25==0.2.2", "numpy==2.4.6")

    def compared(self) -> Iterable[Compared]:
        singles = {word: scores for word, scores in self.record["single_words"].items() if max(scores) > 0}
        found = bm25_scores(self.record["pool"], [[word] for word in singles], k1=1.5, b=0.75).T
        yield Compared(
            "what a single word gives each text, relative to the text that it gives most",
            "BM25Okapi.get_scores", "bm25_scores", [row / row.max() for row in found],
            [np.array(scores) / max(scores) for scores in singles.values()], 1e-6,  # ours in float32
        )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        ours = bm25_scores(self.record["pool"], self.record["target"], k1=1.5, b=0.75).T
        theirs = np.array(self.record["scores"])
        by_query = [rank_correlation(own, other) for own, other in zip(ours, theirs, strict=True)]
        yield Departure(
            "idf is `log((N − n + ½)/(n + ½))`, and a quarter of the mean idf for words in more than half of the texts",
            "`log(1 + (N − n + ½)/(n + ½))`, never negative; without the constant factor k1 + 1",
            f"rank correlation of a query's scores {min(by_query):.2f} to {max(by_query):.2f} on 25 texts in which "
            "many words are frequent",
        )


class Kronfluence(Published):
    name = "kronfluence"
    title = "kronfluence"
    source = "https://github.com/pomonam/kronfluence"
    package = "kronfluence"
    environment = (*TORCH, "kronfluence==1.0.1")
    unwanted = ("torchvision",)  # of another build than torch, with which transformers does not import

    def compared(self) -> Iterable[Compared]:
        pool, target = (rows_of(labelled(self.record[side], self.record[f"{side}_seed"]), self.record[side])
                        for side in ("pool", "target"))  # fmt: skip
        found = less_scores([torch.tensor(pool)], [torch.tensor(target)], normalise=False)
        yield Compared(
            "inner products of per-example gradients, over LoRA's A and B", 'strategy="identity"',
            "gradient_rows, less_scores(normalise=False)", found.T, self.record["scores"], WEIGHTS,
        )  # fmt: skip


class Dattri(Published):
    name = "dattri"
    title = "dattri"
    source = "https://github.com/TRAIS-Lab/dattri"
    package = "dattri"
    environment = ("torch==2.13.0", "torchvision==0.28.0", "numpy==2.4.6", "dattri==0.3.0")

    def _of(self, what: str, side: str) -> list[Tensor]:
        return [*tensor(self.record[what][side])]

    def compared(self) -> Iterable[Compared]:
        pool, target = self._of("gradients", "pool"), self._of("gradients", "target")
        rates, scores = self.record["rates"], self.record["scores"]
        for name, normalise in (("tracin", False), ("cosine", True)):
            found = sum(rates) * less_scores(pool, target, rates, normalise=normalise)
            yield Compared(
                f"{'cosines' if normalise else 'inner products'} over two checkpoints (ours times the sum of rates)",
                f"TracInAttributor(normalized_grad={normalise})", f"less_scores(normalise={normalise})", found,
                scores[name],
            )  # fmt: skip
        layers = self.record["layers"]
        found = datainf_scores(pool[-1].split(layers, dim=1), target[-1].split(layers, dim=1), damping=0.05)
        yield Compared(
            "DataInf's scores", "IFAttributorDataInf", "datainf_scores(damping=0.05)", found, scores["datainf"]
        )
        count, entries = len(pool[0]), sum(layers)
        for damping in (0.0, 0.002):
            own = max(damping * entries / count, 1e-14)  # theirs divides rows by √entries, and no sum by the count
            found = trak_scores(
                pool, target, self._of("losses", "pool"), self._of("losses", "target"), damping=own
            ) / count  # fmt: skip
            yield Compared(
                f"TRAK's scores, λ {damping:g} (ours over the number of rows)",
                f"TRAKAttributor(regularization={damping:g})", "trak_scores", found, scores[f"trak {damping}"],
                1e-6 if damping == 0 else 1e-9,
            )  # fmt: skip

    def departures(self) -> Iterable[Departure]:
        pool, target = self._of("gradients", "pool"), self._of("gradients", "target")
        ours = trak_scores(pool, target, self._of("losses", "pool"), self._of("losses", "target"))
        yield Departure(
            "TRAK's kernel has no damping unless it is asked for",
            "a tenth of the mean squared entry of the margins' gradients; without any, fewer rows than dimensions have "
            "no inverse",
            f"rank correlation of scores {rank_correlation(ours, self.record['scores']['trak 0.0']):.2f} on 20 rows of "
            f"{sum(self.record['layers'])} dimensions",
            "`TRAK(damping=λ)`",
        )
        parts = trak_scores(
            pool, target, self._of("losses", "pool"), self._of("losses", "target"), segments=self.record["layers"]
        )
        yield Departure(
            "one kernel over all dimensions",
            f'`TRAK(kernel="{TRAK().kernel}")`, module by module',
            f"rank correlation of scores {rank_correlation(ours, parts):.2f} on two layers",
            '`TRAK(kernel="whole")`',
        )


class Bergson(Published):
    name = "bergson"
    title = "bergson"
    source = "https://github.com/EleutherAI/bergson"
    package = "bergson"
    environment = (*TORCH, "bergson==2.5.1", "datasets==5.2.0")
    unwanted = ("torchvision", "torchaudio")

    def compared(self) -> Iterable[Compared]:
        theirs = np.concatenate([np.array(part) for part in self.record["gradients"].values()], axis=1)
        ours = rows_of(labelled(len(theirs), seed=1), len(theirs))
        yield Compared(
            "per-example gradients, not projected", "InMemoryCollector, CollectorComputer", "gradient_rows", ours,
            theirs, 1e-6,  # theirs kept in float32
        )  # fmt: skip


class LmEval(Published):
    name = "lm_eval"
    title = "Language Model Evaluation Harness"
    source = "https://github.com/EleutherAI/lm-evaluation-harness"
    package = "lm-eval"
    needs = "lm_eval"
    environment = (*TORCH, "lm-eval[hf]==0.4.13")

    def compared(self) -> Iterable[Compared]:
        # A perplexity's error is of a bootstrap, which differs in the number of its samples.
        wanted = {name: value for name, value in self.record["figures"].items() if "perplexity_stderr" not in name}
        found = self._measured()
        yield Compared(
            "accuracies, a perplexity and standard errors of two local tasks", "python -m lm_eval --model hf",
            "evaluate(LMEval(…))", [found[name] for name in wanted], list(wanted.values()), 1e-6,
        )  # fmt: skip

    def _measured(self) -> dict[str, float]:
        """Figures and standard errors, as the command line names them."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            module("tiny_lora").save_tiny_model(folder / "model")
            (folder / "tasks").mkdir()
            data = folder / "tasks" / "data.jsonl"
            data.write_text("".join(json.dumps(row) + "\n" for row in self.record["rows"]))
            for name, text in self.record["tasks"].items():
                (folder / "tasks" / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
            setup = open_model(str(folder / "model"), out=str(folder / "run"), max_length=32, device="cpu")
            metric = LMEval(tasks=tuple(self.record["tasks"]), include_path=str(folder / "tasks"))
            (measured,) = evaluate(setup, None, [metric]).results
        errors = {f"{figure.name}_stderr": figure.standard_error or 0.0 for figure in measured.figures}
        return {figure.name: figure.value for figure in measured.figures} | errors


CODES: tuple[type[Published], ...] = (
    Less, DataInf, Nice, Compact, Apricot, RankBm25, Dsir, Tsds, AlpacaEval, Dattri, Kronfluence, Bergson, LmEval,
)  # fmt: skip


# --- the page -----------------------------------------------------------------------------------------------------

HEAD = """# Agreement with published code

Most of gradsift's methods have published code, of a paper or in a package. It was run on small inputs, in environments
of its own, and gradsift's numbers on the same inputs are compared with what it gave. The numbers are in
[benchmarks/conformance](../benchmarks/conformance), and the tests compare with them each time. `python
benchmarks/conformance.py` makes this page; its `--help` says how the published code is run again.

**Difference** is the largest one between two numbers, relative to the largest number compared, or the share of choices
or token ids that differ; **rounding** is what is allowed for it. Where it is far above 1e-16 one side computes in
float32, or stops early. Measured 2026-11-28 on a CPU.
"""

TAIL = """## Without published code

JI2S has none; of DIVINE and AIDE, Compact's readings are compared above. TRAK is compared with dattri's: the soft
threshold at the end of its paper's algorithm is in neither. What is gradsift's own (relevance pursuit, greedy joint
selection, the exact optimum on the simplex) is tested against brute force.

What the differences do on real rows and models: [LESS](less-paper.md), [NICE](nice-paper.md), [Compact](explanations.md)
and [DSIR and TSDS](how-to-choose.md).
"""


def page(codes: Sequence[Published]) -> str:
    """docs/conformance.md."""
    agreed = ["| published code | quantity | theirs | ours | difference | rounding |", "|---|---|---|---|---|---|"]
    departed = ["| published code | theirs | ours | effect, measured | option for theirs |", "|---|---|---|---|---|"]
    for code in codes:
        name = f"[{code.title}]({code.source})"
        first = f"{name}, {code.version}"
        for one in code.agreement[0]:
            size = f"{shown(one.difference)} | {'none' if one.exact else f'{one.tolerance:.0e}'}"
            agreed.append(f"| {first} | {one.quantity} | {one.published} | {one.ours} | {size} |")
            first = ""
        first = name
        for other in code.agreement[1]:
            departed.append(f"| {first} | {other.published} | {other.ours} | {other.effect} | {other.option} |")
            first = ""
    parts = [HEAD, "## What agrees\n", "\n".join(agreed), "", "## Deliberate departures\n",
             "In every line gradsift does otherwise unless the option in its last column is given.\n",
             "\n".join(departed), "", TAIL]  # fmt: skip
    return "\n".join(parts)


def shown(difference: float) -> str:
    return "0" if difference == 0 else f"{difference:.0e}"


def without_differences(text: str) -> str:
    """The page without what rounding changes from one machine to the next."""
    return re.sub(r"\| (?:0|\de-\d\d) (?=\| \de-\d\d \|$)", "| … ", text, flags=re.MULTILINE)


def main() -> None:
    names = [code.name for code in CODES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", nargs="+", metavar="NAME", choices=names, default=[], help="make environments")
    parser.add_argument("--record", nargs="*", metavar="NAME", choices=names, help="run published code; all by default")
    parser.add_argument("--checkout", action="append", default=[], metavar="NAME=FOLDER", help="of a paper's code")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is off")
    options = parser.parse_args()
    by_name = {code.name: code for code in CODES}
    for name in options.setup:
        by_name[name].place().make()
    if options.record is not None:
        checkouts = {name: Path(folder) for name, _, folder in (given.partition("=") for given in options.checkout)}
        for name in options.record or names:
            record_one(by_name[name], checkouts.get(name))
    if options.setup and options.record is None:
        return
    absent = [code.title for code in CODES if code.needs and importlib.util.find_spec(code.needs) is None]
    if absent:
        sys.exit(f"{', '.join(absent)}: gradsift's side needs the extra eval: pip install 'gradsift[eval]'")
    codes = [code.load() for code in CODES]
    off = [f"{code.title}: {one.quantity} differ by {one.difference:.2g}"
           for code in codes for one in code.agreement[0] if not one.agrees]  # fmt: skip
    text = page(codes)
    if options.check:
        if without_differences(text) != without_differences(PAGE.read_text()):
            off.append(f"{PAGE} is not what this script writes: run it without --check")
    else:
        PAGE.write_text(text)
    sys.exit("\n".join(off) if off else 0)


def record_one(code: type[Published], checkout: Path | None) -> None:
    if not code.place().program("python").exists():
        print(f"{code.title}: left out, no environment at {code.place().folder}: --setup {code.name}", file=sys.stderr)
    elif code.package is None and checkout is None:
        print(f"{code.title}: left out, no checkout of {code.source}: --checkout {code.name}=FOLDER", file=sys.stderr)
    else:
        code.run(checkout)


if __name__ == "__main__":
    main()
