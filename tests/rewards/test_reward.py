from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from gradsift.base.errors import ConfigError
from gradsift.base.types import Example
from gradsift.rewards.form import Length
from gradsift.rewards.function import Function, load_function
from gradsift.rewards.matching import Exact, Numeric
from gradsift.rewards.reward import Reward, WeightedSum, reward_samples
from gradsift.rewards.samples import Sample, prompt_of

SAMPLES = [
    Sample("a", 0, "2 + 2 =", "4", (4, 9), {"answer": "4", "level": 1, "prompt": "2 + 2 ="}),
    Sample("a", 1, "2 + 2 =", "five", (5,), {"answer": "4", "level": 1, "prompt": "2 + 2 ="}),
    Sample("b", 0, "3 + 3 =", "6", (6, 9), {"answer": "6", "level": 2}),
]
CHAT = [Sample("c", 0, ({"role": "user", "content": "2 + 2 ="},), "4", (4,), {"answer": "4"})]


def right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def test_functions_get_what_trl_passes() -> None:
    """Texts, token ids and every column but `prompt`, one entry per sample; plus TRL's three single arguments."""
    got: dict[str, Any] = {}

    def function(**kwargs: Any) -> list[float]:
        got.update(kwargs)
        kwargs["log_extra"]("column", [1, 2, 3])
        kwargs["log_metric"]("name", 1.0)
        return [0.0, 1.0, 2.0]

    assert reward_samples(SAMPLES, function).values == (0.0, 1.0, 2.0)
    assert got["prompts"] == ["2 + 2 =", "2 + 2 =", "3 + 3 ="]
    assert got["completions"] == ["4", "five", "6"]
    assert got["completion_ids"] == [[4, 9], [5], [6, 9]]
    assert got["answer"] == ["4", "4", "6"]
    assert got["level"] == [1, 1, 2]
    assert got["trainer_state"].global_step == 0
    assert set(got) == {"prompts", "completions", "completion_ids", "answer", "level", "trainer_state", "log_extra",
                        "log_metric", "log_problem"}  # fmt: skip


