"""Any policy objective inside TRL's GRPOTrainer: generation, accelerate, PEFT and vLLM are TRL's, the objective ours."""

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.trainer.utils import is_async_callable

from dynascope.rl.advantages import NothingToCompareError
from dynascope.rl.batch import PolicyBatch, per_token
from dynascope.rl.distillation import solved
from dynascope.rl.objective import PolicyObjective
from dynascope.rl.presets import preset
from dynascope.rl.rollout import Rollout, score
from dynascope.rl.tasks.rewards import guarded
from dynascope.rl.teachers import Teacher, TeacherScorer, check_teacher, check_vocabulary

_STATE = "policy_objective.pt"
_KNOWN_OF_ROLLOUTS = {"correct", "is_solved", "is_truncated", "is_demonstration"}
_OF_IMAGES = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
"""What TRL's own pass through the model takes beside tokens, where a batch has it."""


class PolicyObjectiveTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with another objective; needs the extra `trl`.

    `objective` is a `PolicyObjective` or a preset's name. Of TRL's settings those of the objective (loss_type, epsilon,
    scale_rewards, importance_sampling_level, entropy_coef, delta, top_entropy_quantile, off_policy_mask_threshold) no longer
    count; an objective against the start model wants `beta` above 0 in the settings, so that TRL keeps that model, and
    weighs it by its own coefficient. TRL's weights against the drift of vLLM are applied.

    `correctness` names the reward function whose positive values mean a right answer, for slots and terms that go by right and
    wrong; without it positive sums do, which a reward of shape or length would change.

    Completions of which every reward function said None have no advantage, and are nobody's baseline; nor has one that is alone
    in its group. Evaluation asks a copy of the objective, so that estimators with a state learn of training alone. A reward
    function that raises, or takes longer than `reward_time_limit` seconds (None for no limit), ends training in one line that
    names it; models and coroutines as rewards are left to TRL.

    Hidden states, where a slot needs them, take a forward pass of the whole model a rollout: not for sharded parameters, and
    like teachers not with images.

    `process` changes the distribution that is drawn from in training, as in `rl.rollout.sample`: HAPO's `AdaptiveTemperature`, or
    any other logits processor. Only Hugging Face's `generate` takes it.

    A `teacher` (a model with the policy's tokenizer, a `TeacherScorer` or another `Teacher`) is asked once a rollout, for the
    completions that a term keeps. Checkpoints hold the state of slots that have one, and resuming puts it back.

    Raises ValueError when the objective needs what TRL does not give: logits or values, or a teacher that is not given or has
    another vocabulary; for a `correctness` that names no reward function, and for a term with `norm="kept"` whose `keep` reads
    what only the loss knows; for a `process` with vLLM or continuous batching; where no completion of a rollout has a reward;
    in the first loss whose teacher teaches nothing (`check_teacher`), and in one that is not finite.

    >>> PolicyObjectiveTrainer(model, reward_funcs=reward, args=args, train_dataset=prompts, objective="dapo").train()
    """

    gives: ClassVar[frozenset[str]] = frozenset(
        {
            "teacher_log_probs", "is_solved", "is_truncated", "behaviour_log_probs", "ref_log_probs", "entropy", "correct",
            "tokens",
        }
    )  # fmt: skip
    """Fields of a batch that are there whatever the slots."""
    reward_funcs: list[Any]

    def __init__(
        self,
        *args: Any,
        objective: PolicyObjective | str,
        teacher: nn.Module | Teacher | None = None,
        process: Callable[[Tensor, Tensor], Tensor] | None = None,
        reward_time_limit: float | None = None,
        correctness: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if correctness is not None and correctness not in self.reward_func_names:
            names = ", ".join(self.reward_func_names)
            raise ValueError(f"there is no reward function {correctness!r}; there are {names}")
        self._correctness = correctness
        if process is not None and (self.use_vllm or self.use_transformers_continuous_batching):
            raise ValueError("process= changes what generate() draws from: leave vLLM and continuous batching off")
        self.process = process
        self.reward_funcs = [
            one if isinstance(one, nn.Module) or is_async_callable(one) else guarded(one, time_limit=reward_time_limit)
            for one in self.reward_funcs
        ]
        self.objective = preset(objective) if isinstance(objective, str) else objective
        needs = self.objective.rollout_needs | self.objective.loss_needs
        self.teacher = TeacherScorer(teacher) if isinstance(teacher, nn.Module) else teacher
        if isinstance(self.teacher, TeacherScorer):
            self.teacher.model.to(self.accelerator.device)
        if self.teacher is not None:
            check_vocabulary(self.accelerator.unwrap_model(self.model), self.teacher)
        if "teacher_log_probs" in needs and self.teacher is None:
            raise ValueError("this objective needs teacher_log_probs: give teacher=")
        once = {"hidden", "unembedding"}
        # What vLLM drew from, unless TRL weighs it out itself: the two weights would be one too many.
        drawn = self.use_vllm and not self.vllm_importance_sampling_correction
        gives = self.gives | (frozenset({"sampling_log_probs"}) if drawn else frozenset())
        missing = needs - gives - once | (self.objective.loss_needs & once)
        if missing == {"sampling_log_probs"}:
            raise ValueError(
                "TRL tells the distribution that was drawn from with use_vllm=True, and weighs it out itself unless "
                "vllm_importance_sampling_correction=False: leave SamplingCorrection out, or set both"
            )
        if "is_demonstration" in missing:
            raise ValueError(
                "this objective wants demonstrations in its groups: use rl.interleaving.trl.MixedPolicyTrainer"
            )
        if missing:
            raise ValueError(f"TRL does not give {', '.join(sorted(missing))}, which this objective needs")
        for term in self.objective.kl:
            unknown = term.also_needs - _KNOWN_OF_ROLLOUTS
            if term.norm == "kept" and unknown:
                raise ValueError(
                    f"norm='kept' counts the kept tokens of a rollout before its losses, which know {', '.join(unknown)}: "
                    "leave norm='all'"
                )
        if "ref_log_probs" in needs and self.beta == 0.0:
            raise ValueError("this objective compares with the start model: set beta=1e-3 (any value) in GRPOConfig")
        self._rewards = torch.zeros(0)
        self._is_scored = self._is_correct = self._is_correctness_known = torch.zeros(0).bool()
        self._is_taught = False
        self._is_demonstration: Tensor | None = None

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self.objective.state_dict()
        if state and self.args.should_save:
            torch.save(state, self._checkpoint_folder(trial) / _STATE)

    def _checkpoint_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (Path(checkpoint) / _STATE).is_file():
            self.objective.load_state_dict(torch.load(Path(checkpoint) / _STATE, weights_only=True))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self.process is None or not self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        model.generate = partial(model.generate, logits_processor=[self.process])  # TRL has no way to hand one on
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            del model.generate

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        by_function: Tensor = super()._calculate_rewards(*args, **kwargs)
        weights = self.reward_weights.to(by_function.device)
        self._rewards = (by_function * weights).nansum(1)
        self._is_scored = self._is_correctness_known = ~by_function.isnan().all(1)
        self._is_correct = self._rewards > 0
        if self._correctness is not None:
            told = by_function[:, self.reward_func_names.index(self._correctness)]
            self._is_correct, self._is_correctness_known = told > 0, ~told.isnan()
        if not bool(self._is_scored.any()):
            names = ", ".join(self.reward_func_names)
            raise ValueError(f"no completion has a reward: {names} said None or NaN of each")
        return by_function

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = self._mask(output)
        needs = self.objective.rollout_needs
        behaviour, entropy = output.get("old_per_token_logps"), None
        if "entropy" in needs or (behaviour is None and "behaviour_log_probs" in needs):
            now, entropy = self._log_probs_and_entropy(output)
            behaviour = now if behaviour is None else behaviour
        if self._is_demonstration is not None:
            output["is_demonstration"] = self._is_demonstration
        local: dict[str, Tensor | None] = {
            "mask": mask,
            "is_truncated": self._is_truncated(output),
            "is_demonstration": self._is_demonstration,
            "behaviour_log_probs": behaviour,
            "entropy": entropy,
            "ref_log_probs": output.get("ref_per_token_logps"),
            "sampling_log_probs": output.get("sampling_per_token_logps"),
        }
        num = self.num_generations if self.model.training else self.num_generations_eval
        rewards, correct = self._rewards.to(mask.device), self._is_correct.to(mask.device)
        groups = torch.arange(len(rewards), device=mask.device) // num
        start = self.accelerator.process_index * len(mask)
        own = slice(start, start + len(mask))
        is_solved = solved(correct, groups)
        if self.teacher is not None and "teacher_log_probs" in needs | self.objective.loss_needs:
            mine = PolicyBatch(
                mask=mask,
                rewards=rewards[own],
                group_ids=groups[own],
                correct=correct[own],
                is_solved=is_solved[own],
            )
            rows = self.objective.kept_by_teacher(mine)
            local["teacher_log_probs"] = output["teacher_log_probs"] = self.teacher(self._rollout(output), rows)
        unembedding = None
        if not needs.isdisjoint({"hidden", "unembedding", "tokens"}):
            local["tokens"] = output["completion_ids"]
        if not needs.isdisjoint({"hidden", "unembedding"}):
            local["hidden"], unembedding = self._hidden(output)
        # Estimators see the whole rollout, as TRL's own advantage does; every rank keeps its slice.
        everyone: dict[str, Any] = {name: self._of_all(value) for name, value in local.items() if value is not None}
        batch = PolicyBatch(
            rewards=rewards,
            group_ids=groups,
            correct=correct,
            is_solved=is_solved,
            max_length=self.max_completion_length,
            temperature=self.temperature,
            step=self.state.global_step,
            unembedding=unembedding,
            **everyone,
        )
        objective = self._asked
        advantage = self._advantages(objective, batch)
        mode = "train" if self.model.training else "eval"
        for name, value in objective.rollout_metrics.items():
            self._metrics[mode][name].append(value.item())
        advantage = advantage[own] if advantage.ndim == 1 else advantage[own, : mask.shape[1]]
        output |= {"advantages": advantage, "rewards": rewards[own], "group_ids": groups[own]}
        output |= {"is_solved": is_solved[own], "correct": correct[own]}
        kept = objective.num_kept(batch)
        output |= {f"num_kept/{place}": one for place, one in enumerate(kept) if one is not None}
        return output

    @property
    def _asked(self) -> PolicyObjective:
        return self.objective if self.model.training else copy.deepcopy(self.objective)

    def _num_at_once(self) -> int:
        """Completions of one pass through the model: as many as a step's, whatever a rollout has."""
        args = self.args
        return int(args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size)

    @torch.no_grad()
    def _hidden(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Hidden states of this process's completions, and the unembedding."""
        model, rollout = self.accelerator.unwrap_model(self.model), self._rollout(output)
        parts = [
            score(model, rollout.select(rows), {"hidden", "unembedding"})
            for rows in torch.arange(len(rollout), device=rollout.tokens.device).split(self._num_at_once())
        ]
        return torch.cat([part["hidden"] for part in parts]), parts[0]["unembedding"]

    def _of_all(self, local: Tensor) -> Tensor:
        """Rows of every process; collectives take no bool."""
        numbers = local.long() if local.dtype == torch.bool else local
        whole: Tensor = self.accelerator.gather(self.accelerator.pad_across_processes(numbers, dim=1))
        return whole.to(local.dtype)

    def _advantages(self, objective: PolicyObjective, batch: PolicyBatch) -> Tensor:
        """Of a whole rollout; 0 of completions that no reward function said anything of, and where TRL masked every token."""
        scored = self._is_scored.to(batch.mask.device) & batch.mask.any()
        if not bool(scored.any()):
            return torch.zeros_like(batch.rewards)
        try:
            own = objective.advantages(batch if bool(scored.all()) else batch.select(scored))
        except NothingToCompareError:  # evaluation with one completion a prompt, or rewards of no more than one
            return torch.zeros_like(batch.rewards)
        whole = own.new_zeros((len(batch), *own.shape[1:]))
        whole[scored] = own
        return whole

    def _rollout(self, output: dict[str, Any]) -> Rollout:
        """This process's completions in our own form, without what only sampling knows."""
        if "pixel_values" in output:
            raise ValueError("hidden states and teachers are asked without images, which these prompts have")
        mask = self._mask(output)
        unknown = torch.zeros(mask.shape, device=mask.device)
        behaviour = output.get("old_per_token_logps")
        return Rollout(
            prompts=output["prompt_ids"],
            prompt_mask=output["prompt_mask"].bool(),
            tokens=output["completion_ids"],
            mask=mask,
            behaviour_log_probs=unknown if behaviour is None else behaviour,
            sampling_log_probs=unknown,
            is_truncated=mask.new_zeros(len(mask)),
            group_ids=torch.zeros_like(output["completion_ids"][:, 0]),
            max_length=self.max_completion_length,
            temperature=self.temperature,
            weights_version=self.state.global_step,
        )

    @torch.no_grad()
    def _log_probs_and_entropy(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        seen = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        width = output["completion_ids"].shape[1]
        told = self._get_per_token_logps_and_entropies(
            self.model, ids, seen, width, self._num_at_once(), compute_entropy=True, **_images_of(output)
        )
        return told[0], told[1]

    def _is_truncated(self, inputs: dict[str, Any]) -> Tensor:
        """TRL's own rule: the last token is neither an end nor padding."""
        last = (inputs["completion_mask"].sum(1, keepdim=True) - 1).clamp(min=0)
        ends = torch.tensor([*self.eos_token_ids, self._tokenizer.pad_token_id], device=last.device)
        return ~torch.isin(inputs["completion_ids"].gather(1, last)[:, 0], ends)

    def _mask(self, inputs: dict[str, Any]) -> Tensor:
        mask: Tensor = inputs["completion_mask"]
        return (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        width = inputs["completion_ids"].shape[1]
        log_probs, entropy, experts = self._get_per_token_logps_and_entropies(
            model, ids, seen, width, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled, **_images_of(inputs)
        )
        mask = self._mask(inputs)
        is_training = self.model.training
        steps = self.current_gradient_accumulation_steps if is_training else 1
        # TRL counts tokens over all ranks and over the whole generation batch, of which this step has its share.
        share = steps / (self.args.steps_per_generation if is_training else 1) / self.accelerator.num_processes
        batch = PolicyBatch(
            mask=mask,
            rewards=inputs["rewards"],
            group_ids=inputs["group_ids"],
            advantage=self._weighed(inputs),
            log_probs=log_probs,
            behaviour_log_probs=inputs.get("old_per_token_logps"),
            ref_log_probs=inputs.get("ref_per_token_logps"),
            teacher_log_probs=inputs.get("teacher_log_probs"),
            is_solved=inputs["is_solved"],
            is_truncated=self._is_truncated(inputs),
            is_demonstration=inputs.get("is_demonstration"),
            entropy=entropy,
            correct=inputs["correct"],
            max_length=self.max_completion_length,
            num_tokens=inputs["num_items_in_batch"].clamp(min=1) * share,
            num_completions=len(mask) * steps,
            num_kept=tuple(
                None if (kept := inputs.get(f"num_kept/{place}")) is None else kept * share
                for place in range(len(self.objective.kl))
            ),
            step=self.state.global_step,
        )
        loss, metrics = self._asked.loss(batch)
        self._is_taught = self._is_taught or check_teacher(self.objective, batch)
        mode = "train" if is_training else "eval"
        names, values = list(metrics), torch.stack([value.float() for value in metrics.values()])
        told = dict(zip(names, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))
        if not math.isfinite(told["policy_loss"]):
            raise ValueError(
                f"step {self.state.global_step}: the loss is not finite; a lower learning rate or pre_clip=(1e-3, 1e3) "
                "keeps ratios sane"
            )
        for name, value in told.items():
            self._metrics[mode][f"policy/{name}"].append(value)
        return loss + self.router_aux_loss_coef * experts / steps if self.aux_loss_enabled else loss

    def _weighed(self, inputs: dict[str, Any]) -> Tensor:
        """Advantages, times TRL's weights against what vLLM's log-probabilities are off by."""
        advantage: Tensor = inputs["advantages"]
        weights = inputs.get("importance_sampling_ratio")
        return advantage if weights is None else per_token(advantage) * weights * self._mask(inputs)


def _images_of(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in _OF_IMAGES if name in inputs}
