"""NICE end to end on a tiny model: samples, rewards, rows, scores, what is kept, what is said of weak signals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import wilcoxon

from enumeration import PROMPT, VOCABULARY, Policy, response, unit
from gradsift.base.errors import ConfigError, DataError
from gradsift.base.types import Sequence as TokenSequence
from gradsift.context import Pool, open_target
from gradsift.generation.assistant import Assistant
from gradsift.generation.endpoint import Endpoint
from gradsift.generation.sampling import Sampling
from gradsift.gradients.collect import Gradients
from gradsift.gradients.policy import PolicyGradient, PolicySource
from gradsift.gradients.projection import Projection
from gradsift.influence.bm25 import BM25
from gradsift.influence.datainf import datainf_scores
from gradsift.influence.less import LESS, less_scores
from gradsift.influence.magic import MAGIC
from gradsift.influence.nice import NICE, NICEIF, PolicyTargets, checkpoint_name, sampler_of, signal_warnings
from gradsift.influence.prompts import PromptTarget, RewardSummary, open_prompts
from gradsift.influence.random import Random
from gradsift.influence.rerank import Rerank
from gradsift.influence.scores import aggregated, score
from gradsift.model.models import load_tokenizer
from gradsift.rewards.form import Length
from gradsift.rewards.function import Function
from gradsift.validation.bench import Bench, bench
from tiny_world import World, pool_rows, save_model, target_rows

NONE = Gradients(projection=Projection(kind="none"), dtype="float32")
FEW = Sampling(samples=4, max_new_tokens=6)
PLAIN = PolicyGradient()


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between random texts."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in completions]


def prompts_only() -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "completion"} for row in target_rows()]


@pytest.fixture(scope="module")
def pool(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny.open_pool(tmp_path_factory.mktemp("nice") / "run")


@pytest.fixture(scope="module")
def target(pool: Pool) -> PromptTarget:
    return open_prompts(prompts_only(), pool, vowels, subtask="task")


def policy_rows(pool: Pool, target: PromptTarget, method: NICE | NICEIF) -> list[torch.Tensor]:
    """The policy gradients at each checkpoint, from the stores."""
    targets = PolicyTargets(pool, target, method)
    return [
        pool.collect(targets.at(checkpoint), checkpoint, ["plain"], what="target")["plain"].rows_by_id(target.data.ids)
        for checkpoint in pool.checkpoints()
    ]


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [NICE(sampling=FEW), NICE(sampling=FEW, optimizer="sgd", normalise=False), NICE(sampling=FEW, checkpoints="last")],
    ids=lambda method: method.label,
)
def test_nice_is_less_with_policy_gradients(pool: Pool, target: PromptTarget, method: NICE) -> None:
    """Adam directions of the pool, policy gradients normalised after the sum over samples, weighted by η̄."""
    checkpoints = pool.checkpoints()
    view = "adam" if method.optimizer == "adam" else "plain"
    rows = [pool.stores(checkpoint, [view])[view].rows_by_id(pool.data.ids).double() for checkpoint in checkpoints]
    queries = [found.double() for found in policy_rows(pool, target, method)]
    rates = [checkpoint.learning_rate or 0.0 for checkpoint in checkpoints]
    first = -1 if method.checkpoints == "last" else 0
    wanted = less_scores(rows[first:], queries[first:], rates[first:], normalise=method.normalise).numpy()
    found = score(pool, target, method)
    assert found.per_target is not None
    assert np.allclose(found.per_target, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    assert found.target_ids == target.data.ids
    means = [found.per_target[:, part].mean(axis=1) for part in ([0, 2], [1, 3])]
    assert np.allclose(found.aggregate, np.maximum(*means), rtol=1e-5, atol=1e-8)
    assert len(found.rewards) == (1 if method.checkpoints == "last" else 2)


def test_nice_if_is_datainf_with_policy_gradients(pool: Pool, target: PromptTarget) -> None:
    """Plain gradients on both sides at the last checkpoint, module by module, not normalised."""
    checkpoint = pool.checkpoints()[-1]
    store = pool.stores(checkpoint, ["plain"])["plain"]
    sizes = [stop - start for start, stop in store.segments.values()]
    for method in (NICEIF(sampling=FEW), NICEIF(sampling=FEW, damping=1e-3)):
        queries = policy_rows(pool, target, method)[-1]
        rows = store.rows_by_id(pool.data.ids)
        wanted = datainf_scores(rows.split(sizes, dim=1), queries.split(sizes, dim=1), damping=method.damping).numpy()
        found = score(pool, target, method).per_target
        assert found is not None
        assert np.allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_the_policy_rows_are_those_of_the_responses(pool: Pool, target: PromptTarget) -> None:
    """At each checkpoint its own adapter's samples and rewards of their text make the weights, prompt by prompt."""
    targets = PolicyTargets(pool, target, NICE(sampling=FEW))
    seen = []
    for checkpoint in pool.checkpoints():
        responses, rewards, samples = targets.rollouts(checkpoint)
        assert samples.identity["adapter"] == checkpoint.identity()
        seen.append({key: tuple(r.token_ids.tolist()) for own in responses.values() for r in own for key in [r.key]})
        source = targets.at(checkpoint)
        assert source.ids == target.data.ids
        for id_, own, row in zip(source.ids, responses.values(), source.rows, strict=True):
            assert [r.number for r in own] == [0, 1, 2, 3]
            wanted = {r.number: vowels([r.text])[0] for r in own}
            assert {r.number: rewards[id_, r.number] for r in own} == wanted
            ids = pool.chat.prompt_ids([{"role": "user", "content": target.data.row(id_)["prompt"]}])
            assert all(sequence.token_ids[: len(ids)].tolist() == ids for sequence in row)
            weights = sorted(float(sequence.weights[-1]) for sequence in row)
            assert weights == pytest.approx(sorted(w / 4 for w in wanted.values() if w))
    assert seen[0] != seen[1]


