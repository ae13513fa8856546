"""Two gloo processes with a replica of one model each: what Policy does under DistributedDataParallel.

    python -m tests.helpers.replicas FOLDER

Prints one JSON object: what rank 0 found (see `rank`).
"""

import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pact_fast import Policy, pack_tree, sequence_logprobs
from pact_fast.tree.scoring import pack_logprobs
from tests.helpers.trees import tiny_model

SEQUENCES = [[[5, 6, 7, 8], [5, 6, 9]], [[5, 6, 1, 2, 3], [4, 4]]]  # of each rank
SIZE = len(SEQUENCES)


def make(kind):
    model = tiny_model("qwen3", tied=kind == "tied")
    if kind == "lora":
        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
        )
    return model


def loss(policy, sequences):
    pack = pack_tree(sequences)
    targets = [index[1:] for index in pack.token_index]
    return -torch.cat(pack_logprobs(policy, pack, targets)).sum()


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def message_of(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was raised"


def rank(number, folder):
    """Per kind of model: the largest difference of a gradient from the mean over the ranks' own, and between
    ranks; and the messages of misuse."""
    store = dist.FileStore(str(folder / "store"), SIZE)
    dist.init_process_group("gloo", store=store, rank=number, world_size=SIZE)
    found = {}
    for kind in ("plain", "tied", "lora", "checkpointed"):
        torch.manual_seed(0)
        alone = make(kind)
        for mine in SEQUENCES:
            (loss(Policy(alone), mine) / SIZE).backward()
        torch.manual_seed(0)
        model = make(kind)
        ddp = DistributedDataParallel(model)
        policy = Policy(ddp, gradient_checkpointing=kind == "checkpointed")
        with torch.no_grad():  # as often as a rank likes: without gradients nothing is exchanged
            for _ in range(number):
                loss(policy, SEQUENCES[number])
        with ddp.no_sync():
            (0 * loss(policy, SEQUENCES[number])).backward()
        loss(policy, SEQUENCES[number]).backward()
        mine = gradients(model)
        other = [torch.zeros_like(mine) for _ in range(SIZE)]
        dist.all_gather(other, mine)
        found[kind] = {
            "from the mean": float((mine - gradients(alone)).abs().max()),
            "between ranks": float((other[0] - other[1]).abs().max()),
            "size": float(mine.abs().max()),
        }
        found["plain forward"] = list(ddp(torch.tensor([[1, 2]])).logits.shape)
    found["module"] = message_of(lambda: loss(Policy(ddp.module), SEQUENCES[number]))
    found["inner"] = message_of(lambda: sequence_logprobs(ddp.module, [[1, 2]]))
    with torch.no_grad():
        found["scored"] = message_of(lambda: sequence_logprobs(ddp.module, [[1, 2]]))
    with ddp.no_sync():
        found["no_sync"] = message_of(lambda: sequence_logprobs(ddp.module, [[1, 2]]))
    unused = DistributedDataParallel(tiny_model("qwen3"), find_unused_parameters=True)
    found["find_unused"] = message_of(lambda: loss(Policy(unused), SEQUENCES[number]))
    dist.barrier()
    if number == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main(folder):
    children = []
    for number in range(SIZE):
        pid = os.fork()  # saves the seconds of importing torch and transformers again
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    rank(number, folder)
                    code = 0
                except BaseException:
                    traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")
    print((folder / "found.json").read_text())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
