"""Published settings as TRL's own, so that a run starts from what worked (needs the extra `trl`)."""

from typing import Any


def simplerl_zoo_config(model_size: float | int, **changes: Any) -> Any:
    """The settings of zero RL on open base models (2503.18892, appendix B.5) as a `GRPOConfig`; `model_size` in billions.

    1,024 prompts × 8 completions of up to 8,192 tokens, four optimizer steps on them, temperature 1, clip 0.2, every token of a
    step weighing the same, and a KL coefficient of 1e-4 (1e-3 above 14B). The learning rate is that of the authors' program.
    TRL counts optimizer steps, so that its about 100 rollouts are 400. `changes` are TRL's settings; on one device keep
    `per_device_train_batch_size` and `gradient_accumulation_steps` so that their product is a minibatch of 256 prompts, or name
    a smaller run.

    Raises ValueError for a size that is not positive.

    >>> simplerl_zoo_config(0.5, output_dir="runs/zoo")
    """
    from trl import GRPOConfig

    if model_size <= 0:
        raise ValueError(f"model_size={model_size} is in billions of parameters: it must be positive")
    recipe: dict[str, Any] = {
        "num_generations": 8,
        "max_completion_length": 8192,
        "temperature": 1.0,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 256,
        "steps_per_generation": 1024,
        "num_iterations": 1,
        "epsilon": 0.2,
        "beta": 1e-3 if model_size > 14 else 1e-4,
        "loss_type": "dapo",
        "scale_rewards": "group",
        "learning_rate": 5e-7,
        "lr_scheduler_type": "constant",
        "max_steps": 400,
        "mask_truncated_completions": False,
    }
    return GRPOConfig(**{**recipe, **changes})