def test_a_reward_for_more_of_a_token_prefers_rows_that_raise_it(pool: Pool) -> None:
    """Sign: with the reward 'is the pool row's own answer', that row is helped by itself the most."""
    row = pool_rows()[6]
    answer = pool.data.by_id(row["id"])
    tokens = answer.token_ids[answer.supervised]
    prompt = answer.token_ids[: int(answer.supervised.argmax())]
    good, bad = np.array(tokens), np.array(tokens[::-1])
    responses = [response(0, good, prompt_id="q", prompt=prompt), response(1, bad, prompt_id="q", prompt=prompt)]
    source = PolicySource.of({"q": responses}, {("q", 0): 1.0, ("q", 1): 0.0}, PLAIN, template=pool.chat.fingerprint)
    checkpoint = pool.checkpoints()[-1]
    query = pool.collect(source, checkpoint, ["plain"], what="target")["plain"].rows_by_id(["q"])
    rows = pool.stores(checkpoint, ["plain"])["plain"].rows_by_id(pool.data.ids)
    found = less_scores([rows], [query])[:, 0]
    assert pool.data.ids[int(found.argmax())] == row["id"]
    assert float(found.max()) == pytest.approx(1, abs=1e-3)


def test_labels_and_controls_on_the_same_prompts(pool: Pool) -> None:
    """LESS takes the prompts that have an answer, as from a labelled target, and says which ones do not count."""
    labelled = open_prompts(target_rows(), pool, vowels, subtask="task")
    assert labelled.labels is not None
    plain = open_target(target_rows(), pool, subtask="task")
    for method in (LESS(), BM25(), BM25(tokens="model"), Random(seed=1)):
        assert np.array_equal(score(pool, labelled, method).aggregate, score(pool, plain, method).aggregate)
    bare = open_prompts(prompts_only(), pool, vowels)
    assert bare.labels is None
    for control in (BM25(), BM25(tokens="model"), Random(seed=1)):
        assert len(np.unique(score(pool, bare, control).aggregate)) > 1
    lacking = [*target_rows()[:3], prompts_only()[3]]
    half = open_prompts(lacking, pool, vowels, subtask="task")
    rest = open_target(target_rows()[:3], pool, subtask="task")
    for method in (LESS(), MAGIC(), Rerank(then=LESS(), candidates=3)):
        found = score(pool, half, method)
        assert "1 of 4 prompts without an answer to learn do not count, first 't3'" in found.warnings[0]
        assert found.target_ids == ["t0", "t1", "t2"]
        assert np.array_equal(found.aggregate, score(pool, rest, method).aggregate)
    judged = bench(pool, half, [LESS(), BM25()], settings=Bench(marked="source=colour"))
    assert "nor do they for other methods" in judged.warnings[0]
    assert not judged.failed
    with pytest.raises(ConfigError, match="LESS needs labels, and none of 4 prompts has an answer to learn: use NICE"):
        score(pool, bare, LESS())
    with pytest.raises(ConfigError, match="ranks by a reward, and none is named: give --reward"):
        score(pool, plain, NICE(sampling=FEW))


