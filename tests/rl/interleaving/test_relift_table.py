"""ReLIFT on a table of answers, where nothing generalises: what each way of training moves is its own doing."""

import pytest
import torch
from torch import Tensor

from dynascope.losses.demonstrations import interleaved_sft_loss
from dynascope.rl.advantages import group_z_score
from dynascope.rl.interleaving.hardest import Entry, HardestQuestionBuffer, hardest_questions

NUM_QUESTIONS, NUM_ANSWERS, BATCH, SAMPLES = 60, 50, 8, 8
GOLD = 0
STARTS = torch.tensor([4.0, 1.0, -8.0]).repeat_interleave(NUM_QUESTIONS // 3)
"""The right answer's logit: easy, medium and hardest questions."""


def trained(has_rl: bool, is_due: str, seed: int, num_steps: int = 300) -> tuple[list[float], int]:
    """Mean P(right) of easy, medium and hardest questions, and demonstrations used."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(NUM_QUESTIONS, NUM_ANSWERS)
    table[:, GOLD] = STARTS
    table.requires_grad_()
    rl, sft = (torch.optim.SGD([table], lr=4.0) for _ in range(2))
    buffer, used = HardestQuestionBuffer(BATCH), 0

    def fine_tune(questions: Tensor) -> None:
        sft.zero_grad()
        labels = torch.full((len(questions), 1), GOLD)
        interleaved_sft_loss(
            table[questions][:, None], labels, torch.ones(len(questions), 1), entropy_coef=1e-4
        ).loss.backward()
        sft.step()

    for step in range(num_steps):
        questions = torch.randperm(NUM_QUESTIONS, generator=generator)[:BATCH]
        if has_rl:
            log_probs = table[questions].log_softmax(1)
            answers = torch.multinomial(log_probs.detach().exp(), SAMPLES, replacement=True, generator=generator)
            correct = answers == GOLD
            groups = torch.arange(BATCH).repeat_interleave(SAMPLES)
            advantage = group_z_score(correct.float().flatten(), groups, std="none").view(BATCH, SAMPLES)
            rl.zero_grad()
            (-(advantage * log_probs.gather(1, answers)).mean()).backward()
            rl.step()
            hardest = hardest_questions(questions.tolist(), correct.float().mean(1))
            buffer.put([Entry(one, step=step) for one in hardest])
        if is_due == "always":
            fine_tune(questions)
            used += BATCH
        elif is_due == "relift" and buffer.ready(step):
            fine_tune(torch.tensor([int(str(one.question)) for one in buffer.pop(step)]))
            used += BATCH
    chance = table.detach().softmax(1)[:, GOLD]
    return chance.view(3, -1).mean(1).tolist(), used


@pytest.mark.parametrize("seed", range(3))
def test_rl_keeps_the_easy_and_relift_brings_the_hardest_with_few_demonstrations(seed: int) -> None:
    (easy, medium, hardest), none = trained(True, "never", seed)
    assert none == 0
    assert easy > 0.8
    assert hardest < 0.01
    (_, _, by_sft), every = trained(False, "always", seed)
    assert by_sft > 0.7
    (easy_too, medium_too, by_relift), few = trained(True, "relift", seed)
    assert easy_too > 0.8
    assert medium_too > medium  # unlucky groups send medium questions to the buffer too
    assert by_relift > 0.2
    assert few < 0.35 * every
