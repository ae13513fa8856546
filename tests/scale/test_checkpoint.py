import copy
import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pact_fast.train import checkpoint as module
from pact_fast.train.checkpoint import Checkpointer, CheckpointError, verify
from tests.helpers.checkpoints import Tied, make, train

ROOT = Path(__file__).parents[2]


def equal(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_resume_is_bit_for_bit_with_optimizer_and_generators(tmp_path, asynchronous):
    model, optimizer = make()
    train(model, optimizer, 3)
    saver = Checkpointer(tmp_path, asynchronous=asynchronous)
    saver.save(3, model, optimizer, {"tokens": 77, "skipped": [1]}, score=0.25)
    train(model, optimizer, 4)  # goes on while the save is written: the copy must not follow
    saver.wait()
    other, other_optimizer = make(seed=9)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    loader = Checkpointer(tmp_path)
    record = loader.load(loader.latest(), other, other_optimizer)
    assert record == {"step": 3, "score": 0.25, "state": {"tokens": 77, "skipped": [1]}}
    assert other.head.weight is other.embed.weight
    train(other, other_optimizer, 4)
    assert equal(model, other)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        a, b = optimizer.state[ours], other_optimizer.state[theirs]
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_save_before_the_first_update_resumes_too(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)
    saver.save(0, model, optimizer, {}, wait=True)
    other, other_optimizer = make(seed=4)
    train(other, other_optimizer, 2)
    saver.load(saver.latest(), other, other_optimizer)
    assert equal(model, other)
    assert not other_optimizer.state


def test_nothing_in_a_checkpoint_is_a_pickle_and_weights_are_safetensors(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 1)
    saver = Checkpointer(tmp_path)
    saver.save(1, model, optimizer, {}, wait=True)
    files = sorted(p.name for p in saver.latest().iterdir())
    assert {Path(f).suffix for f in files} == {".json", ".safetensors"}
    (shard,) = saver.latest().glob("*.safetensors")
    tensors = load_file(shard)
    assert torch.equal(tensors["model/embed.weight"], model.embed.weight)
    assert "model/head.weight" not in tensors, "tied weights are stored once"
    assert "model/scratch" not in tensors
    assert sum(name.startswith("optimizer/exp_avg/") for name in tensors) == 6


def test_frozen_weights_are_not_stored_and_stay_as_they_are(tmp_path):
    model, optimizer = make()
    model.body.requires_grad_(False)
    train(model, optimizer, 1)
    saver = Checkpointer(tmp_path)
    saver.save(1, model, optimizer, {}, wait=True)
    other, other_optimizer = make(seed=3)
    other.body.requires_grad_(False)
    frozen = copy.deepcopy(other.body.state_dict())
    saver.load(saver.latest(), other, other_optimizer)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert all(torch.equal(frozen[k], v) for k, v in other.body.state_dict().items())


def test_the_last_k_and_the_best_are_kept(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path, keep_last=2)
    for step, score in ((1, 0.2), (2, 0.9), (3, None), (4, 0.3), (5, 0.4)):
        saver.save(step, model, optimizer, {}, score=score)
    saver.wait()
    assert [p.name for p in saver.paths()] == ["step-000002", "step-000004", "step-000005"]
    assert saver.best().name == "step-000002"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "manifest-missing", "state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    model, optimizer = make()
    saver = Checkpointer(tmp_path, keep_last=3)
    for step in (1, 2):
        train(model, optimizer, 1)
        saver.save(step, model, optimizer, {}, wait=True)
    newest = saver.latest()
    shard = next(newest.glob("*.safetensors"))
    if damage == "flip":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        os.truncate(shard, shard.stat().st_size - 1)
    elif damage == "remove":
        shard.unlink()
    elif damage == "manifest":
        manifest = json.loads((newest / "manifest.json").read_text())
        (newest / "manifest.json").write_text(json.dumps(manifest | {"step": 7}))
    elif damage == "manifest-missing":
        (newest / "manifest.json").unlink()
    else:
        (newest / "state.json").write_text('{"step": 2, "score": null, "state": {"x": 1}}')
    with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
        assert saver.latest().name == "step-000001"
    saver.save(2, model, optimizer, {}, wait=True)  # training again up to there replaces it
    assert saver.latest().name == "step-000002"


def test_every_byte_of_every_file_is_covered(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)
    saver.save(1, model, optimizer, {"a": 1}, wait=True)
    rng = random.Random(0)
    for file in saver.latest().iterdir():
        content = file.read_bytes()
        for _ in range(20):
            position, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
            broken = bytearray(content)
            broken[position] ^= bit
            file.write_bytes(broken)
            # White space of the manifest may turn into other white space and nothing else.
            same = file.name == "manifest.json" and _json(broken) == json.loads(content)
            assert same or verify(saver.paths()[-1]), f"{file.name} byte {position} bit {bit}"
        file.write_bytes(content)
    assert verify(saver.paths()[-1]) is None


def _json(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_when_all_are_damaged_it_stops_and_says_what_to_do(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)
    assert saver.latest() is None
    saver.save(1, model, optimizer, {}, wait=True)
    next(saver.paths()[0].glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="Delete them to start anew"):
        saver.latest()


def test_another_models_checkpoint_is_refused_by_name(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)
    saver.save(1, model, optimizer, {}, wait=True)
    other = Tied()
    other.extra = nn.Linear(2, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"model/extra\.bias is missing"):
        saver.load(saver.latest(), other, torch.optim.AdamW(other.parameters()))
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items()), "nothing may be half loaded"


def test_a_full_disk_warns_keeps_the_older_checkpoint_and_the_next_save_works(tmp_path):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)
    saver.save(1, model, optimizer, {}, wait=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(
        signal.SIGXFSZ, signal.SIG_IGN
    )  # a write past the limit then fails like a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        saver.save(2, model, optimizer, {})
        with pytest.raises(CheckpointError, match="older checkpoints are untouched"):
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in saver.paths()] == ["step-000001"]
    assert not list(tmp_path.glob(".building*"))
    saver.save(2, model, optimizer, {}, wait=True)
    assert saver.latest().name == "step-000002"


