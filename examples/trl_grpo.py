"""The fused log-probs inside TRL's GRPOTrainer (pip install trl; written against 1.16).

TRL takes its log-probs from one method. Overriding it is enough: the [tokens, vocabulary] logits of the
training pass never exist; TRL's loss, sampling and metrics stay as they are. Here the small model that comes
with the package is trained for three steps to begin with the call that an expert begins with.

    python examples/trl_grpo.py
    torchrun --standalone --nproc-per-node 2 examples/trl_grpo.py --lora     # two processes, adapters (peft)

The model may have adapters around it, and in several processes DistributedDataParallel: the log-probs are
then made inside of its forward, without which it would not exchange gradients.
"""

import argparse
import logging
import tempfile

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from pact_fast import linear_logprob
from pact_fast.data import ChatFormat
from pact_fast.envs import make_env
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.tree.families import causal_lm
from pact_fast.tree.replicas import within_forward


def adapters():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


class FusedGRPOTrainer(GRPOTrainer):
    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **kwargs,
    ):
        """log-probs [B, K] of the last K = logits_to_keep tokens, entropies [B, K] or None, None."""
        causal = causal_lm(model)
        logprobs, entropies = [], []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            target = ids[:, -logits_to_keep:]

            def score(ids=ids, mask=mask, target=target):
                with self.accelerator.autocast():
                    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
                hidden = hidden[:, -logits_to_keep - 1 : -1]  # [b, K, H]: the state before each kept token
                return linear_logprob(
                    hidden.flatten(0, 1),
                    causal.lm_head.weight,
                    target.flatten(),
                    temperature=self.temperature,
                    return_entropy=True,
                )

            logprob, entropy = within_forward(model, score)
            logprobs.append(logprob.view_as(target))
            entropies.append(entropy.view_as(target))
        self.calls = getattr(self, "calls", 0) + 1
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None


def difference_of_ranks(trainer) -> float:
    """The largest difference of a trained weight between processes: 0 where gradients were exchanged."""
    weights = [p for p in trainer.accelerator.unwrap_model(trainer.model).parameters() if p.requires_grad]
    mine = torch.cat([p.detach().flatten() for p in weights])
    everyone = trainer.accelerator.gather(mine[None])
    return float((everyone - everyone[:1]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO of TRL over pact_fast's log-probs")
    parser.add_argument("--lora", action="store_true", help="train adapters alone")
    lora = parser.parse_args().lora
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    chat = ChatFormat.for_tokenizer(tokenizer)
    env = make_env("toolbox", {"train_tasks": 8, "success_rate": 1.0, "detour_rate": 0.0})
    records = env.records("train")
    env.close()
    data = {
        "prompt": [tokenizer.decode(chat.prompt(r.prompt, r.tools).ids) for r in records],
        "expert_call": [r.expert_trace[0]["tool_calls"][0] for r in records],
    }

    def first_call(completion_ids, expert_call, **kwargs):
        """1 for the expert's first call, 0.5 for its tool with other arguments, else 0."""
        turns = [chat.parse(ids, complete=False) for ids in completion_ids]
        rewards = []
        for turn, expert in zip(turns, expert_call, strict=True):
            call = turn.tool_calls[0] if turn.tool_calls else None
            same_tool = call is not None and call.name == expert["name"]
            rewards.append(0.5 * same_tool + 0.5 * (same_tool and call.arguments == expert["arguments"]))
        return rewards

    with tempfile.TemporaryDirectory() as folder:
        trainer = FusedGRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(base_model_path()),
            processing_class=tokenizer,
            reward_funcs=first_call,
            train_dataset=Dataset.from_dict(data),
            peft_config=adapters() if lora else None,
            args=GRPOConfig(
                output_dir=folder,
                max_steps=3,
                per_device_train_batch_size=16,
                num_generations=8,
                temperature=1.5,  # the small model is sure of itself: without spread, no advantage
                max_completion_length=48,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=not torch.cuda.is_available(),
                bf16=False,
                disable_tqdm=True,
            ),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        difference = difference_of_ranks(trainer)
    if not trainer.accelerator.is_main_process:
        return
    for row in trainer.state.log_history:
        if "reward" in row:
            print(
                f"step {row['step']}: reward {row['reward']:.2f}, entropy {row['entropy']:.3f}, "
                f"loss {row['loss']:+.4f}"
            )
    processes = trainer.accelerator.num_processes
    print(f"{processes} processes, largest difference of a weight between them {difference:g}")
    print(f"{trainer.calls} passes took their log-probs from pact_fast.linear_logprob")


if __name__ == "__main__":
    main()
