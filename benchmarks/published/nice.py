"""NICE: policy gradients, scores, and the settings of its recipes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from published.base import TORCH, Array, Compared, Departure, Published
from published.shared import (
    WARMUP,
    WEIGHTS,
    cosines,
    examples,
    module,
    recipe,
    rows_of,
    tensor,
    trained,
)

from gradsift.data.load import Columns, load_examples
from gradsift.generation.sampling import Response, Sampling
from gradsift.gradients.policy import PolicyGradient, label_sequence, weighted_sequences
from gradsift.influence.aggregate import max_of_means
from gradsift.influence.less import less_scores


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

        recipes = {kind: recipe(f"nice-compare-{name}") for kind, name in self.recipes.items()}
        sampling = self.record["sampling"]
        lengths = [each["estimator"]["sampling"]["max_new_tokens"] for each in recipes.values()]
        yield Compared(
            "length of a response (AlpacaEval, TLDR, RLHF, HumanEval), top-k, top-p, seconds of a unit test",
            "collect_grads, obtain_policy_gradients", "recipes/nice-compare-*.yaml, Sampling",
            [*lengths, Sampling().top_k, Sampling().top_p, recipes["codex"]["reward"]["sandbox"]["timeout"]],
            [*(sampling["max_new_tokens"][f"policy_{kind}"] for kind in recipes), sampling["top_k"], sampling["top_p"],
             sampling["timeout"]],
        )  # fmt: skip
        yield Compared(
            "reward models of RLHF and TLDR", "collect_grads", "recipes/nice-compare-*.yaml",
            [letter for kind in ("reward", "tldr") for letter in map(ord, recipes[kind]["reward"]["model"])],
            [letter for name in sampling["reward_models"] for letter in map(ord, name)],
        )  # fmt: skip
        ours, theirs = zip(*(trained(each, self.record["training"]) for each in recipes.values()), strict=True)
        yield Compared(WARMUP, "base_training_args.sh", "recipes/nice-compare-*.yaml", ours, theirs)
        for kind, task in (("tldr", "tldr"), ("codex", "humaneval")):
            given = self.record["prompts_of"][task]
            columns = Columns(**recipes[kind]["target_columns"])
            (example,) = load_examples([given["row"]], columns=columns).examples
            prompt = example.messages[0]["content"]
            # HumanEval's begins the answer as well, and stands in Tulu's lines.
            theirs = given["prompt"].removeprefix("<|user|>\n").partition("\n<|assistant|>\n")[0]
            yield Compared(
                f"the prompt of a row of {task.replace('tldr', 'TLDR').replace('humaneval', 'HumanEval')}",
                "get_validation_dataset.py", f"recipes/nice-compare-{task}.yaml", [*map(ord, prompt)],
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
