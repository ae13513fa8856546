"""Environments and rewards of one's own, from real files in the working folder or on PYTHONPATH."""

import json
import os
import re
import subprocess
import sys
import textwrap
from contextlib import closing
from pathlib import Path

import pytest

from pact_fast.data.parsing import AssistantTurn, ToolCall
from pact_fast.envs import make_env

ROOT = Path(__file__).resolve().parents[2]
TOOL = {
    "type": "function",
    "function": {"name": "price", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}
ENV = """
    from dataclasses import dataclass

    from pact_fast.data.records import Record
    from pact_fast.envs import Episode, Outcome, StepResult


    @dataclass(frozen=True)
    class Settings:
        tasks: int = 2
        reward: float = 1.0


    class Echo:
        '''Says the user's word back: no tools at all.'''

        name = "echo"
        Settings = Settings

        def __init__(self, settings):
            self.settings = settings

        def records(self, split):
            prompt = ({"role": "user", "content": "Say hello."},)
            return [Record(f"{split}-{i}", prompt, (), (), {}, "echo") for i in range(self.settings.tasks)]

        def start(self, records):
            return [Episode(record) for record in records]

        def step(self, episodes, turns):
            return [StepResult(done=True) for _ in turns]

        def finish(self, episodes, truncated):
            return [Outcome(self.settings.reward, solved=True) for _ in episodes]

        def close(self):
            pass


    class Half(Echo):
        finish = None


    def plain(tasks=1):
        return Echo(Settings(tasks=tasks))


    NUMBER = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module into the working folder under a name of this test's own -> its name."""
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    names = []

    def write(source):
        names.append(f"own_{abs(hash(request.node.nodeid))}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(textwrap.dedent(source))
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)
    sys.path[:] = path


def records_file(folder, **fields):
    row = {
        "id": "a",
        "prompt": [{"role": "user", "content": "What does tea cost?"}],
        "tools": [TOOL],
        "codes": {"price": "def price(x):\n    return {'cents': 250}\n"},
        "answer": "250",
    }
    row = {k: v for k, v in (row | fields).items() if v is not None}
    (folder / "tasks.jsonl").write_text(json.dumps(row) + "\n")
    return str(folder / "tasks.jsonl")


def play(reward, path, truncated=None):
    with closing(make_env("python", {"test_path": path, "workers": 1, "reward": reward})) as env:
        episodes = env.start(env.records("test"))
        calls = (ToolCall("price", {"x": "tea"}, None, ""), ToolCall("", None, "no JSON", "{"))
        env.step(episodes, [AssistantTurn("I look.", "", calls, "", True)])
        if truncated is None:
            env.step(episodes, [AssistantTurn("", "It is 250.", (), "", True)])
        return env.finish(episodes, [truncated])[0]


def test_an_environment_class_gets_its_settings_checked(module):
    name = module(ENV)
    env = make_env(f"{name}:Echo", {"tasks": 3, "reward": 2})
    assert len(env.records("test")) == 3
    assert env.settings.reward == 2.0
    with pytest.raises(ValueError, match=r"env\.settings\.taks: unknown setting; did you mean 'tasks'"):
        make_env(f"{name}:Echo", {"taks": 3})


def test_an_environment_function_is_called_with_the_settings(module):
    name = module(ENV)
    assert len(make_env(f"{name}:plain", {"tasks": 4}).records("test")) == 4
    with pytest.raises(ValueError, match=r"env\.settings: .*does not take these: .*'wrong'"):
        make_env(f"{name}:plain", {"wrong": 4})


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no_such_module:Env", r"no module 'no_such_module' in .* or on Python's path"),
        ("{module}:Nothing", r"\.py has no 'Nothing'"),
        ("{module}:NUMBER", "is a int, not a class or function"),
        ("{module}:", "write module:Class or module:function"),
        ("{module}.py:Echo", "no module '{module}.py'"),
        ("{module}/x:Echo", "write module:Class"),
        ("{module}:Half", "gives a Half without finish"),
    ],
)
def test_what_is_no_environment_is_named(module, path, problem):
    name = module(ENV)
    with pytest.raises(ValueError, match=r"env\.name: .*" + problem.format(module=name)):
        make_env(path.format(module=name))


def test_a_module_that_cannot_be_imported_says_why(module):
    for source, problem in (
        ("import no_such_thing_here", "importing it failed: No module named 'no_such_thing_here'"),
        ("1 / 0", "importing it raised ZeroDivisionError"),
        ("def (", "importing it raised SyntaxError"),
    ):
        with pytest.raises(ValueError, match=problem):
            make_env(f"{module(source)}:Env")