def test_conversations_come_as_message_lists() -> None:
    """A conversational prompt is a list of messages, and its completion a list with one of the assistant."""
    got: dict[str, Any] = {}

    def function(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        got.update(prompts=prompts, completions=completions)
        return [1.0]

    reward_samples(CHAT, function)
    assert got["prompts"] == [[{"role": "user", "content": "2 + 2 ="}]]
    assert got["completions"] == [[{"role": "assistant", "content": "4"}]]
    with pytest.raises(ConfigError, match="3 of 4 prompts are text"):
        reward_samples([*SAMPLES, *CHAT], function)


def test_documented_functions_of_trl_work_as_they_are() -> None:
    """The examples of TRL's GRPO page, in our words: by tokens, by format, by ground truth, by task, asynchronous."""
    import re

    def by_tokens(completion_ids: Any, **kwargs: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    def by_format(completions: Any, **kwargs: Any) -> list[float]:
        contents = [completion[0]["content"] for completion in completions]
        return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

    def by_task(prompts: Any, completions: Any, level: Any, **kwargs: Any) -> list[float | None]:
        return [1.0 if number == 1 else None for number in level]

    async def later(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0.01)
        return [1.0 if completion else 0.0 for completion in completions]

    assert reward_samples(SAMPLES, by_tokens).values == (2.0, 1.0, 2.0)
    assert reward_samples(CHAT, by_format).values == (0.0,)
    assert reward_samples(SAMPLES, [by_task, later]).values == (2.0, 2.0, 1.0)
    assert reward_samples(SAMPLES, by_task).values == (1.0, 1.0, None)


def test_a_function_may_name_only_what_it_needs() -> None:
    """Without `**kwargs` it gets what it names; a name that does not exist is a mistake that lists those that do."""
    assert reward_samples(SAMPLES, lambda completions, answer: [1.0, 2.0, 3.0]).values == (1.0, 2.0, 3.0)
    assert reward_samples(SAMPLES, lambda completions, gold=None: [float(gold is None)] * 3).values == (1.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match=r"requires 'gold', which is none of answer, completion_ids, completions"):
        reward_samples(SAMPLES, lambda completions, gold: [1.0] * 3)

    def by_position(completions: Any, /, **kwargs: Any) -> list[float]:
        return [1.0] * 3

    with pytest.raises(ConfigError, match="by position only"):
        reward_samples(SAMPLES, by_position)


def test_weighted_sums_skip_what_does_not_apply() -> None:
    """Σ w·r over the functions that gave a value, as TRL's nansum; all None leaves the sample out with a reason."""

    def sometimes(completions: Any, **kwargs: Any) -> list[float | None]:
        return [None if completion == "five" else 10.0 for completion in completions]

    assert reward_samples(SAMPLES, [right, sometimes], weights=[2.0, 0.5]).values == (7.0, 0.0, 7.0)
    rewarded = reward_samples(SAMPLES, sometimes)
    assert rewarded.values == (10.0, None, 10.0)
    assert rewarded.problems == (("a", 1, "sometimes: returned None, so no reward applies"),)
    both = WeightedSum(rewards=(Exact(), Length(maximum=1)), weights=(1.0, -0.25))
    assert reward_samples(SAMPLES, both).values == (0.75, -0.25, 0.75)


def test_a_sample_that_makes_a_function_raise_is_left_out_alone() -> None:
    """The others keep their rewards; the problem names prompt, sample, function, error."""

    def fragile(completions: Any, **kwargs: Any) -> list[float]:
        return [float(int(completion)) for completion in completions]

    rewarded = reward_samples(SAMPLES, [fragile, right])
    assert rewarded.values == (5.0, None, 7.0)
    ((prompt_id, number, reason),) = rewarded.problems
    assert (prompt_id, number) == ("a", 1)
    assert reason.startswith("fragile: raised ValueError: invalid literal")


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 samples"),
        (None, "returned no list"),
        (1.0, "returned no list"),
        ("abc", "returned no list"),
        ({"a": 1}, "returned no list"),
    ],
)
def test_a_wrong_number_of_rewards_leaves_all_samples_out(returned: Any, reason: str) -> None:
    """Nobody knows which reward is whose, so none counts, and the run goes on."""
    rewarded = reward_samples(SAMPLES, lambda **kwargs: returned)
    assert rewarded.values == (None, None, None)
    assert [problem[:2] for problem in rewarded.problems] == [("a", 0), ("a", 1), ("b", 0)]
    assert all(reason in problem.reason for problem in rewarded.problems)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "1.0", 1j, [1.0], object()])
def test_what_is_no_finite_number_leaves_its_sample_out(bad: Any) -> None:
    """NaN, infinity, text and the like are reported for their sample alone."""
    rewarded = reward_samples(SAMPLES, [lambda **kwargs: [1.0, bad, True], right])
    assert rewarded.values == (2.0, None, 2.0)
    assert [problem[:2] for problem in rewarded.problems] == [("a", 1)]


def test_arrays_and_tensors_are_lists_too() -> None:
    """A tensor of rewards, numpy-like scalars and booleans count as numbers."""
    assert reward_samples(SAMPLES, lambda **kwargs: torch.tensor([1.0, 2.0, 3.0])).values == (1.0, 2.0, 3.0)
    assert reward_samples(SAMPLES, lambda **kwargs: (torch.tensor(1), True, 3)).values == (1.0, 1.0, 3.0)


def test_leaving_the_process_is_an_error_like_others() -> None:
    """`sys.exit` in a reward function does not end the run."""

    def leaves(completions: Any, **kwargs: Any) -> list[float]:
        sys.exit(3)

    rewarded = reward_samples(SAMPLES[:1], leaves)
    assert rewarded.values == (None,)
    assert "SystemExit: 3" in rewarded.problems[0].reason


