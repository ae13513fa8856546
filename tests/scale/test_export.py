import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.commands import export as module
from pact_fast.commands.export import export
from pact_fast.config import load_config
from pact_fast.train.checkpoint import CheckpointError
from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run with checkpoints after 2, 4 and 6 steps, the one after 2 the best."""
    run_dir = tmp_path_factory.mktemp("export") / "run"
    trainer = Trainer(config(run_dir, checkpoint__every=0, train__max_steps=1, checkpoint__keep_last=2))
    trainer.train()
    for step, score in ((2, 0.9), (4, 0.1), (6, 0.2)):
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(step)
        trainer.checkpoint(step, None, score, wait=True)
    trainer.env.close()
    return run_dir


@pytest.mark.parametrize(("which", "value"), [("last", 6), ("best", 2), ("4", 4), ("000004", 4)])
def test_the_exported_folder_loads_with_the_weights_of_that_checkpoint(run_dir, tmp_path, which, value):
    out = export(run_dir, tmp_path / "out", which=which)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(bool((p == value).all()) for p in model.parameters())
    path = load_config(run_dir / "config.json").model.path
    ours, theirs = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert not list(tmp_path.glob(".*"))


def test_export_refuses_to_overwrite_and_names_what_there_is(run_dir, tmp_path, capsys):
    with pytest.raises(FileExistsError, match="exists"):
        export(run_dir, tmp_path)
    with pytest.raises(CheckpointError, match="step-000002, step-000004, step-000006"):
        export(run_dir, tmp_path / "out", which="3")
    with pytest.raises(FileNotFoundError, match=r"is .* a run folder"):
        export(tmp_path, tmp_path / "out")
    assert module.main([str(run_dir), str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_exported(run_dir, tmp_path):
    state = run_dir / "checkpoints" / "step-000004" / "state.json"
    content = state.read_text()
    state.write_text(content.replace('"step": 4', '"step": 5'))
    try:
        with pytest.raises(CheckpointError, match=r"state\.json has changed"):
            export(run_dir, tmp_path / "out", which="4")
    finally:
        state.write_text(content)