def test_a_reward_function_sees_the_whole_episode(module, tmp_path):
    name = module("""
        from pact_fast.envs import RewardInput

        SEEN = []

        def score(episode: RewardInput) -> float:
            SEEN.append(episode)
            return 0.25
    """)
    path = records_file(tmp_path, category="shop")
    outcome = play(f"{name}:score", path)
    assert (outcome.reward, outcome.solved, outcome.turn_rewards) == (0.25, True, (0.0, 0.25))
    assert play(f"{name}:score", path, "length_limit").reward == 0.25
    whole, cut = sys.modules[name].SEEN
    assert whole.record.env["category"] == "shop"
    assert [turn.reasoning for turn in whole.turns] == ["I look.", ""]
    assert (whole.calls[0].name, whole.calls[0].arguments) == ("price", {"x": "tea"})
    assert json.loads(whole.calls[0].response) == {"cents": 250}
    assert whole.calls[1].error == "no JSON"
    assert (whole.answer, whole.truncated, whole.solved) == ("It is 250.", None, True)
    assert whole.scores == {"answer": 1.0}
    assert (cut.answer, cut.truncated, cut.solved) == ("", "length_limit", False)


def test_a_reward_class_is_made_once_and_may_decide_what_is_solved(module, tmp_path):
    name = module("""
        class Judge:
            def __init__(self):
                self.seen = 0

            def __call__(self, episode):
                self.seen += 1
                return self.seen, "250" in episode.answer
    """)
    without_gold = records_file(tmp_path, answer=None)
    outcome = play(f"{name}:Judge", without_gold)
    assert (outcome.reward, outcome.solved, outcome.failure) == (1.0, True, None)
    with pytest.raises(ValueError, match="answer: is missing"):
        play("solve", without_gold)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("return float('nan')", "gave nan, not a finite number"),
        ("return -float('inf')", "gave -inf, not a finite number"),
        ("return None", "gave None, not a finite number"),
        ("return '1.0'", "gave '1.0', not a finite number"),
        ("return 1.0, 2.0, 3.0", "a pair is"),
        ("return {}['x']", "raised KeyError: 'x'"),
    ],
)
def test_a_reward_that_fails_names_itself_and_the_record(module, tmp_path, body, problem):
    name = module(f"def score(episode):\n    {body}\n")
    with pytest.raises(ValueError, match=rf"env\.python\.reward {name}:score: record 'a': .*{problem}"):
        play(f"{name}:score", records_file(tmp_path))


def test_rewards_that_cannot_be_called_are_told_at_the_start(module, tmp_path):
    name = module("class Bare:\n    pass\n\ndef two(a, b):\n    return 0\n")
    for path, problem in ((f"{name}:Bare", "__call__"), (f"{name}:two", "must take one argument")):
        with pytest.raises(ValueError, match=rf"env\.python\.reward: .*{problem}"):
            make_env("python", {"reward": path})
    with pytest.raises(ValueError, match="or module:function of your own"):
        make_env("python", {"reward": "solv"})


def test_the_command_line_finds_modules_in_the_working_folder_and_on_pythonpath(tmp_path):
    """`pact-fast` does not put the working folder on Python's path by itself."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, name in ((inside, "here_env"), (outside, "there_env")):
        folder.mkdir()
        (folder / f"{name}.py").write_text(textwrap.dedent(ENV))
    code = (
        "import sys; from pact_fast.envs import make_env; sys.path.remove('') if '' in sys.path else None;"
        "print([len(make_env(f'{n}:Echo', {'tasks': 5}).records('test')) for n in ('here_env', 'there_env')])"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{outside}"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=inside, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[5, 5]", done.stderr


def test_the_page_shows_an_environment_and_a_reward_that_work(module, tmp_path):
    page = (ROOT / "docs" / "environments.md").read_text()
    reward, shop = re.findall(r"```python\n# my_\w+\.py\n(.*?)```", page, flags=re.DOTALL)
    assert play(f"{module(reward)}:brief", records_file(tmp_path)).reward == pytest.approx(1 / 3 - 0.1)
    env = make_env(f"{module(shop)}:Shop", {"tasks": 2})
    episodes = env.start(env.records("test"))
    env.step(episodes, [AssistantTurn("", text, (), "", True) for text in ("Hello!", "No.")])
    outcomes = env.finish(episodes, [None, None])
    assert [(o.reward, o.solved, o.failure) for o in outcomes] == [(1.0, True, None), (0.0, False, "no_call")]
