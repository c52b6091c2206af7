"""Rollouts by other engines are rollouts like ours."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dynascope.rl.adapters.engines import generate_rollout, vllm_rollout
from dynascope.rl.rollout import score
from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP

PROMPTS = torch.tensor([[0, 3, 4], [5, 6, 7]])
SEEN = torch.tensor([[False, True, True], [True, True, True]])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_generate_remembers_what_the_policy_says(tiny_llama: Any, temperature: float) -> None:
    rollout = generate_rollout(
        tiny_llama.train(), PROMPTS, SEEN, num_samples=3, max_new_tokens=6, stop_token=STOP, temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert len(rollout) == 6
    assert rollout.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert tiny_llama.training
    with torch.no_grad():
        now = score(tiny_llama, rollout)["log_probs"] * rollout.mask
    assert torch.allclose(now, rollout.behaviour_log_probs, atol=1e-5)
    assert torch.allclose(rollout.sampling_log_probs, rollout.behaviour_log_probs, atol=1e-5)
    for row, mask, is_truncated in zip(rollout.tokens, rollout.mask, rollout.is_truncated, strict=True):
        assert bool(row[mask][-1] == STOP) is not bool(is_truncated)
        assert not (row[mask][:-1] == STOP).any()


def test_generates_own_settings_change_what_is_drawn_from_and_not_the_policy(tiny_llama: Any) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    rollouts = [
        generate_rollout(
            tiny_llama, PROMPTS, SEEN, num_samples=2, max_new_tokens=5, stop_token=STOP, top_p=0.3,
            generator=torch.Generator().manual_seed(1),
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    drift = rollouts[0].sampling_log_probs - rollouts[0].behaviour_log_probs
    assert (drift[rollouts[0].mask] > 0).all()


def test_generate_ends_where_strings_or_criteria_say_so(tiny_llama: Any) -> None:
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    vocabulary = {
        one: place for place, one in enumerate([*CHARACTERS, *"abcdef"])
    }  # letters that HF's criterion writes
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    character_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    digits = "0123"
    settings: dict[str, Any] = {"num_samples": 8, "max_new_tokens": 6, "stop_token": STOP, "pad_token": PAD}
    rollout = generate_rollout(
        tiny_llama, PROMPTS, SEEN, stop_strings=list(digits), tokenizer=character_tokenizer,
        generator=torch.Generator().manual_seed(0), **settings,
    )  # fmt: skip
    assert 0 < int(rollout.is_truncated.sum()) < len(rollout)
    for row, mask, is_truncated in zip(rollout.tokens, rollout.mask, rollout.is_truncated, strict=True):
        said = [character_tokenizer.convert_ids_to_tokens(int(one)) for one in row[mask]]
        is_end = [one in digits + "$" for one in said]
        assert not any(is_end[:-1])
        assert is_end[-1] is not bool(is_truncated)
    first = generate_rollout(
        tiny_llama, PROMPTS, SEEN, stopping_criteria=[lambda ids, scores, **_: ids[:, -1] >= 0], **settings
    )
    assert first.lengths.tolist() == [1] * 16
    assert not first.is_truncated.any()
    with pytest.raises(ValueError, match="give tokenizer= too"):
        generate_rollout(tiny_llama, PROMPTS, SEEN, stop_strings=["1"], **settings)


def test_a_models_own_generation_config_does_not_change_what_is_drawn_from(tiny_llama: Any) -> None:
    for name, value in {"top_k": 3, "top_p": 0.2, "min_p": 0.9, "repetition_penalty": 3.0}.items():
        setattr(tiny_llama.generation_config, name, value)
    settings: dict[str, Any] = {"num_samples": 4, "max_new_tokens": 5, "stop_token": STOP}
    rollout = generate_rollout(tiny_llama, PROMPTS, SEEN, generator=torch.Generator().manual_seed(0), **settings)
    torch.testing.assert_close(rollout.sampling_log_probs, rollout.behaviour_log_probs)
    few = generate_rollout(tiny_llama, PROMPTS, SEEN, top_k=5, generator=torch.Generator().manual_seed(0), **settings)
    assert (few.sampling_log_probs - few.behaviour_log_probs)[few.mask].min() > 0


def test_generate_without_temperature_is_greedy(tiny_llama: Any) -> None:
    settings: dict[str, Any] = {"num_samples": 1, "max_new_tokens": 4, "stop_token": STOP}
    rollout = generate_rollout(tiny_llama, PROMPTS, SEEN, temperature=0.0, **settings)
    again = generate_rollout(tiny_llama, PROMPTS, SEEN, temperature=0.0, **settings)
    assert torch.equal(rollout.tokens, again.tokens)


@dataclass
class Params:
    """What vLLM's SamplingParams takes of what we give it."""

    n: int
    max_tokens: int
    temperature: float
    logprobs: int
    stop_token_ids: list[int]
    detokenize: bool
    seed: int
    top_p: float = 1.0
    stop: list[str] | None = None