def test_answers_of_prompts_change_nothing_for_nice(pool: Pool, target: PromptTarget) -> None:
    """NICE reads the prompt alone: with and without the rows' answers, the same scores."""
    labelled = open_prompts(target_rows(), pool, vowels, subtask="task")
    method = NICE(sampling=FEW)
    assert np.array_equal(score(pool, labelled, method).aggregate, score(pool, target, method).aggregate)


def test_prompts_without_signal_fall_back_to_labels(pool: Pool, target: PromptTarget) -> None:
    """With rewards that only the first prompt earns, the others' columns are those of the label's gradient; a target
    without answers refuses."""

    def first_alone(prompts: Any, completions: Any, **_: Any) -> list[float]:
        return [float("of 0" in str(prompt)) for prompt in prompts]

    labelled = open_prompts(target_rows(), pool, first_alone, subtask="task")
    method = NICE(sampling=FEW, policy=PolicyGradient(variant="weighted_rejection", fallback="label"))
    found = score(pool, labelled, method).per_target
    bare = score(pool, labelled, NICE(sampling=FEW, policy=PolicyGradient(variant="weighted_rejection"))).per_target
    labels = score(pool, labelled, LESS()).per_target
    assert found is not None
    assert bare is not None
    assert labels is not None
    assert not bare[:, 1:].any()
    assert np.allclose(found[:, 0], bare[:, 0], atol=1e-6)
    assert np.allclose(found[:, 1:], labels[:, 1:], atol=1e-3)  # cosines: a sum over tokens has the mean's direction
    with pytest.raises(ConfigError, match="falls back to the rows' own answers, and no row has one"):
        score(pool, open_prompts(prompts_only(), pool, first_alone), method)


def test_what_nice_reads() -> None:
    """The views and checkpoints of each; every field that changes a ranking changes the name in tables."""
    assert NICE().view == "adam"
    assert NICE(optimizer="sgd").view == "plain"
    assert NICEIF().view == "segments"
    assert NICEIF().last_checkpoint
    assert NICE(checkpoints="last").last_checkpoint
    assert not NICE().last_checkpoint
    writer = Assistant(model="models/qwen")
    methods = [
        NICE(), NICE(optimizer="sgd"), NICE(normalise=False), NICE(checkpoints="last"), NICE(sampling=FEW),
        NICE(policy=PolicyGradient(variant="ppo")), NICE(policy=PolicyGradient(baseline="leave_one_out")),
        NICE(policy=PolicyGradient(logprob_reduction="mean")), NICE(policy=PolicyGradient(importance_weights=True)),
        NICE(policy=PolicyGradient(fallback="label")),
        NICE(assistant=writer), NICEIF(), NICEIF(damping=0.1), NICEIF(assistant=writer),
    ]  # fmt: skip
    assert len({method.label for method in methods}) == len(methods)
    assert NICE().label == "NICE"
    assert NICE(assistant=writer).label == "NICE-AMC (qwen)"
    assert NICEIF(assistant=Assistant(model=Endpoint(model="gpt-4"))).label == "NICE-IF-AMC (gpt-4)"


def test_settings_that_do_not_go_together() -> None:
    """Each is refused where the value is made, with what to do."""
    one = Sampling(samples=1)
    writer, served = Assistant(model="x"), Endpoint(model="y")
    for method in (NICE, NICEIF):
        with pytest.raises(ConfigError, match="samples is 1: all weights would be 0"):
            method(sampling=one, policy=PolicyGradient(baseline="mean"))
        with pytest.raises(ConfigError, match="samples is 1"):
            method(assistant=Assistant(model="x", sampling=one), policy=PolicyGradient(variant="ppo"))
        with pytest.raises(ConfigError, match="an assistant's texts do not have: leave them out"):
            method(assistant=writer, policy=PolicyGradient(importance_weights=True))
        with pytest.raises(ConfigError, match="either from an assistant or from a server"):
            method(assistant=writer, server=served)


# --- one step -----------------------------------------------------------------------------------------------------


