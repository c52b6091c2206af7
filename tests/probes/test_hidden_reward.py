"""What is told of hidden rewards: by hand, and on a model under watch."""

from pathlib import Path

import pytest
import torch
import transformers

import dynascope
from dynascope.probes.hidden_reward import (
    TokenHiddenReward,
    concentration,
    decades,
    likelihood_displacement,
    token_report,
    top_overlap,
)
from dynascope.probes.views import ModelView
from dynascope.rl.hidden_reward import HiddenReward
from dynascope.rl.rollout import sample
from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, encode


def test_concentration_and_overlap_by_hand() -> None:
    thr = torch.tensor([[8.0, -1.0, 1.0, 0.0, 99.0]])
    mask = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(concentration(thr, mask, [0.25, 0.5, 1.0]), torch.tensor([0.8, 0.9, 1.0]))
    entropy = torch.tensor([[2.0, 0.0, 0.5, 1.0, 9.0]])
    assert float(top_overlap(thr, entropy, mask, 0.25)) == 1.0
    assert float(top_overlap(-thr, entropy, mask, 0.5)) == 0.5


def test_histogram_by_hand() -> None:
    thr = torch.tensor([[0.5, -20.0, 0.0, 1e9]])
    found = decades(thr, torch.ones(1, 4).bool())
    assert found[[0, 7, 9, 12]].tolist() == [0.25, 0.25, 0.25, 0.25]


def test_displacement_by_hand() -> None:
    before = torch.zeros(4, 2)
    after = torch.tensor([[1.0, 5.0], [-3.0, 0.0], [-0.5, -0.5], [2.0, 2.0]])
    mask = torch.tensor([[True, False], [True, True], [True, True], [True, True]])
    told = likelihood_displacement(
        before, after, mask, torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 1])
    )
    assert told.change.tolist() == [1.0, -1.0]
    assert told.is_lazy.tolist() == [False, True]
    none = likelihood_displacement(before, after, mask, torch.zeros(4).bool(), torch.tensor([0, 0, 1, 1]))
    assert none.change.isnan().all()
    assert not none.is_lazy.any()


def test_report_marks_what_is_dominant() -> None:
    told = HiddenReward(torch.tensor([[1.0, -0.5]]), torch.zeros(1, 2), torch.tensor([0.7]), torch.zeros(1))
    lines = token_report(["7", "+"], told).splitlines()
    assert lines[0].endswith("+" * 20 + " *")
    assert lines[1].endswith(" " + "-" * 10)


def test_overlap_of_no_tokens_is_not_a_number() -> None:
    assert bool(top_overlap(torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2).bool()).isnan())


def gpt2() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=STOP, eos_token_id=STOP
    )
    return transformers.GPT2LMHeadModel(config)


def test_prompts_that_are_all_right_dilute_nothing() -> None:
    model = gpt2().eval()
    prompts, _ = encode(["47+85=", "12+34="])
    rollout = sample(model, prompts, num_samples=4, max_new_tokens=6, stop_token=STOP, pad_token=PAD)
    correct = torch.tensor([True, False, False, False, True, True, True, True])
    mixed = rollout.group_ids == rollout.group_ids[0]
    view = ModelView(0, model, (), {}, 0.1)
    both = TokenHiddenReward(rollout, correct).measure(view)
    alone = TokenHiddenReward(rollout.select(mixed), correct[mixed]).measure(view)
    for name in ("thr/concentration", "thr/histogram", "thr/entropy_overlap", "thr/positive"):
        torch.testing.assert_close(both[name], alone[name])
    none = TokenHiddenReward(rollout.select(~mixed), correct[~mixed]).measure(view)
    assert bool(none["thr/concentration"].isnan().all())


def test_on_a_hugging_face_model_under_watch(tmp_path: Path) -> None:
    model = gpt2()
    prompts, _ = encode(["47+85=", "12+34="])
    rollout = sample(model, prompts, num_samples=4, max_new_tokens=6, stop_token=STOP, pad_token=PAD)
    correct = torch.arange(8) % 4 == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    probe = TokenHiddenReward(rollout, correct)
    ids = torch.cat([rollout.prompts, rollout.tokens], 1)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=[probe]):
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids[correct], labels=ids[correct]).loss.backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    assert record["thr/concentration"].values[-1, -1] <= 1
    assert record["thr/histogram"].values.sum(1) == pytest.approx(1)
    assert float(record["thr/displacement"].values[-1]) > 0  # trained on the right answers
    change = record["thr/log_prob"].values[-1] - record["thr/log_prob"].values[-2]
    assert float(record["thr/displacement"].values[-1]) == pytest.approx(float(change), rel=1e-4)
