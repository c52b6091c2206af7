"""The distance from a teacher under watch: it falls when the policy learns from the teacher's own samples."""

import copy
from pathlib import Path

import pytest
import torch

import dynascope
from dynascope.probes.teacher import TeacherDivergence
from dynascope.rl.rollout import sample, score
from dynascope.rl.tasks.arithmetic import CHARACTERS, PAD, STOP, encode
from dynascope.rl.teachers import GAP_NAMES, TeacherScorer, exact_teacher_kl

transformers = pytest.importorskip("transformers")


def test_on_a_hugging_face_model_under_watch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(CHARACTERS), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=STOP, eos_token_id=STOP,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    teacher = copy.deepcopy(model)
    torch.nn.init.normal_(teacher.transformer.wte.weight, std=0.5)
    prompts, _ = encode(["47+85=", "12+34="])
    generator = torch.Generator().manual_seed(0)
    drawn = {"num_samples": 8, "max_new_tokens": 6, "stop_token": STOP, "pad_token": PAD, "generator": generator}
    rollout, lesson = sample(model, prompts, **drawn), sample(teacher, prompts, **drawn)
    scorer = TeacherScorer(teacher)
    with torch.no_grad():
        before = exact_teacher_kl(model, scorer, rollout)[rollout.mask].mean()
        gap = (scorer(rollout) - score(model, rollout)["log_probs"])[rollout.mask]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with dynascope.watch(model, optimizer, run=tmp_path / "run", every=1, probes=[TeacherDivergence(rollout, scorer)]):
        for _ in range(5):
            optimizer.zero_grad()
            (-(score(model, lesson)["log_probs"] * lesson.mask).sum() / lesson.mask.sum()).backward()
            optimizer.step()
    record = dynascope.open(tmp_path / "run")
    exact = record["teacher/kl_exact"].values
    assert len(exact) == 5
    assert exact[-1] < exact[0]
    first = [exact[0], record["teacher/gap_max"].values[0]]  # a look comes before the step
    assert first == pytest.approx([float(before), float(gap.abs().max())], rel=1e-3)
    shares = record["teacher/gap_histogram"]
    assert shares.gap.values.tolist() == list(GAP_NAMES)
    assert shares.values.sum(1) == pytest.approx(1)