def step_gain(seed: int) -> tuple[float, float]:
    """Gains of the exact expected reward by a step on the 5 top-scored of 40 examples, and on 5 random ones (mean)."""
    generator = np.random.default_rng(seed)
    policy = Policy(seed=seed)
    prompts = [PROMPT, (4, 0, 1)]
    taste = generator.normal(size=VOCABULARY)

    def reward(y: Sequence[int]) -> float:
        return float(taste[list(y)].sum())

    rows: list[TokenSequence] = []
    for row in range(40):
        prompt = generator.integers(0, VOCABULARY, 3).tolist()
        rows.append(unit(row, generator.integers(0, VOCABULARY, generator.integers(1, 5)).tolist(), prompt))
    gradients = policy.rows(rows, len(rows))
    responses, rewards = {}, {}
    for number, prompt in enumerate(prompts):
        drawn = generator.choice(len(policy.responses), 64, p=policy.probabilities(prompt).numpy())
        own = [
            response(n, policy.responses[y], prompt_id=str(number), prompt=prompt) for n, y in enumerate(drawn.tolist())
        ]
        responses[str(number)] = own
        rewards |= {r.key: reward(r.token_ids.tolist()) for r in own}
    source = PolicySource.of(responses, rewards, PolicyGradient(baseline="leave_one_out"), template="")
    targets = policy.rows(source.sequences(0, 2), 2)
    found = aggregated(less_scores([gradients], [targets]).numpy(), None, "mean")

    def gain(chosen: Any) -> float:
        direction = gradients[list(chosen)].mean(dim=0)
        before = np.mean([policy.value(reward, prompt) for prompt in prompts])
        policy.step(direction, 1e-2)
        after = np.mean([policy.value(reward, prompt) for prompt in prompts])
        policy.step(direction, -1e-2)
        return float(after - before)

    chance = [gain(generator.choice(40, 5, replace=False)) for _ in range(5)]
    return gain(np.argsort(-found)[:5]), float(np.mean(chance))


def test_a_step_on_the_top_scored_raises_the_expected_reward_more_than_on_random_ones() -> None:
    """Paired over 14 models, rewards and pools: Wilcoxon's signed ranks, one-sided, p < 0.001; all top gains > 0."""
    pairs = np.array([step_gain(seed) for seed in range(14)])
    assert wilcoxon(pairs[:, 0], pairs[:, 1], alternative="greater").pvalue < 0.001, pairs
    assert (pairs[:, 0] > 0).all(), pairs


# --- what is kept -------------------------------------------------------------------------------------------------

SOURCE = """
calls = {calls!r}
def reward(completions, bonus, **columns):
    with open(calls, "a") as file:
        file.write("x" * len(completions))
    return [{value} * len(text) + float(b) for text, b in zip(completions, bonus)]
"""


def named_reward(folder: Path, value: str = "1") -> Function:
    (folder / "rewards.py").write_text(SOURCE.format(calls=str(folder / "calls"), value=value))
    return Function(name=f"{folder / 'rewards.py'}:reward")


def calls(folder: Path) -> int:
    """Responses that the function was asked about so far."""
    file = folder / "calls"
    return len(file.read_text()) if file.exists() else 0


def test_nothing_is_sampled_or_rewarded_twice(tiny: World, tmp_path: Path) -> None:
    """A second run draws and judges nothing; more samples add to them; another function or row is judged anew."""
    pool = tiny.open_pool(tmp_path / "run")
    rows = [{**row, "bonus": number} for number, row in enumerate(prompts_only())]
    first = score(pool, open_prompts(rows, pool, named_reward(tmp_path)), NICE(sampling=FEW))
    assert calls(tmp_path) == 2 * 4 * 4
    files = {key: pool.run.storage.read(key) for key in pool.run.storage.list("samples/")}
    again = score(pool, open_prompts(rows, pool, named_reward(tmp_path)), NICE(sampling=FEW))
    assert calls(tmp_path) == 32
    assert np.array_equal(again.aggregate, first.aggregate)
    assert again.fingerprint == first.fingerprint
    assert {key: pool.run.storage.read(key) for key in pool.run.storage.list("samples/")} == files
    more = NICE(sampling=FEW.model_copy(update={"samples": 6}))
    assert score(pool, open_prompts(rows, pool, named_reward(tmp_path)), more).fingerprint != first.fingerprint
    assert calls(tmp_path) == 32 + 2 * 4 * 2
    rows[1]["bonus"] = 7
    score(pool, open_prompts(rows, pool, named_reward(tmp_path)), NICE(sampling=FEW))
    assert calls(tmp_path) == 48 + 2 * 4
    changed = score(pool, open_prompts(rows, pool, named_reward(tmp_path, "2")), NICE(sampling=FEW))
    assert calls(tmp_path) == 56 + 32
    assert changed.fingerprint != first.fingerprint


