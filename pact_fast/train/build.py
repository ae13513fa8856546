"""What a run is built from: the policy's model and tokenizer, its reference, its optimizer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.config import ConfigError, DistributedConfig, LoraConfig, ModelConfig, TrainConfig
from pact_fast.distributed import Sharded, World
from pact_fast.envs.toolbox.base_model import base_model_path
from pact_fast.train.memory import choose_checkpointing, device_capacity
from pact_fast.train.optimizer import AdamWBF16, adamw_8bit
from pact_fast.tree.families import causal_lm, check_model
from pact_fast.tree.policy import Policy

SMALL_MODEL = 10_000_000  # parameters; two threads took longer than one on every model tried below it


def set_threads(threads: int | None, model: nn.Module) -> None:
    """CPU threads of the whole process: as given, else one for a small model, which more make slower."""
    small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL
    if threads or small:
        torch.set_num_threads(threads or 1)


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """The device of this rank; "auto" is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: this torch ({torch.__version__}) sees no GPU; use cpu, or auto")
    return torch.device(f"cuda:{local_rank}" if name == "cuda" else name)


def build_model(config: ModelConfig, lora: LoraConfig, device: torch.device) -> tuple[Any, Any]:
    """The causal LM on its device, with adapters where asked, and its tokenizer."""
    model, tokenizer = load_pretrained(config.path, config.dtype)
    if lora.rank:
        model = _with_adapters(model, lora)
    if device.type == "cpu":
        keep_freed_memory()
    return model.to(device), tokenizer


def load_pretrained(name: str, dtype: str) -> tuple[Any, Any]:
    """A causal LM and its tokenizer.

    name: a Hugging Face folder, the folder of a run (its model), a hub name, or "toolbox-base".
    dtype: of torch, by name.

    Raises ValueError, in one line, where there is no such model, its files are damaged, or its tokenizer has
    tokens that its embedding has no row for.
    """
    path = model_path(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"model {name!r} cannot be loaded: {reason}") from error
    rows = model.get_input_embeddings().num_embeddings
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= rows}
    if beyond:
        token = min(beyond, key=lambda t: beyond[t])
        raise ValueError(
            f"model {name!r}: its tokenizer has the token {token!r} ({beyond[token]}), its embedding "
            f"{rows} rows: call model.resize_token_embeddings(len(tokenizer)) and save the model again"
        )
    return model, tokenizer


def base_out_of_place(name: str, env: str) -> str | None:
    """A line to print where the bundled model is put to work that it was not made for."""
    if name != "toolbox-base" or env.startswith("toolbox"):
        return None
    return (
        f"note: toolbox-base (312,000 parameters) knows the toolbox environment alone; on {env} it shows "
        "that things run, not what they learn: give a model of your own"
    )


def model_path(name: str) -> str | Path:
    """What `from_pretrained` takes for a model's name; ValueError where it is a path and nothing is there."""
    if name == "toolbox-base":
        return base_model_path()
    path = Path(name)
    if path.is_dir():
        ours = path / "model" / "config.json"
        if ours.is_file():
            return path / "model"
        if not (path / "config.json").is_file():
            raise ValueError(f"model {name!r}: the folder holds no config.json; is it a model's or a run's?")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name!r}: there is no such folder")
    return name


def _with_adapters(model: Any, lora: LoraConfig) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"lora.rank={lora.rank} needs `pip install peft`") from error
    # "all-linear" leaves the head out: it stays frozen, and no gradient of [V, H] is ever made.
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or "all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, settings)


def build_policy(model: Any, config: ModelConfig, tokens: int, ranks: int = 1) -> Policy:
    """`tokens`: packed tokens of the largest forward, `ranks`: that share the states; both for "auto"."""
    checkpointing: str = config.gradient_checkpointing
    if checkpointing == "auto":
        capacity = device_capacity(next(model.parameters()).device)
        checkpointing = choose_checkpointing(check_model(causal_lm(model)), ranks, tokens, capacity)
    return Policy(
        model,
        attention=config.attention,
        gradient_checkpointing=checkpointing,
        kernels=config.kernels,
        compile=config.compile,
    )


def build_sharded(model: nn.Module, world: World, config: DistributedConfig) -> Sharded:
    """The model over the ranks of `world`; ConfigError for an option that needs FSDP where there is none."""
    if not world.distributed and config != DistributedConfig():
        raise ConfigError(f"{config}: options of FSDP; start the run with torchrun, on one GPU too")
    dtype = getattr(torch, config.compute_dtype) if config.compute_dtype else None
    return Sharded(model, world, param_dtype=dtype, cpu_offload=config.cpu_offload)


def build_optimizer(model: nn.Module, config: TrainConfig, world: World) -> torch.optim.Optimizer:
    """AdamW, its states as `train.optim` says; matrices decay, norms and biases do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kind: Any = {"adamw": torch.optim.AdamW, "adamw_bf16": AdamWBF16}.get(config.optim)
    if kind is None:
        if world.distributed:
            raise ConfigError(
                "train.optim=adamw_8bit: its states lie in blocks that cannot move between numbers of ranks; "
                "use adamw_bf16, or one process without torchrun"
            )
        kind = adamw_8bit()
    betas = (config.adam_beta1, config.adam_beta2)
    return kind([g for g in groups if g["params"]], lr=config.learning_rate, betas=betas)


def keep_freed_memory() -> bool:
    """Tells glibc to keep up to 1 GiB of freed memory for the next step; False where there is no glibc.

    By default a step's activations go back to the system when they are freed and are faulted in, zeroed, by
    the next step: 77,000 page faults and 8% of the time of a 3,800-token step of a 4-layer model.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_* of malloc.h; 32 MiB is the greatest mmap threshold
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 1 << 30))
