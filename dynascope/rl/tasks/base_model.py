"""Small base models for the studies: a Llama made from a config, taught the task by examples, trained once and kept."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynascope.rl.logits import completion_logits
from dynascope.rl.tasks.arithmetic import PAD, STOP, Arithmetic, encode


@runtime_checkable
class Lesson(Protocol):
    """What a base model can be taught: problems with a prompt and a completion, in the characters of `arithmetic`."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    def draw(self, num: int, generator: torch.Generator) -> Sequence[Any]:
        """Problems at random."""


@dataclass(frozen=True)
class BaseModel:
    """What a base model is made of and how long it is taught; more steps give a stronger start for RL.

    Raises ValueError for sizes below 1, or a width that gives no even number to each head.

    >>> BaseModel(Arithmetic((2,)), num_steps=200)
    """

    task: Lesson = Arithmetic()  # noqa: RUF009 frozen
    num_layers: int = 2
    width: int = 64
    num_heads: int = 4
    num_steps: int = 300
    batch_size: int = 128
    lr: float = 2e-3

    def __post_init__(self) -> None:
        if min(self.num_layers, self.width, self.num_heads, self.batch_size) < 1 or self.num_steps < 0:
            raise ValueError(
                f"num_layers={self.num_layers}, width={self.width}, num_heads={self.num_heads} and "
                f"batch_size={self.batch_size} must be at least 1, and num_steps={self.num_steps} not negative"
            )
        if self.width % (2 * self.num_heads):
            raise ValueError(f"width={self.width} must be a multiple of twice the {self.num_heads} heads")

    def config(self) -> Any:
        """The Llama configuration of this size."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.task.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_heads,
            max_position_embeddings=2 * self.task.max_length,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=STOP,
            tie_word_embeddings=False,
        )


def base_model(spec: BaseModel, seed: int, folder: str | Path = "runs/models") -> nn.Module:
    """The base model of a seed: from `folder` when it was trained before, else trained now and kept there.

    The file's name comes from the specification and the seed; it is written whole or not at all, so that processes side
    by side may train the same one. Needs the extra `hf`.

    >>> model = base_model(BaseModel(Arithmetic((2,)), num_steps=200), seed=0)
    """
    from transformers import LlamaForCausalLM

    content = json.dumps([type(spec.task).__name__, asdict(spec), seed], sort_keys=True)
    path = Path(folder) / f"base-{hashlib.sha256(content.encode()).hexdigest()[:12]}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlamaForCausalLM(spec.config())
    if path.is_file():
        model.load_state_dict(load_file(path))
        return model
    _teach(model, spec, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.new")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, written)
    written.replace(path)
    return model


def _teach(model: nn.Module, spec: BaseModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=spec.lr)
    model.train()
    for _ in range(spec.num_steps):
        optimizer.zero_grad()
        supervise(model, spec.task.draw(spec.batch_size, generator))
        optimizer.step()


def supervise(model: nn.Module, problems: Sequence[Any]) -> None:
    """Accumulate the gradient of `supervised_loss` of all the completions, the shorter half and the longer one apart.

    The halves are padded to their own longest, which saves most of what padding costs.

    >>> supervise(model, Arithmetic((1, 2, 3)).draw(64, generator))
    """
    by_length = sorted(problems, key=lambda one: len(one.prompt) + len(one.completion))
    num_tokens, middle = sum(len(one.completion) for one in problems), len(problems) // 2
    for half in (by_length[:middle], by_length[middle:]):
        if half:
            prompts, prompt_mask = encode([one.prompt for one in half], side="left")
            completions, mask = encode([one.completion for one in half])
            share = mask.sum() / num_tokens
            (share * supervised_loss(model, prompts, prompt_mask, completions, mask)).backward()


def supervised_loss(
    model: nn.Module,
    prompts: Int64[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    completions: Int64[Tensor, "N T"],
    mask: Bool[Tensor, "N T"],
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the completions' tokens, in nats; prompts are padded on the left, completions on the right.

    >>> supervised_loss(model, *encode(["1+2="], side="left"), *encode(["1+2=3>3$"]))
    """
    logits = completion_logits(model, prompts, prompt_mask, completions)
    by_token = nn.functional.cross_entropy(logits.mT, completions, reduction="none")
    return (by_token * mask).sum() / mask.sum()