def test_an_assistant_writes_once_for_all_checkpoints(tiny: World, tmp_path: Path) -> None:
    """AMC: one set of responses and rewards; the tokens are f's own, and each checkpoint has gradients of its own."""
    other = save_model(tmp_path / "g", seed=5)
    pool = tiny.open_pool(tmp_path / "run")
    rows = [{**row, "bonus": 0} for row in prompts_only()]
    target = open_prompts(rows, pool, named_reward(tmp_path))
    writer = Assistant(model=other, sampling=Sampling(samples=3, max_new_tokens=5), prompt_suffix=" please")
    method = NICE(assistant=writer)
    found = score(pool, target, method)
    targets = PolicyTargets(pool, target, method)
    first, second = (targets.rollouts(checkpoint) for checkpoint in pool.checkpoints())
    assert first[2].prefix == second[2].prefix
    assert calls(tmp_path) == 4 * 3
    assert len(pool.run.artifacts("samples")) == 1
    tokenizer = load_tokenizer(tiny.model)
    for own in first[0].values():
        for r in own:
            assert tokenizer.decode(r.token_ids.tolist(), skip_special_tokens=True) == r.text
            assert "please" not in tokenizer.decode(r.prompt_ids.tolist())
    one, two = policy_rows(pool, target, method)
    assert not torch.allclose(one, two)
    assert found.rewards[0].mean == found.rewards[1].mean


