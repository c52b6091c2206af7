"""Rollouts by other engines than our own sampler: Hugging Face's `generate`, and vLLM."""

from collections.abc import Callable, Sequence
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
    from `generator` and put back. Of the model's own generation config top_k, top_p, min_p and the repetition penalty do not
    count unless `settings` say so. A completion also ends at `stop_strings`, which want `tokenizer`, and where a criterion of
    `stopping_criteria` says so; those that ran into the limit are truncated.

    Raises ValueError for `stop_strings` without `tokenizer`.

    >>> rollout = generate_rollout(model, prompts, num_samples=8, max_new_tokens=64, stop_token=2, top_p=0.95)
    """
    seen = torch.ones_like(prompts).bool() if prompt_mask is None else prompt_mask
    seed = int(torch.randint(2**62, (), generator=generator))
    criteria = [*settings.pop("stopping_criteria", ())]
    if "stop_strings" in settings:
        if "tokenizer" not in settings:
            raise ValueError("stop_strings are looked for in what tokens say: give tokenizer= too")
        from transformers import StopStringCriteria

        criteria.append(StopStringCriteria(settings.pop("tokenizer"), settings.pop("stop_strings")))
    ends = _Ends(stop_token, criteria)
    unchanged = {"top_k": 0, "top_p": 1.0, "min_p": None} if temperature > 0 else {}
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
                stopping_criteria=[ends],
                **({"temperature": temperature} if temperature > 0 else {}),
                **{"repetition_penalty": 1.0, **unchanged, **settings},
            )
    finally:
        model.train(was_training)
    tokens = told.sequences[:, prompts.shape[1] :]
    behaviour = torch.stack(told.logits, 1).float() / (temperature or 1.0)
    sampling = torch.stack(told.scores, 1).float()
    mask, is_truncated = ends.of(tokens)
    return Rollout.of_prompts(
        prompts,
        prompt_mask,
        num_samples,
        tokens=tokens.masked_fill(~mask, pad_token),
        mask=mask,
        behaviour_log_probs=_chosen(behaviour, tokens),
        sampling_log_probs=_chosen(sampling, tokens),
        is_truncated=is_truncated,
        max_length=max_new_tokens,
        temperature=temperature,
        weights_version=weights_version,
    )


class _Ends:
    """A stopping criterion that remembers which token ended each completion: padding behind it may be any token."""

    def __init__(self, stop_token: int, others: Sequence[Callable[..., Tensor]]) -> None:
        self._stop, self._others, self._count = stop_token, others, 0
        self._lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        is_end = input_ids[:, -1] == self._stop
        for other in self._others:
            is_end = is_end | other(input_ids, scores, **more)
        self._count += 1
        known = torch.zeros_like(input_ids[:, 0]) if self._lengths is None else self._lengths
        self._lengths = known.where((known > 0) | ~is_end, self._count)
        return is_end

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The mask of completions (N, T), and which of them never ended."""
        assert self._lengths is not None
        width, is_truncated = tokens.shape[1], self._lengths == 0
        lengths = self._lengths.masked_fill(is_truncated, width)
        return torch.arange(width, device=tokens.device) < lengths[:, None], is_truncated


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

    Completions are as long as vLLM's, whatever ended them: another end token, `stop` strings, or a limit, of which its finish
    reason tells.

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
        seed=int(torch.randint(2**31, (), generator=generator)),
        **{"detokenize": "stop" in settings, **settings},
    )
    asked = [{"prompt_token_ids": row[known].tolist()} for row, known in zip(prompts, seen, strict=True)]
    answers = [answer for request in llm.generate(asked, params, use_tqdm=False) for answer in request.outputs]
    tokens = _padded([list(one.token_ids) for one in answers], pad_token, torch.long)
    chosen = [[step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in answers]
    log_probs = _padded(chosen, 0.0, torch.float32)
    tokens, log_probs = tokens.to(prompts.device), log_probs.to(prompts.device)
    lengths = torch.tensor([len(one.token_ids) for one in answers], device=tokens.device)
    mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    return Rollout.of_prompts(
        prompts,
        prompt_mask,
        num_samples,
        tokens=tokens.masked_fill(~mask, pad_token),
        mask=mask,
        behaviour_log_probs=log_probs,
        sampling_log_probs=log_probs,
        is_truncated=torch.tensor([one.finish_reason == "length" for one in answers], device=tokens.device),
        max_length=max_new_tokens,
        temperature=temperature,
        weights_version=weights_version,
    )


def _padded(rows: Sequence[Sequence[float | int]], pad: float | int, dtype: torch.dtype) -> Tensor:
    width = max(1, *map(len, rows))
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], dtype=dtype)