def test_asynchronous_functions_run_together_and_share_a_loop() -> None:
    """Two that wait 0.2 s take 0.2 s, and what one call leaves in the loop the next call finds there."""
    loops = []

    async def slow(completions: Any, **kwargs: Any) -> list[float]:
        loops.append(asyncio.get_running_loop())
        await asyncio.sleep(0.2)
        if len(completions) == 3 and len(loops) > 2:
            raise ValueError("once")
        return [1.0] * len(completions)

    class Callable:
        async def __call__(self, completions: Any, **kwargs: Any) -> list[float]:
            return await slow(completions)

    start = time.monotonic()
    assert reward_samples(SAMPLES, [slow, Callable()]).values == (2.0, 2.0, 2.0)
    assert time.monotonic() - start < 0.39
    assert reward_samples(SAMPLES, slow).values == (1.0, 1.0, 1.0)
    assert len(set(map(id, loops))) == 1


def test_it_works_inside_a_running_loop() -> None:
    """As in a notebook, where asyncio.run is impossible."""

    async def later(completions: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook() -> Any:
        return reward_samples(SAMPLES, later)

    assert asyncio.run(notebook()).values == (1.0, 1.0, 1.0)


def test_functions_cannot_change_the_samples() -> None:
    """Rows and messages are copies: what one function does to them no other sees."""
    row = {"tags": ["x"]}
    sample = Sample("c", 0, ({"role": "user", "content": "hi"},), "4", (), row)

    def rude(prompts: Any, tags: Any, **kwargs: Any) -> list[float]:
        tags[0].append("y")
        prompts[0].clear()
        return [float(len(tags[0]))]

    assert reward_samples([sample], [rude, rude]).values == (4.0,)
    assert row == {"tags": ["x"]}
    assert len(sample.prompt) == 1


def test_printing_does_not_reach_standard_output(tmp_path: Path) -> None:
    """Python's print, writes to file descriptor 1, child processes, and prints at import: all on standard error."""
    (tmp_path / "noisy.py").write_text(
        "import os, subprocess\nprint('import')\ndef noisy(completions, **kwargs):\n    print('print')\n"
        "    os.write(1, b'write\\n')\n    subprocess.run(['echo', 'child'])\n    return [1.0] * len(completions)\n"
    )
    script = (
        "import json\nfrom gradsift.rewards.reward import reward_samples\nfrom gradsift.rewards.samples import Sample\n"
        "print('before')\nvalues = reward_samples([Sample('a', 0, '', 'x')], 'noisy.py').values\n"
        "print(json.dumps(values))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "before\n[1.0]\n"
    assert json.loads(done.stdout.splitlines()[1]) == [1.0]
    assert [done.stderr.count(word) for word in ("import", "print", "write", "child")] == [1, 1, 1, 1]


def test_functions_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with one function, a function of a file (which may import its neighbours), and one of a module."""
    (tmp_path / "neighbour.py").write_text("VALUE = 3.0\n")
    (tmp_path / "one.py").write_text(
        "from math import sqrt\nfrom neighbour import VALUE\ndef _private(): pass\n"
        "def only(completions, **kwargs): return [VALUE] * len(completions)\n"
    )
    (tmp_path / "two.py").write_text("def first(**kwargs): return [1.0] * 3\ndef second(**kwargs): return [2.0] * 3\n")
    monkeypatch.chdir(tmp_path)
    assert reward_samples(SAMPLES, Function(name=str(tmp_path / "one.py"))).values == (3.0, 3.0, 3.0)
    assert reward_samples(SAMPLES, "two.py:second").values == (2.0, 2.0, 2.0)
    assert reward_samples(SAMPLES, "two:first").values == (1.0, 1.0, 1.0)
    assert str(tmp_path) not in sys.path
    with pytest.raises(ConfigError, match=r"defines the functions first, second: say which, as in two.py:NAME"):
        load_function("two.py")
    with pytest.raises(ConfigError, match=r"has no 'third': it defines the functions first, second"):
        load_function("two.py:third")
    monkeypatch.delitem(sys.modules, "two")
    monkeypatch.delitem(sys.modules, "neighbour")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.py:f", "there is no file"),
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("function", "neither module:function nor"),
        ("math:pi", "is a float, expected a function"),
        ("broken.py", "cannot be imported: ZeroDivisionError"),
        ("leaving.py", "cannot be imported: SystemExit"),
        ("empty.py", "defines no function"),
    ],
)
def test_wrong_names_say_what_is_wrong(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing files, modules and functions, and imports that fail or leave the process."""
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "empty.py").write_text("from math import sqrt\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_function(name)


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    """The module of a file is kept as long as the file stays the same."""
    import os

    path = tmp_path / "edited.py"
    path.write_text("def f(**kwargs): return [1.0]\n")
    first = load_function(str(path))
    assert load_function(str(path)) is first
    path.write_text("def f(**kwargs): return [2.0]\n")
    os.utime(path, ns=(1, 1))
    assert load_function(str(path))() == [2.0]


def test_every_kind_can_stand_in_a_recipe() -> None:
    """`kind` decides; unknown kinds and fields are refused; a sum holds any of the others."""
    read = TypeAdapter(Reward).validate_python
    kinds: list[dict[str, Any]] = [
        {"kind": "function", "name": "rewards.py:f"},
        {"kind": "exact", "within": True},
        {"kind": "regex", "pattern": "x"},
        {"kind": "numeric", "tolerance": 0.1},
        {"kind": "length", "maximum": 3},
        {"kind": "format", "form": "json"},
        {"kind": "sentiment"},
        {"kind": "unit_tests", "allow_code_execution": True, "sandbox": {"timeout": 3}},
        {"kind": "reward_model", "model": "org/name"},
        {"kind": "judge", "mode": "grade"},
    ]
    values = [read(kind) for kind in kinds]
    assert [value.kind for value in values] == [kind["kind"] for kind in kinds]
    everything = read({"kind": "sum", "rewards": kinds})
    assert everything.rewards == tuple(values)
    assert read(everything.model_dump()) == everything
    for bad in ({"kind": "exakt"}, {"kind": "exact", "withn": True}, {"kind": "sum", "rewards": []}):
        with pytest.raises(ValidationError):
            read(bad)
    with pytest.raises(ValidationError, match="1 weights for 2 rewards"):
        WeightedSum(rewards=(Exact(), Numeric()), weights=(1.0,))


def test_wrong_calls_are_refused() -> None:
    """Weights that do not fit or are not finite, things that are no reward, a judge with nobody to ask."""
    for reward, weights in ((right, [1.0, 2.0]), ([right, right], [1.0]), (right, [float("nan")]), ([], None)):
        with pytest.raises(ConfigError, match="one finite weight for each"):
            reward_samples(SAMPLES, reward, weights=weights)
    with pytest.raises(ConfigError, match="not a int"):
        reward_samples(SAMPLES, 3)
    with pytest.raises(ConfigError, match="pass `chat`"):
        reward_samples(SAMPLES, TypeAdapter(Reward).validate_python({"kind": "judge"}))


def test_no_samples_no_calls() -> None:
    """An empty batch gives an empty result without calling anything."""
    assert reward_samples([], lambda **kwargs: 1 / 0).values == ()


def test_the_prompt_of_an_example_is_what_trl_would_pass() -> None:
    """The row's own text where it has a `prompt`, otherwise the messages before the last answer."""
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert prompt_of(Example("1", (user, answer), {"prompt": "q"})) == "q"  # type: ignore[arg-type]
    assert prompt_of(Example("1", (user, answer), {"messages": []})) == (user,)  # type: ignore[arg-type]
    assert prompt_of(Example("1", (user, answer, user, answer), {})) == (user, answer, user)  # type: ignore[arg-type]
    assert prompt_of(Example("1", (user,), {})) == (user,)  # type: ignore[arg-type]


def test_the_documentation_is_true() -> None:
    """The Python of docs/rewards.md runs as it is written, and its table of kinds is the code's."""
    import re

    page = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/rewards.md", "exec"), names)
    assert names["rewarded"].values == pytest.approx((1 - 0.13, -0.02))
    table = page.partition("| `kind` | value | reward |")[2].partition("\n\n")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| `\w+\(([^)]*)\)`", table, re.MULTILINE))
    schema = TypeAdapter(Reward).json_schema()
    properties = {}
    for kind, reference in schema["discriminator"]["mapping"].items():
        properties[kind] = set(schema["$defs"][reference.rpartition("/")[2]]["properties"])
    assert set(shown) == set(properties)
    for kind, fields in shown.items():
        assert {name.strip() for name in fields.split(",")} - {"…", ""} <= properties[kind], kind
