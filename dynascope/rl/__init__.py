"""Parts: policy optimization. Rollouts, rewards, and objectives out of the same slots."""
