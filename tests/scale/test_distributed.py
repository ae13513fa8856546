"""Two ranks do what one process does; what happens to one of them is noticed by the other."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pact_fast.commands.export import export
from pact_fast.distributed import World
from tests.helpers.runs import adapters, curve, same_weights, tiny_experts, tiny_model, weights

HERE = Path(__file__).parent
# Small packs: several an update, and on two ranks an odd number now and then.
TOTAL = int(os.environ.get("PACT_SCALE_STEPS", "6"))  # the figures of docs/scaling.md are of 20
SHORT = {"train__max_steps": TOTAL, "train__token_budget": 900, "eval__every": 0, "eval__validation_tasks": 1}
SHORT["objective__beta"] = 0.05  # a reference model, sharded as the policy is
STEPS = {"checkpoint__every": 1, "checkpoint__keep_last": 20}
LORA = {
    "lora__rank": 4,
    "checkpoint__every": 1,
    "train__learning_rate": 0.01,
    "train__max_steps": max(3, TOTAL // 2),
}

HALF = {"distributed__compute_dtype": "bfloat16", "distributed__cpu_offload": True, "train__max_steps": 2}
# No record's tree fits into one forward: trunk and parts of two ranks go side by side.
STREAM = {"train__token_budget": 300, "train__prefix": "stream"}
STREAM["model__gradient_checkpointing"] = "keep_attention"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """All jobs of this file, run in one interpreter -> {name: (exit codes, run folder)}."""
    root = tmp_path_factory.mktemp("ranks")
    shared = SHORT | {"model__path": str(tiny_model())}
    experts = {"model__path": str(tiny_experts()), "train__max_steps": 3}

    def job(name, size, run=None, **more):
        changes = shared | more.pop("changes", {})
        return name, {"run_dir": str(root / (run or name)), "size": size, "changes": changes} | more

    resume = STEPS | {"checkpoint__resume": True}
    listed = [
        job("one", 1),
        job("two", 2),
        job("one rank under FSDP", 1, fsdp=True),
        job("no-accumulation", 2, changes={"train__token_budget": 100_000}),
        job("two, rank 1 killed", 2, run="moved", die=[1, 2], timeout=60, changes=STEPS),
        job("two go on as two", 2, **{"from": str(root / "moved")}, changes=resume),
        job("one goes on, killed", 1, run="moved", die=[0, 4], changes=resume),
        job("two finish", 2, run="moved", changes=resume),
        job("lora one", 1, changes=LORA),
        job("lora two, rank 0 killed", 2, run="lora-two", die=[0, 2], timeout=60, changes=LORA | STEPS),
        job("lora two finish", 2, run="lora-two", changes=LORA | resume),
        job("streamed two", 2, changes=STREAM),
        job("recomputed two", 2, changes=STREAM | {"train__prefix": "recompute"}),
        job("streamed lora two", 2, changes=LORA | STREAM),
        job("bf16, offloaded", 2, changes=HALF),
        job("experts one", 1, changes=experts | {"train__token_budget": 100_000}),
        job("experts two", 2, changes=experts),
        job("poisoned one", 1, poison=[0, 3]),
        job("poisoned rank 1 of two", 2, poison=[1, 3]),
    ]
    words = [sys.executable, "-m", "tests.helpers.ranks", json.dumps([entry for _, entry in listed])]
    paths = os.environ | {"PYTHONPATH": str(HERE.parent.parent)}  # this tree, whatever is installed
    done = subprocess.run(words, capture_output=True, text=True, timeout=1500, env=paths)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {name: (code, Path(e["run_dir"])) for (name, e), code in zip(listed, codes, strict=True)}


def difference(jobs, a, b, read=weights):
    one, two = (read(jobs[name][1]) for name in (a, b))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.timeout(1600)
@pytest.mark.parametrize("other", ["two", "no-accumulation", "one rank under FSDP"])
def test_ranks_train_to_the_weights_of_one_process(jobs, other):
    assert jobs["one"][0] == [0]
    assert set(jobs[other][0]) == {0}
    worst = difference(jobs, "one", other)
    print(f"{other}, {TOTAL} steps, against one process: largest difference of a weight {worst:.1e}")
    assert worst < 1e-5
    for ours, theirs in zip(curve(jobs["one"][1]), curve(jobs[other][1]), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # Packs cut elsewhere repeat other prefixes: tokens are counted as packed.
            if isinstance(value, float) and name != "num_tokens":
                assert theirs[name] == pytest.approx(value, abs=2e-5), name


@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("one", "two"), [("one", "streamed two"), ("lora one", "streamed lora two")])
def test_two_ranks_that_stream_their_trees_train_to_the_weights_of_one_process(jobs, one, two):
    assert set(jobs[two][0]) == {0}
    assert difference(jobs, one, two, adapters if "lora" in one else weights) < 1e-5


def test_streaming_computes_fewer_tokens_than_recomputing(jobs):
    streamed, recomputed = (
        max(row.get("num_tokens") or 0 for row in curve(jobs[name][1]))
        for name in ("streamed two", "recomputed two")
    )
    assert streamed < 0.9 * recomputed


def test_the_routers_loss_does_not_depend_on_ranks_or_packs(jobs):
    assert jobs["experts one"][0] == [0]
    assert jobs["experts two"][0] == [0, 0]
    assert difference(jobs, "experts one", "experts two") < 1e-5
    one, two = (
        [row["router_loss"] for row in curve(jobs[name][1]) if "loss" in row]
        for name in ("experts one", "experts two")
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert all(0.2 < value < 0.4 for value in one)  # coefficient x experts per token where loads are even


def test_the_test_sees_training_at_all(jobs):
    start, end = load_file(tiny_model() / "model.safetensors"), weights(jobs["one"][1])
    assert max(float((start[name] - end[name]).abs().max()) for name in end) > 1e-3


def test_a_killed_rank_ends_the_other_and_the_run_moves_from_2_ranks_to_1_to_2(jobs):
    codes = jobs["two, rank 1 killed"][0]
    assert codes[1] == -9
    assert codes[0] not in (0, -9), "the rank that is left must fail, not go on alone"
    left = jobs["two, rank 1 killed"][1]
    assert "start all ranks again with --resume" in left.with_name(f"{left.name}.rank0.log").read_text()
    assert jobs["one goes on, killed"][0] == [-9]
    assert jobs["two finish"][0] == [0, 0]
    worst = difference(jobs, "one", "two finish")
    print(f"2 ranks -> 1 -> 2, {TOTAL} steps, against one process: largest difference {worst:.1e}")
    assert worst < 1e-5
    steps = [row["step"] for row in curve(jobs["two finish"][1]) if "eval/solved" not in row]
    assert steps == list(range(TOTAL))


def test_two_ranks_resume_bit_for_bit(jobs):
    assert jobs["two go on as two"][0] == [0, 0]
    assert same_weights(weights(jobs["two"][1]), weights(jobs["two go on as two"][1]))
    assert curve(jobs["two"][1]) == curve(jobs["two go on as two"][1])


def test_adapters_on_two_ranks_train_to_those_of_one_process_also_after_a_kill(jobs):
    assert jobs["lora one"][0] == [0]
    assert jobs["lora two, rank 0 killed"][0][0] == -9
    assert jobs["lora two, rank 0 killed"][0][1] not in (0, -9)
    assert jobs["lora two finish"][0] == [0, 0]
    worst = difference(jobs, "lora one", "lora two finish", adapters)
    print(f"LoRA on two ranks, killed and resumed, against one process: largest difference {worst:.1e}")
    assert worst < 1e-5
    trained = adapters(jobs["lora one"][1])
    assert max(float(t.abs().max()) for name, t in trained.items() if "lora_B" in name) > 1e-3
    shards = sorted((jobs["lora two finish"][1] / "checkpoints").glob("step-*/*.safetensors"))
    assert len(shards) >= 2 * 3
    assert all("lora_" in name for shard in shards for name in load_file(shard)), "adapters alone are saved"


def test_a_nan_in_one_ranks_gradient_skips_the_update_on_all(jobs):
    assert jobs["poisoned rank 1 of two"][0] == [0, 0]
    rows = curve(jobs["poisoned rank 1 of two"][1])
    assert [row["pact/skipped_steps"] for row in rows if "loss" in row] == [0] * 3 + [2] * (TOTAL - 3)
    assert difference(jobs, "poisoned one", "poisoned rank 1 of two") < 1e-5
    assert difference(jobs, "one", "poisoned one") > 1e-4


def test_bf16_compute_trains_fp32_masters(jobs):
    assert jobs["bf16, offloaded"][0] == [0, 0]
    trained, start = weights(jobs["bf16, offloaded"][1]), load_file(tiny_model() / "model.safetensors")
    assert {t.dtype for t in trained.values()} == {torch.float32}
    assert max(float((trained[name] - start[name]).abs().max()) for name in start) > 1e-4
    row = curve(jobs["bf16, offloaded"][1])[0]
    assert row["pact/logprob_mismatch"] < 0.05


@pytest.mark.parametrize("name", ["two", "lora two finish"])
def test_a_run_of_two_ranks_exports_to_a_plain_folder(jobs, name, tmp_path):
    alone = {"two": "one", "lora two finish": "lora one"}[name]
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(export(jobs[n][1], tmp_path / str(i))).state_dict()
        for i, n in enumerate((name, alone))
    )
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) < 1e-5
    start = load_file(tiny_model() / "model.safetensors")
    assert max(float((ours[n] - start[n]).abs().max()) for n in start) > 1e-4, "merged, trained weights"


def test_shares_cover_everything_once_and_even_ones_are_as_long():
    items = list(range(7))
    worlds = [World(rank, 3) for rank in range(3)]
    assert sorted(i for w in worlds for i in w.shard(items)) == items
    for world in worlds:
        world.begin = lambda *_: None  # no process group here
    assert [w.rounds("update", items, -1) for w in worlds] == [[0, 3, 6], [1, 4, -1], [2, 5, -1]]
    assert [w.rounds("update", [], -1) for w in worlds] == [[], [], []]
    alone = World()
    assert (
        alone.shard(items)
        == alone.join(items)
        == alone.concat(items)
        == alone.rounds("a", items, -1)
        == items
    )
    assert alone.any(True)
    assert not alone.any(False)


def test_options_of_several_processes_are_refused_in_one(tmp_path):
    from pact_fast.config import ConfigError
    from pact_fast.train.trainer import Trainer
    from tests.helpers.runs import config

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match="torchrun"):
            Trainer(config(tmp_path / "run", distributed__cpu_offload=True))
