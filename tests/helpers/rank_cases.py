"""Random training steps on one or several ranks, in one process group a size: see test_rank_cases.py.

    python -m tests.helpers.rank_cases FOLDER SIZE CASES [FAULT]

Every case draws prompts, group sizes, rewards, mini-batches and budgets from its number alone, so that a run
of any size does the same cases. Each rank writes FOLDER/SIZE-RANK.pt: per case the gradients of its updates.
"""

import dataclasses
import faulthandler
import os
import random
import socket
import sys
import traceback
from pathlib import Path

import torch

from pact_fast import distributed
from pact_fast.envs.base import Outcome
from pact_fast.rollout import Rollout
from pact_fast.train.trainer import Trainer
from pact_fast.tree.scoring import sequence_logprobs
from tests.helpers.runs import config

PRESETS = ("pact", "grpo", "matchtir", "opsd", "sdar", "rlcsd", "sdpo")


def rollout(rng, trainer, record, solved):
    made = Rollout(record, trainer.builder.prompt(record))
    for turn in range(rng.randint(1, 3)):
        count = rng.randint(1, 9)
        made.add_sampled([rng.randint(8, 700) for _ in range(count)], [-6.0] * count, turn)
        made._add([rng.randint(8, 700) for _ in range(rng.randint(0, 4))], False, [], turn)
        made.logprobs += [0.0] * (len(made.token_ids) - len(made.logprobs))
        made.turn_rewards.append(float(solved))
    made.outcome = Outcome(float(solved), bool(solved))
    return made


def do_case(trainer, base, number):
    """The gradients of a case's updates, by mini-batch and iteration."""
    rng = random.Random(number)
    group, parts = rng.choice([1, 2, 4, 8]), rng.choice([1, 1, 2, 3])
    records = rng.sample(trainer.records, rng.randint(1, 5))
    train = dataclasses.replace(
        base.train, num_mini_batches=parts, token_budget=rng.choice([200, 600, 100_000])
    )
    sampling = dataclasses.replace(base.rollout, num_generations=group)
    trainer.config = dataclasses.replace(base, train=train, rollout=sampling)
    # Most groups earn all the same: their advantages are 0, and the objective leaves them out.
    spread = [rng.random() < 0.35 for _ in records]
    solved = [[rng.randint(0, 1) if s else 0 for _ in range(group)] for s in spread]
    rollouts = [rollout(rng, trainer, r, s) for r, marks in zip(records, solved, strict=True) for s in marks]
    progress = rng.choice([0.1, 0.9])
    strength = trainer.schedule.sft_strength(progress) if rng.random() < 0.5 else None
    anchored = trainer.schedule.anchored([r.id for r in records], number)
    batches = trainer.mini_batches(records, rollouts, anchored, strength, progress)
    if rng.random() < 0.3:
        trainer.sharded.apart("other work", lambda: some_forwards(trainer, records))
    trainer.score(batches, {r.id: r for r in records}, rng.random() < 0.7)
    poison = rng.random() < 0.1 and trainer.world.rank == 0
    gradients = []
    for _ in range(rng.choice([1, 2])):
        for samples in batches:
            trainer.poisoned = poison and not gradients
            update = trainer.update(samples, 0)
            trainer.skipped_in_a_row = 0
            whole = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
            found = {n: distributed.plain(g).clone() for n, g in whole.items()}
            gradients.append(None if update.skipped else found)
    return gradients


def let_poison(trainer):
    """Where `trainer.poisoned`, the gradient that comes back to the model is NaN."""
    real = trainer.policy.hidden

    def hidden(pack):
        out = real(pack)
        if trainer.poisoned and out.requires_grad:
            out.register_hook(lambda grad: grad * float("nan"))
        return out

    trainer.policy.hidden, trainer.poisoned = hidden, False


def some_forwards(trainer, records):
    """What a rank does apart: as many forwards as it has prompts, none perhaps."""
    mine = trainer.world.shard(records)
    with torch.no_grad():
        for record in mine:
            sequence_logprobs(trainer.policy, [trainer.builder.prompt(record).ids])


def disagree(trainer, number):
    """Ranks that do different things: what no code does, and what must be named where some does."""
    if number == 0:
        trainer.world.gather("alone")
    else:
        records, strength = trainer.records[:1], trainer.schedule.sft_strength(0.1)
        anchored = trainer.schedule.anchored([r.id for r in records], 0)
        samples = trainer.mini_batches(records, [], anchored, strength, 0.1)[0]
        trainer.world.begin = lambda *_: None
        trainer.update(samples, 0)


def life(folder, number, size, cases, fault, port):
    if size > 1:
        places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {k: str(v) for k, v in places.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "PACT_FAST_TIMEOUT": "1000"}
    if fault:
        distributed.STALL = 8.0
    found = []
    for index, preset in enumerate(PRESETS):
        changes = {"objective__entropy_coef": 0.0, "objective__beta": 0.05 * (index == 1)}
        if preset == "rlcsd":  # its own 0.02 makes 25 times the last bits of a log-prob of an advantage
            changes["objective__modulation_scale"] = 0.5
        trainer = Trainer(config(folder / f"{size}-{preset}", preset, checkpoint__every=0, **changes))
        trainer.optimizer.step = lambda: None  # every case starts from the same weights
        trainer._say = lambda text: None
        let_poison(trainer)
        base = trainer.config
        if fault == "collectives":
            disagree(trainer, number)
        if fault == "plans":
            trainer.world.rounds("update", [[number]], [])
        for case in range(index, cases, len(PRESETS)):
            faulthandler.dump_traceback_later(240, exit=True)
            found.append((case, do_case(trainer, base, case)))
            faulthandler.cancel_dump_traceback_later()
    torch.save(found, folder / f"{size}-{number}.pt")


def main(folder, size, cases, fault=""):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(folder / f"{size}-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                life(folder, number, size, cases, fault, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    sys.exit(max(abs(code) for code in codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
