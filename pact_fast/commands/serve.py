"""`pact-fast serve MODEL`: samples for trainers on other GPUs or machines."""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pact_fast.serve.server import Server, Service
from pact_fast.train.build import device_of, load_pretrained

TOKEN = "PACT_FAST_TOKEN"  # environment variable, read by server and trainer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pact-fast serve", description=__doc__)
    parser.add_argument("model", help='a Hugging Face folder or hub name, or "toolbox-base"')
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; any but loopback needs a token")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one and prints it")
    parser.add_argument("--token", help=f"bearer token that clients must send; default: ${TOKEN}")
    parser.add_argument(
        "--model-root",
        type=Path,
        help="folder that new weights may come from (the run folder); none without it",
    )
    parser.add_argument("--name", help="the model's name for clients; default: MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16", "float64"],
        help="float64: draws do not depend on who shares the batch, not even by rounding",
    )
    parser.add_argument("--max-rows", type=int, default=64, help="sequences sampled at once")
    parser.add_argument("--max-waiting", type=int, default=4096, help="sequences in line; more get 503")
    parser.add_argument("--max-model-len", type=int, help="prompt and completion; default: the model's own")
    parser.add_argument(
        "--kv-memory",
        type=float,
        default=0.5,
        help="share of the free device memory for keys and values (on a CPU of all memory, 4 GiB at most)",
    )
    parser.add_argument(
        "--no-cuda-graphs", action="store_true", help="launch decoding steps kernel by kernel"
    )
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser


def build_server(args: argparse.Namespace) -> Server:
    if args.threads:
        torch.set_num_threads(args.threads)
    device = device_of(args.device)
    model, tokenizer = load_pretrained(args.model, args.dtype)
    service = Service(
        model,
        args.name or args.model,
        tokenizer,
        max_model_len=args.max_model_len,
        model_root=args.model_root,
        max_rows=args.max_rows,
        max_waiting=args.max_waiting,
        kv_memory=args.kv_memory,
        cuda_graphs=not args.no_cuda_graphs,
        device=device,
    )
    return Server(service, (args.host, args.port), args.token or os.environ.get(TOKEN))


def main(argv: Sequence[str]) -> int:
    server = build_server(build_parser().parse_args(list(argv)))

    def stop(*_: Any) -> None:
        threading.Thread(target=server.shutdown, daemon=True).start()

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    host, port = server.server_address[:2]
    print(f"serving {server.service.name} on http://{host!s}:{port}", flush=True)
    server.serve_forever(poll_interval=0.1)
    server.server_close()
    print(f"stopped after {server.service.engine.served} completions", flush=True)
    return 0
