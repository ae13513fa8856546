"""The fused log-probs inside TRL's GRPOTrainer (pip install trl; written against 1.16).

TRL takes its log-probs from one method. Overriding it is enough: the [tokens, vocabulary] logits of the
training pass never exist; TRL's loss, sampling and metrics stay as they are. Here the small model that comes
with the package is trained for three steps to begin with the call that an expert begins with.

    python examples/trl_grpo.py
"""

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
        model = self.accelerator.unwrap_model(model)
        logprobs, entropies = [], []
        size = batch_size or len(input_ids)
        for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True):
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            hidden = hidden[:, -logits_to_keep - 1 : -1]  # [b, K, H]: the state before each kept token
            target = ids[:, -logits_to_keep:]
            logprob, entropy = linear_logprob(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                target.flatten(),
                temperature=self.temperature,
                return_entropy=True,
            )
            logprobs.append(logprob.view_as(target))
            entropies.append(entropy.view_as(target))
        self.calls = getattr(self, "calls", 0) + 1
        return torch.cat(logprobs), torch.cat(entropies) if compute_entropy else None, None


def main() -> None:
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
    for row in trainer.state.log_history:
        if "reward" in row:
            print(
                f"step {row['step']}: reward {row['reward']:.2f}, entropy {row['entropy']:.3f}, "
                f"loss {row['loss']:+.4f}"
            )
    print(f"{trainer.calls} passes took their log-probs from pact_fast.linear_logprob")


if __name__ == "__main__":
    main()
