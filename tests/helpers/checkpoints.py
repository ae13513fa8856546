"""A model with tied weights, buffers and a scalar, to save and to load."""

import random

import numpy as np
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.one = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids))) * (1 + self.one)


def make(seed=0):
    torch.manual_seed(seed)
    model = Tied()
    decay, rest = list(model.body.parameters()), [model.embed.weight, model.one]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=0.05)


def train(model, optimizer, steps):
    for _ in range(steps):
        ids = torch.randint(0, 11, (8,))
        loss = nn.functional.cross_entropy(model(ids), torch.randint(0, 11, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.seen += random.random() + np.random.rand()  # noqa: NPY002
