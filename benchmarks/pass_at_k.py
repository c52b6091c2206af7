"""Pass@K of many prompts against a loop over problems: `python benchmarks/pass_at_k.py`.

The loop is the usual evaluator's: one NumPy product a problem and K. Values are compared first, with exact binomials too.
Then how many calls of a judge CoT-Pass@K needs, of the three a chain that it is defined by.
"""

import argparse
from collections.abc import Sequence
from math import comb

import numpy as np
import torch
from interleaved import medians, tell

from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble
from dynascope.rl.reasoning.judges import Solution
from dynascope.rl.reasoning.pass_at_k import pass_at_k

KS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def loop(n: np.ndarray, c: np.ndarray) -> np.ndarray:
    def one(n: int, c: int, k: int) -> float:
        return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))

    return np.array([[one(int(size), int(right), k) for k in KS] for size, right in zip(n, c, strict=True)])


def calls(num: int) -> None:
    """A noisy judge over chains of which 0.4 have a right answer, 0.7 of these are right, and a fifth are repetitions."""
    random = np.random.default_rng(0)
    chains = random.integers(int(0.8 * num), size=num)
    solutions = [Solution("?", str(one)) for one in chains]
    answers = torch.from_numpy(random.random(num) < 0.4)

    def judge(asked: Sequence[Solution]) -> list[bool]:
        return [bool(random.random() < (0.8 if int(one.reasoning) % 10 < 7 else 0.1)) for one in asked]

    print()
    for name, settings in (
        ("every verdict of every chain", {"only_if_answer_correct": False, "early_stop": False}),
        ("right answers alone", {"early_stop": False}),
        ("and no more once the rule is settled", {}),
    ):
        judgement = JudgeEnsemble(judge, **settings)(solutions, answers)  # type: ignore[arg-type]
        print(f"{name:46} {judgement.num_calls:6} calls, {judgement.num_calls / (3 * num):.2f} of three a chain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--loop-prompts", type=int, default=5_000, help="the loop is timed on these, and scaled up")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    for name, n in [
        ("1024 answers each", np.full(options.prompts, 1024)),
        ("512 to 1024 answers", random.integers(512, 1025, options.prompts)),
    ]:
        c = (n * random.random(options.prompts) ** 3).astype(np.int64)
        few = slice(0, options.loop_prompts)
        found = pass_at_k(n[few], c[few], KS).numpy()
        exact = [[1 - comb(int(a - b), k) / comb(int(a), k) for k in KS] for a, b in zip(n[:50], c[:50], strict=True)]
        print(f"{name}: largest difference from the loop {np.abs(found - loop(n[few], c[few])).max():.1e}", end=", ")
        print(f"from exact binomials {np.abs(found[:50] - exact).max():.1e}")
        sizes, right = torch.from_numpy(n), torch.from_numpy(c)
        seconds = medians(
            {
                "pass_at_k": lambda sizes=sizes, right=right: pass_at_k(sizes, right, KS),  # type: ignore[misc]
                "loop over problems": lambda n=n, c=c, few=few: loop(n[few], c[few]),  # type: ignore[misc]
            },
            options.turns,
        )
        seconds["loop over problems"] *= options.prompts / options.loop_prompts
        tell(seconds, "pass_at_k")
    calls(10_000)


if __name__ == "__main__":
    main()
