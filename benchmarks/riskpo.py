"""RiskPO's estimator on whole tensors against loops over responses: `python benchmarks/riskpo.py`.

512 questions of 10 responses, as in the released recipe. The loops gather scores in dictionaries, question by question and
bundle by bundle, as estimators in trainers do. Advantages are compared first.
"""

import argparse
from collections import defaultdict

import torch
from interleaved import medians, tell
from torch import Tensor

from dynascope.rl import PolicyBatch, preset
from dynascope.rl.advantages import GroupZScore
from dynascope.rl.risk.advantage import RiskAdvantage

QUESTIONS, RESPONSES, SIZE = 512, 10, 5


def in_loops(rewards: Tensor, group_ids: Tensor, low: float, high: float, omega: float = 0.5) -> Tensor:
    """Bundles of responses in their own order, scored and given advantages one by one."""
    rows = defaultdict(list)
    for row in range(len(rewards)):
        rows[int(group_ids[row])].append(row)
    advantage = torch.zeros_like(rewards)
    questions = sorted(rows)
    for first in range(0, len(questions), SIZE):
        members = questions[first : first + SIZE]
        for place in range(RESPONSES):
            score = sum(float(rewards[rows[one][place]]) for one in members) * SIZE / len(members)
            weight = max(score - low, 0) - max(score - high, 0) + low - high
            for one in members:
                advantage[rows[one][place]] = weight - (1 + omega) * max(low - score, 0)
    return advantage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    num = QUESTIONS * RESPONSES
    rewards = (torch.rand(num) < torch.rand(QUESTIONS).repeat_interleave(RESPONSES)).float()
    batch = PolicyBatch(
        mask=torch.ones(num, 1).bool(),
        rewards=rewards,
        group_ids=torch.arange(QUESTIONS).repeat_interleave(RESPONSES),
    )
    estimator = RiskAdvantage(permutes=False)
    ours = estimator(batch)
    low, high = (float(estimator.tracker.value(level)) for level in (0.2, 0.8))
    print(
        f"largest difference {float((ours - in_loops(rewards, batch.group_ids, low, high)).abs().max()):.1e}, {num} responses"
    )
    own = preset("riskpo")
    tell(
        medians(
            {
                "RiskPO, tensors": lambda: own.advantages(batch),
                "RiskPO, loops": lambda: in_loops(rewards, batch.group_ids, low, high),
                "GRPO, tensors": lambda: GroupZScore()(batch),
            },
            options.turns,
        ),
        "RiskPO, tensors",
    )


if __name__ == "__main__":
    main()
