"""Teachers: asked in parts, listing few tokens, watched, compared exactly, and found out when they teach nothing."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynascope.rl.batch import PolicyBatch
from dynascope.rl.distillation import TeacherAdvantage, TeacherReward
from dynascope.rl.kl import KLTerm
from dynascope.rl.loop import LoopConfig, Step, train
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import grpo, kdrl, kdrl_masking_group, kdrl_masking_response
from dynascope.rl.rollout import Rollout, sample, score
from dynascope.rl.tasks.arithmetic import STOP, Arithmetic, encode
from dynascope.rl.teachers import (
    TeacherScorer,
    check_teacher,
    check_tokenizer,
    check_vocabulary,
    exact_teacher_kl,
    floored,
    gradient_cosine,
    listed,
    watch_teacher,
)


def drawn(model: Any) -> Rollout:
    prompts, mask = encode(["47+85=", "1+2="], side="left")
    return sample(
        model,
        prompts,
        mask,
        num_samples=4,
        max_new_tokens=6,
        stop_token=STOP,
        temperature=0.7,
        generator=torch.Generator().manual_seed(0),
    )


def another(model: Any) -> Any:
    teacher = copy.deepcopy(model)
    torch.manual_seed(1)
    nn.init.normal_(teacher.lm_head.weight, std=0.5)
    return teacher


def test_what_a_server_does_not_know_is_floored_and_counted() -> None:
    teacher = torch.tensor([[-torch.inf, -1.0, -torch.inf]])
    found, count = floored(teacher, -torch.ones(1, 3), torch.tensor([[True, True, False]]), lowest=-5.0)
    assert found[0, :2].tolist() == [-6.0, -1.0]
    assert int(count) == 1


def test_what_is_not_listed_is_minus_infinity() -> None:
    tokens, ids = torch.tensor([[3, 1]]), torch.tensor([[[3, 2], [2, 3]]])
    found = listed(tokens, ids, torch.tensor([[[-0.1, -3.0], [-0.2, -2.0]]]))
    assert found.tolist() == [[pytest.approx(-0.1), -torch.inf]]


def test_a_teacher_that_lists_few_tokens(tiny_llama: Any) -> None:
    rollout, teacher = drawn(tiny_llama), another(tiny_llama)
    whole = TeacherScorer(teacher)(rollout)
    torch.testing.assert_close(TeacherScorer(teacher, top_k=99)(rollout), whole)
    with torch.no_grad():
        logits = score(teacher, rollout, {"logits"})["logits"]
    rank = (logits > logits.gather(-1, rollout.tokens[..., None])).sum(-1)
    few = TeacherScorer(teacher, micro_batch=3, top_k=2)(rollout)
    is_listed = (rank < 2) & rollout.mask
    assert is_listed.any()
    assert (rollout.mask & ~is_listed).any()
    torch.testing.assert_close(few[is_listed], whole[is_listed])
    unknown = rollout.mask & ~is_listed
    torch.testing.assert_close(few[unknown], rollout.behaviour_log_probs[unknown] - 20)
    for settings in ({"top_k": 0}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            TeacherScorer(teacher, **settings)


def test_watching_the_teacher_by_hand() -> None:
    seen = PolicyBatch(
        mask=torch.tensor([[True, True], [True, False]]),
        rewards=torch.tensor([1.0, 0.0]),
        group_ids=torch.zeros(2).long(),
        behaviour_log_probs=torch.zeros(2, 2),
        teacher_log_probs=torch.tensor([[-0.2, -30.0], [3.0, 7.0]]),
        correct=torch.tensor([True, False]),
    )
    told = watch_teacher(seen)
    assert told["teacher/gap_histogram"][[0, 6, 11]].tolist() == pytest.approx([1 / 3] * 3)
    assert float(told["teacher/floored"]) == pytest.approx(1 / 3)
    expected = {"kl": 27.2 / 3, "kl_right": 15.1, "kl_wrong": -3.0, "gap_max": 30.0}
    for name, value in expected.items():
        assert float(told[f"teacher/{name}"]) == pytest.approx(value, rel=1e-5)
    assert float(told["rollout/tokens_per_right"]) == 3


def test_cosine_of_gradients_by_hand() -> None:
    layer = nn.Linear(2, 1, bias=False)
    cosine, norms = gradient_cosine(layer, [lambda: layer.weight[0, 0] * 3, lambda: layer.weight.sum()])
    assert float(cosine) == pytest.approx(2**-0.5)
    assert norms.tolist() == pytest.approx([3, 2**0.5])


def test_a_scorer_asks_in_parts_what_a_pass_says_at_once(tiny_llama: Any) -> None:
    prompts, mask = encode(["47+85=", "1+2="], side="left")
    rollout = sample(tiny_llama, prompts, mask, num_samples=4, max_new_tokens=6, stop_token=STOP, temperature=0.7)
    teacher = copy.deepcopy(tiny_llama)
    nn.init.normal_(teacher.lm_head.weight)
    with torch.no_grad():
        expected = score(teacher, rollout)["log_probs"]
    teacher.train()
    for micro_batch in (3, 64):
        found = TeacherScorer(teacher, micro_batch)(rollout)
        torch.testing.assert_close(found[rollout.mask], expected[rollout.mask], atol=1e-5, rtol=1e-4)
    assert teacher.training
    rows = torch.arange(8) < 2
    assert torch.equal(TeacherScorer(teacher)(rollout, torch.zeros_like(rows)), rollout.behaviour_log_probs)
    some = TeacherScorer(teacher)(rollout, rows)
    assert torch.equal(some[~rows], rollout.behaviour_log_probs[~rows])
    torch.testing.assert_close(some[:2][rollout.mask[:2]], expected[:2][rollout.mask[:2]], atol=1e-5, rtol=1e-4)


def test_a_padded_table_is_cut_to_the_policys_tokens(tiny_llama: Any) -> None:
    prompts, _ = encode(["47+85="])
    rollout = sample(tiny_llama, prompts, num_samples=4, max_new_tokens=6, stop_token=STOP)
    padded = copy.deepcopy(tiny_llama)
    padded.resize_token_embeddings(24)
    optimizer = torch.optim.SGD(tiny_llama.parameters())
    with pytest.raises(ValueError, match="must share"):
        train(tiny_llama, kdrl, Arithmetic(), optimizer, generator=torch.Generator(), teacher=padded)
    found = TeacherScorer(padded, vocabulary=16)(rollout)
    torch.testing.assert_close(found, rollout.behaviour_log_probs, atol=1e-5, rtol=1e-4)


def test_the_exact_divergence_is_the_mean_of_its_estimate(tiny_llama: Any) -> None:
    rollout, teacher = drawn(tiny_llama), another(tiny_llama)
    found = exact_teacher_kl(tiny_llama, TeacherScorer(teacher, micro_batch=3), rollout)
    with torch.no_grad():
        own, other = (score(one, rollout, {"logits"})["logits"].log_softmax(-1) for one in (tiny_llama, teacher))
    expected = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found, expected * rollout.mask, atol=1e-5, rtol=1e-4)
    assert float(exact_teacher_kl(tiny_llama, TeacherScorer(tiny_llama), rollout).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="a vocabulary of 12 tokens and the policy one of 16; they must share it"):
        exact_teacher_kl(tiny_llama, TeacherScorer(teacher, vocabulary=12), rollout)
    # Over all but one token of sixteen it lacks that token's part.
    least = own.exp().min(-1)
    part = least.values * (least.values.log() - other.gather(-1, least.indices[..., None])[..., 0])
    most = exact_teacher_kl(tiny_llama, TeacherScorer(teacher), rollout, top=15)
    torch.testing.assert_close(found - most, part * rollout.mask, atol=1e-5, rtol=1e-3)


def go(model: Any, objective: PolicyObjective, teacher: Any) -> list[Step]:
    steps: list[Step] = []
    train(
        model, objective, Arithmetic((1,)), torch.optim.SGD(model.parameters(), 1.0),
        LoopConfig(2, num_prompts=2, num_samples=4), generator=torch.Generator().manual_seed(0), teacher=teacher,
        look=steps.append,
    )  # fmt: skip
    return steps


@pytest.mark.parametrize("objective", [kdrl, kdrl_masking_response, kdrl_masking_group])
def test_the_loop_shows_the_teacher_what_is_kept_and_the_teacher_moves_the_policy(
    objective: PolicyObjective, tiny_llama: Any
) -> None:
    teacher = another(tiny_llama)
    before = tiny_llama.lm_head.weight.detach().clone()
    steps = go(tiny_llama, objective, teacher)
    # No answer is right here: it is the teacher alone.
    assert float((tiny_llama.lm_head.weight.detach() - before).abs().max()) > 0
    assert float(steps[0].metrics["gradient_norm"]) > 0
    assert float(steps[0].metrics["policy/kl/teacher"]) > 0


class Server:
    """A teacher that is no model here."""

    size = 16

    def __init__(self) -> None:
        self.asked: list[Tensor | None] = []

    def __call__(self, rollout: Rollout, rows: Tensor | None = None) -> Tensor:
        self.asked.append(rows)
        return rollout.behaviour_log_probs - 1.0


def test_any_callable_that_knows_log_probs_is_a_teacher(tiny_llama: Any) -> None:
    server = Server()
    (first, _) = go(tiny_llama, kdrl_masking_response, server)
    assert first.batch.correct is not None
    assert torch.equal(server.asked[0], ~first.batch.correct)
    assert float(first.metrics["policy/kl/teacher"]) > 0.1
    with pytest.raises(ValueError, match="teacher's logits"):
        go(tiny_llama, kdrl.having(kl=(KLTerm("teacher", "full"),)), server)


@pytest.mark.parametrize("kind", ["k2", "k3", "full"])
def test_a_teacher_that_is_the_policy_is_found_out_in_the_first_step(kind: str, tiny_llama: Any) -> None:
    objective = kdrl.having(kl=(KLTerm("teacher", kind, 0.1),))
    with pytest.raises(ValueError, match="distillation does nothing"):
        go(tiny_llama, objective, copy.deepcopy(tiny_llama))
    assert len(go(tiny_llama, objective, another(tiny_llama))) == 2
    assert len(go(tiny_llama, objective.having(kl=(KLTerm("teacher", kind, 0.0),)), copy.deepcopy(tiny_llama))) == 2


@pytest.mark.parametrize(
    "slots", [{"adjust": (TeacherAdvantage(0.1),)}, {"advantage": TeacherReward(0.1)}], ids=["advantage", "reward"]
)
def test_so_is_one_that_shapes_advantages(slots: dict[str, Any], tiny_llama: Any) -> None:
    objective = grpo.having(**slots)
    assert objective.is_shaped_by_teacher
    with pytest.raises(ValueError, match="distillation does nothing"):
        go(tiny_llama, objective, copy.deepcopy(tiny_llama))
    assert len(go(tiny_llama, objective, another(tiny_llama))) == 2


def test_the_check_waits_for_a_token_that_is_kept() -> None:
    log_probs, mask = -torch.rand(4, 3), torch.ones(4, 3).bool()
    seen = PolicyBatch(
        mask=mask,
        rewards=torch.ones(4),
        group_ids=torch.zeros(4).long(),
        log_probs=log_probs,
        teacher_log_probs=log_probs,
        correct=torch.ones(4).bool(),
    )
    assert check_teacher(kdrl_masking_response, seen) is False
    assert check_teacher(grpo, seen) is True
    wrong = seen.having(correct=torch.zeros(4).bool())
    with pytest.raises(ValueError, match="distillation does nothing"):
        check_teacher(kdrl_masking_response, wrong)
    one = log_probs + torch.tensor([0.01, 0, 0])
    assert check_teacher(kdrl_masking_response, wrong.having(teacher_log_probs=one)) is True
    with pytest.raises(ValueError, match="needs teacher_log_probs"):
        check_teacher(kdrl, wrong.having(teacher_log_probs=None))


def test_what_is_no_teacher_is_told(tiny_llama: Any) -> None:
    with pytest.raises(ValueError, match="a teacher is a model, or knows log-probabilities as a Teacher does, not str"):
        check_vocabulary(tiny_llama, "gpt2")


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_chunk_of_tokens_at_a_time_says_the_same(tiny_llama: Any, top_k: int | None) -> None:
    rollout, teacher = drawn(tiny_llama), another(tiny_llama)
    whole = TeacherScorer(teacher, top_k=top_k)(rollout)
    for chunk in (1, 5, 1000):
        told = TeacherScorer(teacher, micro_batch=3, top_k=top_k, chunk=chunk)(rollout)
        torch.testing.assert_close(told, whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        TeacherScorer(teacher, chunk=0)


@pytest.mark.parametrize("chunk", [None, 5])
def test_whole_distributions_of_a_padded_teacher_are_cut(tiny_llama: Any, chunk: int | None) -> None:
    rollout, teacher = drawn(tiny_llama), another(tiny_llama)
    size = len(teacher.lm_head.weight)
    expected = score(teacher, rollout, {"logits"})["logits"]
    teacher.resize_token_embeddings(size + 8)
    with torch.no_grad():
        teacher.lm_head.weight[size:] = 3.0
    told = TeacherScorer(teacher.train(), micro_batch=3, vocabulary=size, chunk=chunk).logits(rollout)
    assert told.shape == (*rollout.tokens.shape, size)
    assert teacher.training
    torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)


def test_another_tokenizer_of_the_same_size_is_found_out(character_tokenizer: Any) -> None:
    class Turned:
        def get_vocab(self) -> dict[str, int]:
            known = character_tokenizer.get_vocab()
            return {**known, "1": known["2"], "2": known["1"]}

    check_tokenizer(character_tokenizer, character_tokenizer)
    check_tokenizer(None, Turned())
    with pytest.raises(ValueError, match="name 2 tokens differently: '1' is number 3 for the teacher and 2"):
        check_tokenizer(character_tokenizer, Turned())
