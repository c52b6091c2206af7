"""The same objectives in TRL and verl, and rollouts by other engines."""
