"""A causal language model whose experts are linear layers of their own, called in the ways that models call them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP


class LinearExpertsConfig(LlamaConfig):
    """Every token goes to one of `num_experts`. `called` says with which tokens an expert is called.

    "chosen": with its own, if there are any; "empty": with its own, even if there are none; "all": with every token,
    and what the others gave is dropped.
    """

    model_type = "linear_experts"
    num_experts: int = 3
    called: str = "chosen"


class LinearExperts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.called = config.called
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=True)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if self.called == "all":
                out = out + expert(rows) * (weight * mine)[:, None]
                continue
            (here,) = torch.where(mine)
            if len(here) or self.called == "empty":
                out = out.index_add(0, here, expert(rows[here]) * weight[here, None])
        return out.view_as(x)


class LinearExpertsForCausalLM(LlamaForCausalLM):
    config_class = LinearExpertsConfig

    def __init__(self, config: LinearExpertsConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = LinearExperts(config)  # pyright: ignore[reportAttributeAccessIssue]
        self.post_init()


AutoConfig.register("linear_experts", LinearExpertsConfig)
AutoModelForCausalLM.register(LinearExpertsConfig, LinearExpertsForCausalLM)


def linear_experts(called: str = "chosen", never: int | None = None, seed: int = 0) -> LinearExpertsForCausalLM:
    """A tiny model in evaluation mode; no token chooses the expert `never`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LinearExpertsConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            called=called,
        )
        model = LinearExpertsForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.25)
        layers: Any = model.model.layers
        for layer in layers:
            gate = layer.mlp.gate
            nn.init.zeros_(gate.bias)
            if never is not None:
                gate.bias.data[never] = -1e4
    return model.eval().requires_grad_(False)
