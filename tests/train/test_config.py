"""Configuration: presets, overrides, and errors that name the key and the way out."""

import pytest

from pact_fast.cli import main
from pact_fast.config import PRESETS, ConfigError, all_keys, load_config


@pytest.fixture
def write(tmp_path):
    def to_file(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return to_file


def test_command_line_beats_file_beats_preset_beats_default(write):
    path = write("preset: grpo\ntrain: {max_steps: 7}\nobjective: {sft_weight: 0.5}\n")
    config = load_config(path, ["--train.max_steps", "9"])
    assert (config.train.max_steps, config.objective.sft_weight) == (9, 0.5)
    assert (config.objective.rl_context, config.objective.sft_targets) == ("prompt", "none")
    assert load_config(path, ["--preset", "sft"]).objective.sft_targets == "all"
    assert load_config(path, ["--objective.rl_context", "trace"]).objective.rl_context == "trace"


def test_another_preset_than_the_files_keeps_what_defines_it(write):
    path = write("objective: {anchor_probability: 0.5, sft_weight: 0.2}\n")
    assert load_config(path).objective.anchor_probability == 0.5
    ablation = load_config(path, ["--preset", "pact-no-anchor"]).objective
    assert (ablation.anchor_probability, ablation.sft_weight) == (0.0, 0.2)
    words = ["--preset", "pact-no-anchor", "--objective.anchor_probability", "0.1"]
    assert load_config(path, words).objective.anchor_probability == 0.1
    own = write("preset: pact-no-anchor\nobjective: {anchor_probability: 0.2}\n")
    assert load_config(own).objective.anchor_probability == 0.2


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_what_they_say(preset):
    config = load_config(None, ["--preset", preset])
    for key, value in PRESETS[preset].items():
        assert getattr(config.objective, key) == value


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("train: {learning_rte: 1}", [], r"unknown key 'train.learning_rte'; nearest: 'train.learning_rate'"),
        ("trian: {max_steps: 1}", [], r"unknown key 'trian'; nearest: 'train'"),
        ("", ["--train.max_step", "3"], r"unknown key 'train.max_step'; nearest: 'train.max_steps'"),
        ("", ["--max_steps", "3"], r"nearest: 'train.max_steps'"),
        ("preset: pactt", [], r"preset='pactt' is unknown; nearest: 'pact'"),
        ("train: {max_steps: many}", [], r"train.max_steps"),
        ("train: 3", [], r"train is a section"),
        ("- 1", [], r"expected a mapping"),
        ("train: {", [], r"not valid YAML"),
        ("objective: {anchor_probability: 1.5}", [], r"objective.anchor_probability=1.5 cannot be used"),
        ("objective: {rl_context: both}", [], r"rl_context"),
        ("rollout: {temperature: 0}", [], r"rollout.temperature=0"),
    ],
)
def test_a_bad_key_or_value_is_named_with_a_way_out(write, text, words, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(text), words)


def test_a_missing_file_is_one_line_and_status_2(capsys):
    assert main(["train", "configs/nowhere.yaml"]) == 2
    assert "configs/nowhere.yaml" in capsys.readouterr().err


def test_environment_settings_reach_the_environment(write):
    config = load_config(write("env: {settings: {train_tasks: 5}}"))
    assert config.env.settings == {"train_tasks": 5}


def test_an_unknown_command_lists_the_commands(capsys):
    assert main(["trian"]) == 2
    assert "train" in capsys.readouterr().err


def test_keys_are_dotted_and_complete():
    keys = all_keys()
    assert {"preset", "train.learning_rate", "objective.anchor_probability", "env.settings"} <= set(keys)
