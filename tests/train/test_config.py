"""Configuration: presets, overrides, and errors that name the key and the way out."""

import signal

import pytest

from pact_fast.cli import main
from pact_fast.commands.train import help_text
from pact_fast.config import PRESETS, Config, ConfigError, all_keys, load_config
from pact_fast.keys import described


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
        (
            "train: {learning_rte: 1}",
            [],
            r"run.yaml: unknown key 'train.learning_rte'; did you mean 'train.learning_rate'",
        ),
        ("trian: {max_steps: 1}", [], r"unknown key 'trian'; did you mean 'train'"),
        (
            "",
            ["--train.max_step", "3"],
            r"command line: unknown key 'train.max_step'; did you mean 'train.max_steps'",
        ),
        ("", ["--train.bananas", "3"], r"unknown key 'train.bananas'; `pact-fast train --help` lists all"),
        ("objective: {engine_correction_cap: 2}", [], r"was renamed to 'objective.importance_ratio_cap'"),
        ("rollout: {engine: hf}", [], r"run.yaml: rollout.engine='hf' was renamed to 'in_process'"),
        (
            "",
            ["--rollout.engine", "hf-batching"],
            r"command line: .*'hf-batching' was renamed to 'in_process'",
        ),
        ("", ["--rollout.engine=hf"], r"command line: rollout.engine='hf' was renamed to 'in_process'"),
        ("rollout: {per_sequence_seed: true}", [], r"'rollout.per_sequence_seed' is no key any more.*remove"),
        ("rollout: {kv_memory: 1.5}", [], r"rollout.kv_memory=1.5 cannot be used"),
        ("", ["--per_device_train_batch_size", "3"], r"is no key here; give train.prompts_per_step"),
        ("preset: pactt", [], r"run.yaml: preset='pactt' is unknown; did you mean 'pact'"),
        ("", ["--preset", "nonesuch"], r"command line: preset='nonesuch' is unknown; there are pact"),
        ("train: {max_steps: many}", [], r"train.max_steps"),
        ("train: 3", [], r"train is a section"),
        ("- 1", [], r"expected a mapping"),
        ("train: {", [], r"not valid YAML"),
        ("objective: {anchor_probability: 1.5}", [], r"objective.anchor_probability=1.5 cannot be used"),
        ("objective: {rl_context: every}", [], r"rl_context"),
        ("rollout: {temperature: 0}", [], r"run.yaml: rollout.temperature=0"),
        ("", ["--rollout.temperature", "0"], r"command line: rollout.temperature=0"),
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


NUMBERS = [
    (key.section, key.name, key.kind)
    for _, _, keys in described(Config)
    for key in keys
    if key.kind.split(" ")[0] in ("int", "float")
]


@pytest.mark.parametrize(("section", "name", "kind"), NUMBERS, ids=lambda value: str(value))
def test_every_number_has_a_range(section, name, kind):
    bad = ["-1"] + (["nan", "inf", "-inf"] if kind.startswith("float") else ["9999999999999999999999"][:0])
    for value in bad:
        with pytest.raises(ConfigError, match=rf"{section}\.{name}"):
            load_config(None, [f"--{section}.{name}={value}"])


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--preset", "grpo", "--rollout.num_generations", "1"], "rollout.num_generations"),
        (["--preset", "sft", "--objective.sft_targets", "none"], "objective.sft_targets"),
        (["--preset", "sft", "--objective.sft_weight", "0"], "objective.sft_weight"),
        (["--preset", "sft", "--objective.sft_end", "0"], "objective.sft_targets"),
        (["--preset", "grpo", "--objective.rl_start", "1"], "objective.rl_start"),
        (["--train.max_steps", "5", "--train.warmup_steps", "5"], "train.warmup_steps"),
        (["--train.prompts_per_step", "2", "--train.num_mini_batches", "3"], "train.num_mini_batches"),
        (["--rollout.engine", "http"], "rollout.servers"),
        (["--rollout.engine", "http", "--rollout.servers", "localhost:8000"], "rollout.servers"),
        (["--run.name", "a/b"], "run.name"),
    ],
)
def test_combinations_that_train_nothing_are_refused(words, key):
    with pytest.raises(ConfigError, match=rf"{key}=.*cannot be used: give"):
        load_config(None, words)


def test_names_of_trl_are_taken_with_a_note(capsys, write):
    config = load_config(write("max_steps: 7\nlora_r: 4\n"), ["--num_generations", "3", "--save_steps=9"])
    assert (config.train.max_steps, config.rollout.num_generations, config.checkpoint.every) == (7, 3, 9)
    assert config.lora.rank == 4
    out = capsys.readouterr().out
    assert "max_steps is taken as train.max_steps" in out
    assert "--num_generations is taken as --rollout.num_generations" in out


def test_lists_may_be_given_without_brackets():
    words = ["--run.report_to", "wandb", "--lora.targets=q_proj,v_proj", "--run.tags", "[a, b]"]
    config = load_config(None, words)
    assert (config.run.report_to, config.lora.targets) == (["wandb"], ["q_proj", "v_proj"])
    assert config.run.tags == ["a", "b"]


def test_no_learning_rate_is_dangerous_for_a_model_of_ones_own():
    assert load_config(None).train.learning_rate == 1e-6
    assert load_config(None, ["--lora.rank", "8"]).train.learning_rate == 1e-5
    assert (
        load_config(None, ["--lora.rank", "8", "--train.learning_rate", "3e-4"]).train.learning_rate == 3e-4
    )
    assert load_config("toolbox").train.learning_rate > 1e-5


def test_bundled_configs_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("toolbox") == load_config("configs/toolbox.yaml")
    with pytest.raises(ConfigError, match=r"bundled are .*toolbox"):
        load_config("tool-box")


def test_help_names_every_key_once_with_what_it_is():
    text = help_text()
    for _, _, keys in described(Config):
        for key in keys:
            assert text.count(f"--{key.dotted} ") == 1
            assert key.what
            assert "\n" not in key.what
    assert all(preset in text for preset in PRESETS)
    assert "--resume" in text


def test_a_dry_run_prints_what_a_run_comes_to_and_runs_nothing(tmp_path, capsys):
    words = ["train", "toolbox", "--dry-run", "--run.dir", str(tmp_path / "runs"), "--train.max_steps", "3"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "max_steps: 3" in out
    assert "8 prompts x 8 rollouts = 64 rollouts" in out
    assert "GiB" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("old", "new"), [("true", "full"), ("false", "none")])
def test_a_boolean_of_gradient_checkpointing_is_told_its_name(tmp_path, old, new):
    path = tmp_path / "old.yaml"
    path.write_text(f"model:\n  gradient_checkpointing: {old}\n")
    with pytest.raises(ConfigError, match=f"model.gradient_checkpointing=.* was renamed to '{new}'"):
        load_config(path)


def test_a_command_leaves_the_callers_signal_handlers(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