def test_a_server_has_a_name_for_each_checkpoint(pool: Pool, target: PromptTarget) -> None:
    """`{checkpoint}` in the served name is the folder's; one name for several checkpoints is refused first."""
    checkpoints = pool.checkpoints()
    served = NICE(server=Endpoint(model="tiny-{checkpoint}", base_url="http://127.0.0.1:9/v1"))
    names = [sampler_of(pool, target, served, checkpoint).identity()["model"] for checkpoint in checkpoints]
    assert names == [f"tiny-{checkpoint_name(checkpoint)}" for checkpoint in checkpoints]
    identities = [sampler_of(pool, target, served, checkpoint).identity()["weights"] for checkpoint in checkpoints]
    assert identities[0] != identities[1]
    same = NICE(server=Endpoint(model="tiny", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(ConfigError, match="for several of the checkpoints epoch-1, epoch-2: serve each adapter"):
        score(pool, target, same)


def test_responses_longer_than_the_model_reads_are_left_out(tiny: World, tmp_path: Path) -> None:
    """What does not fit into f's positions does not end the run: it is left out and said."""
    told: list[str] = []
    pool = tiny.open_pool(tmp_path / "run")
    pool.tokenizer.model_max_length = 30
    pool.reporter.warn = told.append  # type: ignore[method-assign]
    target = open_prompts(prompts_only(), pool, vowels)
    responses, _, samples = PolicyTargets(pool, target, NICE(sampling=FEW)).rollouts(pool.checkpoints()[0])
    short = {r.key for id_ in samples for r in samples[id_] if len(r.prompt_ids) + len(r.token_ids) <= 30}
    assert {r.key for own in responses.values() for r in own} == short
    assert any("are longer than the model's 30 tokens and are left out" in text for text in told) == (len(short) < 16)


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_rows_up_to_their_answer(pool: Pool) -> None:
    """Answered or not, a row's prompt is the same; rows without any are listed; ids, rows and columns are kept."""
    rows = [*prompts_only()[:2], *target_rows()[2:], {"id": "x", "messages": [{"role": "assistant", "content": "hi"}]}]
    target = open_prompts(rows, pool, vowels)
    assert target.data.ids == ["t0", "t1", "t2", "t3"]
    assert [skip.id for skip in target.data.skipped] == ["x"]
    bare = open_prompts(prompts_only(), pool, vowels)
    assert target.data.prompts == bare.data.prompts
    assert target.data.fingerprint != bare.data.fingerprint
    assert target.data.column("task") == ["odd", "even", "odd", "even"]
    assert target.data.messages("t3")[-1]["role"] == "assistant"
    assert target.labels is not None
    assert target.labels.ids == ["t2", "t3"]
    assert target.data.token_counts() == [len(ids) for ids in target.data.prompt_ids]
    with pytest.raises(DataError, match="has no column 'tsk'; its columns are id, prompt, task"):
        open_prompts(prompts_only(), pool, vowels, subtask="tsk")
    with pytest.raises(DataError, match="has no row with id 'y'"):
        bare.data.row("y")
    with pytest.raises(DataError, match=r"no row of the target .* can be used; first: there is nothing before"):
        open_prompts(rows[-1:], pool, vowels)


def test_overlap_by_conversation_or_by_bare_prompt(pool: Pool) -> None:
    """An answered target row is the pool's if all messages agree; one without an answer if the prompts do."""
    rows = pool_rows()
    question = rows[3]["messages"][:1]
    other = {"id": "o", "messages": [*rows[5]["messages"][:1], {"role": "assistant", "content": "something else"}]}
    same = {"id": "s", "messages": rows[8]["messages"]}
    target = open_prompts([{"id": "b", "messages": question}, other, same], pool, vowels)
    assert [skip.id for skip in target.overlap] == ["p03", "p08"]
    assert open_prompts([same], pool, vowels, keep_overlap=True).overlap == ()
    assert set(pool.data.ids) - set(score(pool, target, Random()).ids) == {"p03", "p08"}
    with pytest.raises(ConfigError, match="every pool row is also in the target"):
        open_prompts([{"messages": row["messages"][:1]} for row in rows], pool, vowels)


# --- weak signals -------------------------------------------------------------------------------------------------


def test_prompts_without_signal(pool: Pool) -> None:
    """Zero rewards score 0; a subtask of them is left out of the maximum; nothing but zeros is an error."""
    rows = prompts_only()

    def odd_only(completions: list[str], task: list[str], **columns: Any) -> list[float]:
        return [value if name == "odd" else 0.0 for value, name in zip(vowels(completions), task, strict=True)]

    found = score(pool, open_prompts(rows, pool, odd_only, subtask="task"), NICE(sampling=FEW))
    assert found.per_target is not None
    assert not found.per_target[:, [1, 3]].any()
    assert np.allclose(found.aggregate, found.per_target[:, [0, 2]].mean(axis=1))
    assert found.aggregate.min() < 0
    assert found.rewards[0].no_signal[-2:] == ("t1", "t3")
    with pytest.raises(DataError, match=r"no prompt has a signal: .* \(highest reward 0\).*Sample more"):
        score(pool, open_prompts(rows, pool, lambda completions, **_: [0.0] * len(completions)), NICE(sampling=FEW))
    flat = PolicyGradient(baseline="leave_one_out")
    constant = open_prompts(rows, pool, lambda completions, **_: [3.0] * len(completions))
    with pytest.raises(DataError, match=r"highest reward 3"):
        score(pool, constant, NICE(sampling=FEW, policy=flat))


def test_rewards_that_fail_are_left_out(tiny: World, tmp_path: Path) -> None:
    """A response without a reward is no sample: the others' weights divide by their own number; none at all ends it,
    before the pool goes through the model."""
    told: list[str] = []
    pool = tiny.open_pool(tmp_path / "run")
    pool.reporter.warn = told.append  # type: ignore[method-assign]
    seen: dict[str, int] = {}

    def picky(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        for prompt in prompts:
            seen[prompt] = seen.get(prompt, 0) + 1
        first = {prompt: prompts.index(prompt) for prompt in prompts}
        return [None if first[prompt] == n else 2.0 for n, prompt in enumerate(prompts)]

    target = open_prompts(prompts_only(), pool, picky)
    source = PolicyTargets(pool, target, NICE(sampling=FEW)).at(pool.checkpoints()[0])
    assert all(len(row) == 3 for row in source.rows)
    assert {float(s.weights[-1]) for row in source.rows for s in row} == {np.float32(2 / 3)}
    assert any("4 of 16 responses have no reward and are left out; first: prompt 't0', response 0" in t for t in told)
    assert set(seen.values()) == {4}
    broken = open_prompts(prompts_only(), pool, failing)
    with pytest.raises(DataError, match=r"not one of 16 responses has a reward; first: .*raised ValueError: no"):
        score(pool, broken, NICE(sampling=FEW))
    assert not [*pool.run.artifacts("gradients")]


def failing(completions: list[str], **columns: Any) -> list[float]:
    raise ValueError("no")


def summary(**changed: Any) -> RewardSummary:
    values: dict[str, Any] = {
        "checkpoint": "epoch-1", "prompts": 4, "responses": 80, "mean": 0.5, "std": 0.5, "within": 0.5, "level": 0.5,
        "quantiles": (0, 0, 0.5, 1, 1), "positive": 0.5, "constant": 0.0, "no_signal": (), "cut_off": 0.0,
        "tokens": 9.0,
    }  # fmt: skip
    return RewardSummary(**(values | changed))


def test_warnings_name_the_worst_checkpoint_and_what_to_do() -> None:
    """Silent prompts, rewards of one level, cut-off responses: each beyond its stated limit, and not at it."""
    good = summary()
    assert signal_warnings([good, summary(no_signal=("a", "b"), cut_off=0.5, level=1.5)], NICE()) == []
    silent = signal_warnings([good, summary(checkpoint="epoch-2", no_signal=("a", "b", "c"))], NICE())
    assert len(silent) == 1
    assert silent[0].startswith("3 of 4 prompts have no signal at epoch-2")
    assert "Sample more (--samples)" in silent[0]
    flat = summary(level=1.6)
    assert "Set --baseline leave_one_out" in signal_warnings([flat], NICE())[0]
    for policy in (PolicyGradient(baseline="mean"), PolicyGradient(variant="ppo"), PolicyGradient(variant="discrete")):
        assert signal_warnings([flat], NICE(policy=policy)) == []
    (cut,) = signal_warnings([summary(cut_off=0.51)], NICEIF())
    assert cut.startswith("51% of the responses with a reward at epoch-1 were cut off")


def test_what_responses_earn_is_summed_up(pool: Pool, target: PromptTarget) -> None:
    """Mean, spread within and over prompts, quantiles and shares are those of the rewards themselves."""
    targets = PolicyTargets(pool, target, NICE(sampling=FEW))
    checkpoint = pool.checkpoints()[0]
    found = targets.summary_at(checkpoint)
    responses, rewards, _ = targets.rollouts(checkpoint)
    table = np.array([[rewards[r.key] for r in own] for own in responses.values()])
    assert found.mean == pytest.approx(table.mean())
    assert found.std == pytest.approx(table.std(ddof=1))
    assert found.within == pytest.approx(np.sqrt(table.var(axis=1, ddof=1).mean()))
    assert found.level == pytest.approx(np.sqrt((table.mean(axis=1) ** 2).mean()))
    assert found.quantiles == pytest.approx(np.quantile(table, [0, 0.25, 0.5, 0.75, 1]))
    assert found.positive == pytest.approx((table > 0).mean())
    assert found.constant == pytest.approx((np.ptp(table, axis=1) == 0).mean())
    assert found.no_signal == tuple(id_ for id_, row in zip(targets.ids, table, strict=True) if not row.any())
    everything = [r for own in responses.values() for r in own]
    assert found.cut_off == pytest.approx(np.mean([r.finish_reason == "length" for r in everything]))
    assert found.tokens == pytest.approx(np.mean([len(r.token_ids) for r in everything]))
    assert (found.prompts, found.responses) == (4, 16)


def test_identities_of_rewards(tmp_path: Path, pool: Pool) -> None:
    """Named rewards have one, with the function's file; plain functions have none, and are asked every time."""
    rows = prompts_only()

    def identity(reward: Any, **options: Any) -> Any:
        return open_prompts(rows, pool, reward, **options).reward_identity()

    assert identity(vowels) is None
    assert identity([Length(maximum=9), vowels]) is None
    assert identity(Length(maximum=9)) == identity(Length(maximum=9))
    assert identity(Length(maximum=9)) != identity([Length(maximum=9), Length(maximum=9)], weights=[1, 2])
    function = named_reward(tmp_path)
    before = identity(function)
    assert before == identity(function.name)
    assert identity(named_reward(tmp_path, "3")) != before
    assert identity(Function(name="operator:itemgetter")) is not None
    at = [Endpoint(model="m", base_url=f"http://localhost:{port}/v1") for port in (1, 2)]
    assert identity(Length(maximum=9), judge=at[0]) != identity(Length(maximum=9), judge=at[1])
