"""Closed-form predictions of training: one paper's formulas a file, pure functions of tensors."""