class FakeLLM:
    """Answers in the shape of vLLM's: the second answer of each prompt ends at the limit, the others stop."""

    def __init__(self, mode: str, end: int = STOP) -> None:
        self.end = end
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(logprobs_mode=mode))
        self.asked: list[Any] = []

    def generate(self, prompts: list[dict[str, list[int]]], params: Params, use_tqdm: bool) -> list[Any]:
        self.asked.append((prompts, params))
        answers = []
        for number, _ in enumerate(prompts):
            outputs = []
            for place in range(params.n):
                ids = [3 + number] * params.max_tokens if place == 1 else [3 + number, self.end]
                log_probs = [{token: SimpleNamespace(logprob=-0.5 - step)} for step, token in enumerate(ids)]
                reason = "length" if place == 1 else "stop"
                outputs.append(SimpleNamespace(token_ids=tuple(ids), logprobs=log_probs, finish_reason=reason))
            answers.append(SimpleNamespace(outputs=outputs))
        return answers


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.SamplingParams = Params  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


@pytest.mark.usefixtures("vllm")
def test_answers_of_vllm_become_a_rollout() -> None:
    llm = FakeLLM("processed_logprobs")
    rollout = vllm_rollout(
        llm, PROMPTS, SEEN, num_samples=2, max_new_tokens=4, stop_token=STOP, pad_token=PAD, temperature=0.8, top_p=0.9
    )
    prompts, params = llm.asked[0]
    assert prompts == [{"prompt_token_ids": [3, 4]}, {"prompt_token_ids": [5, 6, 7]}]
    assert (params.n, params.max_tokens, params.temperature, params.top_p) == (2, 4, 0.8, 0.9)
    assert rollout.tokens.tolist() == [[3, STOP, 0, 0], [3, 3, 3, 3], [4, STOP, 0, 0], [4, 4, 4, 4]]
    assert rollout.is_truncated.tolist() == [False, True, False, True]
    assert rollout.behaviour_log_probs[0].tolist() == [-0.5, -1.5, 0.0, 0.0]
    assert rollout.temperature == 0.8


@pytest.mark.usefixtures("vllm")
def test_what_ends_otherwise_has_no_padding_in_it() -> None:
    """A token that is not the stop token, as other ends and stop strings have it; even where it says what padding says."""
    for end in (7, PAD):
        llm = FakeLLM("raw_logprobs", end)
        rollout = vllm_rollout(llm, PROMPTS, SEEN, num_samples=2, max_new_tokens=4, stop_token=STOP, stop=["so"])
        assert rollout.mask.sum(1).tolist() == [2, 4, 2, 4]
        assert rollout.is_truncated.tolist() == [False, True, False, True]
        assert llm.asked[0][1].detokenize  # else vLLM would find no string


@pytest.mark.usefixtures("vllm")
def test_log_probabilities_at_another_temperature_are_refused() -> None:
    with pytest.raises(ValueError, match="processed_logprobs"):
        vllm_rollout(
            FakeLLM("raw_logprobs"), PROMPTS, SEEN, num_samples=1, max_new_tokens=2, stop_token=STOP, temperature=0.5
        )


def test_vllm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"dynascope\[vllm\]"):
        vllm_rollout(FakeLLM("raw_logprobs"), PROMPTS, num_samples=1, max_new_tokens=2, stop_token=STOP)
