"""Two bandits in which the effects of format rewards and of difficulty are nothing but arithmetic."""

import torch
from torch import Tensor

from dynascope.rl.advantages import group_z_score
from dynascope.rl.tasks.reward_rules import RewardRule


def format_bandit(
    rule: RewardRule,
    num_steps: int,
    generator: torch.Generator,
    *,
    correct: float = 0.15,
    formatted: float = 0.1,
    num_groups: int = 32,
    group_size: int = 8,
    lr: float = 0.3,
) -> Tensor:
    """P(right) before each step and after the last: an answer is right and is formatted by two independent coins.

    Their logits climb the policy gradient with advantages standardised in groups.
    """
    logits = torch.logit(torch.tensor([correct, formatted]))
    groups = torch.arange(num_groups).repeat_interleave(group_size)
    course = [logits[0].sigmoid()]
    for _ in range(num_steps):
        chance = logits.sigmoid()
        is_it = torch.rand(len(groups), 2, generator=generator) < chance
        advantage = group_z_score(rule(is_it[:, 0], is_it[:, 1]), groups, eps=1e-6)
        logits = logits + lr * (advantage[:, None] * (is_it.float() - chance)).mean(0)
        course.append(logits[0].sigmoid())
    return torch.stack(course)


def difficulty_bandit(
    skill: float,
    difficulties: Tensor,
    num_steps: int,
    generator: torch.Generator,
    *,
    num_groups: int = 32,
    group_size: int = 8,
    lr: float = 0.5,
) -> Tensor:
    """Skill after training on questions of one difficulty d, for each: P(right) = sigmoid(skill − d), (difficulties,)."""
    skills = torch.full_like(difficulties, skill)
    num = num_groups * group_size
    groups = torch.arange(num_groups * len(difficulties)).repeat_interleave(group_size)
    for _ in range(num_steps):
        chance = (skills - difficulties).sigmoid()
        is_right = (torch.rand(len(difficulties), num, generator=generator) < chance[:, None]).float()
        advantage = group_z_score(is_right.flatten(), groups, eps=1e-6).view(len(difficulties), num)
        skills = skills + lr * (advantage * (is_right - chance[:, None])).mean(1)
    return skills
