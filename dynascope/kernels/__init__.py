"""The tangent kernel of any model, its limit at infinite width, and what it predicts of training."""