def test_no_space_left_during_training_is_a_warning_at_the_next_save(tmp_path, monkeypatch):
    model, optimizer = make()
    saver = Checkpointer(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_write_manifest", full)
    saver.save(1, model, optimizer, {})
    saver._thread.join()
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="No space left on device"):
        saver.save(2, model, optimizer, {})
    saver.wait()
    assert [p.name for p in saver.paths()] == ["step-000002"]


# One interpreter forks a writer per attempt: importing torch 20 times would cost a minute. One thread, as the
# pool of OpenMP does not survive a fork: a child that used it would hang before its first save.
KILLED = """
import os, random, signal, sys, time, torch
from pathlib import Path
torch.set_num_threads(1)
from pact_fast.train.checkpoint import Checkpointer
from tests.helpers.checkpoints import make, train

def writer(folder, steps=10_000):
    model, optimizer = make()
    model.big = torch.nn.Parameter(torch.zeros(300_000))
    saver = Checkpointer(folder, keep_last=2, asynchronous=False)
    for step in range(1, steps):
        model.big.data.fill_(step)
        saver.save(step, model, optimizer, {"step": step})

writer(Path(sys.argv[1]) / "warm-up", steps=2)  # lazy imports happen here, not in every child
begin = time.monotonic()
writer(Path(sys.argv[1]) / "timed", steps=5)
save = (time.monotonic() - begin) / 4  # the kills are spread over a few saves, however fast the machine is
rng, survived, cut, whole = random.Random(), 0, 0, 0
for attempt in range(20):
    folder = Path(sys.argv[1]) / str(attempt % 4)  # some folders are written to again after a kill
    pid = os.fork()
    if pid == 0:
        try:
            writer(folder)
        finally:
            os._exit(1)
    before, deadline = set(os.listdir(folder)) if folder.exists() else set(), time.monotonic() + 60
    while not folder.exists() or set(os.listdir(folder)) == before:  # until the first save has begun
        assert time.monotonic() < deadline, "the writer saved nothing for a minute"
        time.sleep(0.0005)
    time.sleep(rng.uniform(0.0, 4.0) * save)
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "the writer ended by itself"
    cut += bool(list(folder.glob(".building-*")))
    saver = Checkpointer(folder)
    path = saver.latest()
    if path is None:
        assert not saver.paths()
    else:
        whole += 1
        model, _ = make()
        model.big = torch.nn.Parameter(torch.zeros(300_000))
        record = saver.load(path, model, None)
        assert record["state"]["step"] == record["step"] and bool((model.big == record["step"]).all())
    survived += 1
print(f"kill -9 of a writing process: {survived} of 20 survived, {cut} of them cut in the middle of a save,")
print(f"{whole} resumed from a checkpoint")
"""


def test_kill_9_during_writing_leaves_a_whole_checkpoint_20_times(tmp_path):
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    places = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=False, env=places)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 survived" in done.stdout
    assert " 0 of them cut" not in done.stdout, "no kill fell into a save: nothing was tested"
    assert "\n0 resumed" not in done.stdout


def test_a_save_cut_between_its_two_renames_keeps_the_older_checkpoint(tmp_path):
    model, optimizer = make()
    Checkpointer(tmp_path, asynchronous=False).save(1, model, optimizer, {"step": 1})
    (tmp_path / "step-000001").rename(tmp_path / ".replaced-step-000001")
    assert Checkpointer(tmp_path).latest() == tmp_path / "step-000001"
