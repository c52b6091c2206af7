"""Parts: parameter groups, optimizers and schedules."""

from dynascope.optim.param_groups import attention_decoder_param_groups

__all__ = ["attention_decoder_param_groups"]
