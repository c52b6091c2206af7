"""Rollouts by other engines than our own sampler: Hugging Face's `generate`, and vLLM."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from dynascope.rl.rollout import Rollout


@torch.no_grad()
def generate_rollout(
    model: nn.Module,
    prompts: Int[Tensor, "prompts P"],
    prompt_mask: Bool[Tensor, "prompts P"] | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_token: int,
    pad_token: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    weights_version: int = 0,
    **settings: Any,
) -> Rollout:
    """As `sample`, by the model's own `generate`, so that all its settings are there: `top_p`, `logits_processor`, caches.

    `sampling_log_probs` are those after every setting, `behaviour_log_probs` the policy's own at this temperature; both keep
    logits of all steps for a while, (T, N, vocabulary). `generate` draws from PyTorch's global generator, which is seeded
    from `generator` and put back.

    >>> rollout = generate_rollout(model, prompts, num_samples=8, max_new_tokens=64, stop_token=2, top_p=0.95)
    """
    seen = torch.ones_like(prompts).bool() if prompt_mask is None else prompt_mask
    seed = int(torch.randint(2**62, (), generator=generator))
    was_training = model.training
    model.eval()
    devices = [prompts.device] if prompts.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            told = model.generate(  # type: ignore[operator]
                input_ids=prompts,
                attention_mask=seen.long(),
                do_sample=temperature > 0,
                num_return_sequences=num_samples,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop_token,
                pad_token_id=pad_token,
                output_logits=True,
                output_scores=True,
                return_dict_in_generate=True,
                **({"temperature": temperature, "top_k": 0} if temperature > 0 else {}),
                **settings,
            )
    finally:
        model.train(was_training)
    tokens = told.sequences[:, prompts.shape[1] :]
    behaviour = torch.stack(told.logits, 1).float() / (temperature or 1.0)
    sampling = torch.stack(told.scores, 1).float()
    mask = until_stop(tokens, stop_token)
    return Rollout.of_prompts(
        prompts,
        prompt_mask,
        num_samples,
        tokens=tokens.masked_fill(~mask, pad_token),
        mask=mask,
        behaviour_log_probs=_chosen(behaviour, tokens),
        sampling_log_probs=_chosen(sampling, tokens),
        is_truncated=(tokens != stop_token).all(1),
        max_length=max_new_tokens,
        temperature=temperature,
        weights_version=weights_version,
    )


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


def vllm_rollout(
    llm: Any,
    prompts: Int[Tensor, "prompts P"],
    prompt_mask: Bool[Tensor, "prompts P"] | None = None,
    *,
    num_samples: int,
    max_new_tokens: int,
    stop_token: int,
    pad_token: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    weights_version: int = 0,
    **settings: Any,
) -> Rollout:
    """As `sample`, by a `vllm.LLM`, which holds weights of its own; needs the extra `vllm`. `settings` go to SamplingParams.

    vLLM tells log-probabilities of what it drew from if it was started with `logprobs_mode="processed_logprobs"`; its
    default tells them at temperature 1. They serve as both `behaviour_log_probs` and `sampling_log_probs`; where its kernels'
    rounding matters, score the rollout with the policy instead.

    Raises ValueError without vLLM, or for a temperature other than 1 with log-probabilities that do not know of it.

    >>> llm = vllm.LLM("my-policy", logprobs_mode="processed_logprobs")
    >>> rollout = vllm_rollout(llm, prompts, num_samples=8, max_new_tokens=512, stop_token=tokenizer.eos_token_id)
    """
    try:
        from vllm import SamplingParams
    except ImportError:
        raise ValueError("rollouts by vLLM need it: pip install 'dynascope[vllm]'") from None
    mode = llm.llm_engine.model_config.logprobs_mode
    if temperature != 1.0 and mode != "processed_logprobs":
        raise ValueError(
            f"vLLM tells {mode} here, which do not know temperature={temperature}; "
            "start it with logprobs_mode='processed_logprobs'"
        )
    seen = torch.ones_like(prompts).bool() if prompt_mask is None else prompt_mask
    params = SamplingParams(
        n=num_samples,
        max_tokens=max_new_tokens,
        temperature=temperature,
        logprobs=0,
        stop_token_ids=[stop_token],
        detokenize=False,
        seed=int(torch.randint(2**31, (), generator=generator)),
        **settings,
    )
    asked = [{"prompt_token_ids": row[known].tolist()} for row, known in zip(prompts, seen, strict=True)]
    answers = [answer for request in llm.generate(asked, params, use_tqdm=False) for answer in request.outputs]
    tokens = _padded([list(one.token_ids) for one in answers], pad_token, torch.long)
    chosen = [[step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in answers]
    log_probs = _padded(chosen, 0.0, torch.float32)
    tokens, log_probs = tokens.to(prompts.device), log_probs.to(prompts.device)
    mask = until_stop(tokens, stop_token)
    return Rollout.of_prompts(
        prompts,
        prompt_mask,
        num_samples,
        tokens=tokens.masked_fill(~mask, pad_token),
        mask=mask,
        behaviour_log_probs=log_probs,
        sampling_log_probs=log_probs,
        is_truncated=(tokens != stop_token).all(1),
        max_length=max_new_tokens,
        temperature=temperature,
        weights_version=weights_version,
    )


def _padded(rows: Sequence[Sequence[float | int]], pad: float | int, dtype: torch.dtype) -> Tensor:
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=dtype)


def until_stop(tokens: Int[Tensor, "N T"], stop_token: int) -> Bool[Tensor, "N T"]:
    """Which tokens come before a row's first stop token, or are it.

    >>> until_stop(torch.tensor([[5, 1, 5]]), stop_token=1)
    tensor([[ True,  True, False]])
    """
    stops = (tokens == stop_token).int()
    return stops.cumsum(1) - stops == 0
