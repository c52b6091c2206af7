"""Whole models of other libraries, and several processes."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrize

from dynascope.nn import SigmaReparam, iterate_each_step, merge_sigma_reparam, remove_norms, sigma_reparam

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    tokens = {"input_ids": torch.randint(0, 50, (2, 7))}
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        return transformers.GPT2LMHeadModel(config), tokens
    if name == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, **SMALL)
        ), tokens
    if name == "bert":
        config = transformers.BertConfig(vocab_size=50, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SMALL)
        return transformers.BertForMaskedLM(config), tokens
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SMALL
    )
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(2, 3, 8, 8)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_wrapping_for_preservation_and_merging_change_no_output(name: str) -> None:
    model, inputs = model_and_inputs(name)
    model.eval()
    before = model(**inputs).logits
    sigma_reparam(model, gamma="preserve", split_fused={"c_attn": 1})
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merge_sigma_reparam(model)(**inputs).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_model_without_norms_has_norms_of_one_and_a_gradient(name: str) -> None:
    model, inputs = model_and_inputs(name)
    sigma_reparam(remove_norms(model))
    model(**inputs).logits.square().mean().backward()
    wrapped = [module for module in model.modules() if parametrize.is_parametrized(module)]
    assert len(wrapped) >= 8
    for module in wrapped:
        matrix = module.weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(matrix, ord=2).item() == pytest.approx(1.0, abs=1e-4)
    for module in model.modules():
        if isinstance(module, SigmaReparam):
            assert module.gamma.grad is not None
            assert torch.isfinite(module.gamma.grad).all()


def test_gpt2s_fused_projection_splits_along_its_output() -> None:
    model, _ = model_and_inputs("gpt2")
    sigma_reparam(model, split_fused={"c_attn": 3})
    for part in model.transformer.h[0].attn.c_attn.weight.detach().T.chunk(3):
        assert torch.linalg.matrix_norm(part, ord=2).item() == pytest.approx(1.0, abs=1e-5)


def train(model: nn.Module, data: torch.Tensor, *, each_step: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if each_step:
        iterate_each_step(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        optimizer.step()


def process(rank: int, kind: str, folder: str, each_step: bool) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{kind}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = sigma_reparam(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)))
    alone = copy.deepcopy(model)
    data = torch.randn(8, 6)
    train(alone, data, each_step=each_step)
    if kind == "ddp":
        train(
            nn.parallel.DistributedDataParallel(model, broadcast_buffers=False),
            data[4 * rank :][:4],
            each_step=each_step,
        )
        state: dict[str, Any] = model.state_dict()
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[2], model):
            fully_shard(layer)
        train(model, data[4 * rank :][:4], each_step=each_step)
        state = {
            name: value.full_tensor() if hasattr(value, "full_tensor") else value
            for name, value in model.state_dict().items()
        }
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(
            state[name], value, rtol=1e-4, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )
    dist.barrier()  # a process that leaves while another still talks to it makes that one abort
    dist.destroy_process_group()


@pytest.mark.parametrize(("kind", "each_step"), [("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_two_processes_train_as_one_does(kind: str, each_step: bool, tmp_path: Path) -> None:
    mp.spawn(process, args=(kind, str(tmp_path), each_step), nprocs=2)
