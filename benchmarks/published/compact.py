"""Compact's code: selections, coefficients, relevance, BM25, DataInf and validation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from published.base import Array, Compared, Departure, Published
from published.shared import (
    examples,
    labelled,
    largest,
    mean_of_ratios,
    module,
    rank_correlation,
    rows_of,
    tensor,
)
from torch import Tensor

from gradsift.explanation.coefficients import CoefficientModel, coefficients
from gradsift.explanation.relevance import Relevance, relevance_auc, selection_relevance
from gradsift.gradients.capture import find_modules
from gradsift.influence.bm25 import Reading, bm25_scores
from gradsift.influence.datainf import datainf_scores
from gradsift.selection.aide import Aide
from gradsift.selection.candidates import Candidates
from gradsift.selection.divine import Divine
from gradsift.selection.facility_location import FacilityLocation
from gradsift.selection.selector import choose_all
from gradsift.selection.top_k import LeastInfluential, MostHarmful, MostHelpful, MostInfluential
from gradsift.validation.one_step import StepModel, jensen_shannon, labels_of, log_likelihood


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
        pool = Candidates(self._scores, lambda at: rows[at], target, count=20)
        found = choose_all([strategy], pool, list(wanted))[0]
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
