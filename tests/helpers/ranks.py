"""Runs training jobs on one or several ranks, one after another, in processes forked from this one.

    python -m tests.helpers.ranks '[{"run_dir": ..., "size": 2, "changes": {...}}, ...]'

A job may begin as a copy ("from") of another's run folder.

The ranks find each other through the variables that torchrun sets. Forking saves the seconds that each of
many interpreters would take to import torch and transformers. Prints one JSON list of exit codes per job.
"""

import faulthandler
import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

import torch

from pact_fast.train.trainer import Trainer
from tests.helpers.runs import config


def rank(job, number, port):
    """The life of one rank; `poison` puts a NaN into this rank's gradient at a step, `die` ends it there."""
    places = (
        {}
        if job["size"] == 1 and not job.get("fsdp")
        else {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": str(job["size"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PACT_FAST_TIMEOUT": str(job.get("timeout", 300)),
        }
    )
    os.environ |= places
    faulthandler.dump_traceback_later(job.get("limit", 1500), exit=True)
    trainer = Trainer(config(Path(job["run_dir"]), **job["changes"]))
    real = trainer.update

    hidden = trainer.policy.hidden
    poisoned = []

    def poison(pack):
        out = hidden(pack)
        if poisoned and out.requires_grad:
            out.register_hook(lambda grad: torch.full_like(grad, job.get("poison_value", float("nan"))))
        return out

    trainer.policy.hidden = poison

    def update(samples, step):
        poisoned[:] = [True] if job.get("poison") == [number, step] else []
        if job.get("die") == [number, step]:
            os.kill(os.getpid(), 9)
        try:
            return real(samples, step)
        finally:
            poisoned.clear()

    trainer.update = update
    trainer.train()


def start_ranks(job, before=lambda number: None):
    """Forks the ranks of a job -> their pids; `before` is called with its number in each one's process."""
    if "from" in job:
        shutil.copytree(job["from"], job["run_dir"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(job["size"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                log = os.open(f"{job['run_dir']}.rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                before(number)
                rank(job, number, port)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    return children


def wait_for(pids):
    """Exit codes of the ranks."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


if __name__ == "__main__":
    print(json.dumps([wait_for(start_ranks(job)) for job in json.loads(sys.argv[1])]))
