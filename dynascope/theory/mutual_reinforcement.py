"""Why sinks grow and their values shrink: the gradient flow of one dormant head in closed form and as an ODE (2410.13835).

One layer of attention beside a bigram that is known already. A query of token v sees the sink with logit α_v and `context`
other keys with logit 0. The sink's value is β, that of the others on average ξ̄ (the leak), both in the space of logits, so

    o_v = a_v β + (1 − a_v) ξ̄   with   a_v = e^α_v / (e^α_v + context),

and the loss is Σ_v w_v KL(p_v ‖ softmax(log p_v + o_v)) over the tokens v that call for nothing (2410.13835, section 3.2).
All that the head gives is a disturbance: it is best parked on the sink, and the sink best empty.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.integrate import solve_ivp


@dataclass(frozen=True)
class DormantHead:
    """The setting of the theory: bigram laws p_v, weights w_v of the queries, leak ξ̄, and the number of other keys.

    `transitions` has positive rows that sum to one. `weights` are frequencies of the queries that call for nothing; a
    trigger's is 0.

    Raises ValueError for laws with zeros or wrong sums, negative weights, or no other key.

    >>> head = DormantHead(P, weights=pi, leak=pi * xi, context=10.0)
    """

    transitions: Float[np.ndarray, "tokens tokens"]
    weights: Float[np.ndarray, " tokens"]
    leak: Float[np.ndarray, " tokens"]
    context: float

    def __post_init__(self) -> None:
        if (self.transitions <= 0).any() or not np.allclose(self.transitions.sum(1), 1):
            raise ValueError("every row of transitions must be a law of positive probabilities; mix in a uniform one")
        if (self.weights < 0).any() or self.context <= 0:
            raise ValueError("weights must not be negative, and context must be positive")

    def growth(self) -> Float[np.ndarray, " tokens"]:
        """c_v = w_v context² Var_{p_v}(ξ̄): how fast a sink logit grows, dα_v/dt = c_v e^(−2α_v), where β is constant.

        To leading order for large α_v. Derived from the second order of the Kullback-Leibler divergence.
        """
        mean = self.transitions @ self.leak
        variance = self.transitions @ self.leak**2 - mean**2
        return np.asarray(self.weights * self.context**2 * variance)

    def to_sink(self, alpha: Float[np.ndarray, "*times tokens"]) -> Float[np.ndarray, "*times tokens"]:
        """a_v: the share of attention that the sink receives."""
        return np.asarray(1 / (1 + self.context * np.exp(-alpha)))

    def loss(self, alpha: Float[np.ndarray, " tokens"], beta: Float[np.ndarray, " tokens"]) -> float:
        """Σ_v w_v KL(p_v ‖ softmax(log p_v + o_v)), in nats."""
        output = self._output(alpha, beta)
        # log Σ p e^o − Σ p o, with o shifted by its mean under p, which the softmax does not see.
        output = output - (self.transitions * output).sum(1, keepdims=True)
        return float(self.weights @ np.log((self.transitions * np.exp(output)).sum(1)))

    def gradients(
        self, alpha: Float[np.ndarray, " tokens"], beta: Float[np.ndarray, " tokens"]
    ) -> tuple[Float[np.ndarray, " tokens"], Float[np.ndarray, " tokens"]]:
        """Of the loss, with respect to the sink logits and the sink's value."""
        share = self.to_sink(alpha)
        output = self._output(alpha, beta)
        tilted = self.transitions * np.exp(output - output.max(1, keepdims=True))
        error = tilted / tilted.sum(1, keepdims=True) - self.transitions
        to_alpha = self.weights * share * (1 - share) * (error @ (beta - self.leak))
        return np.asarray(to_alpha), np.asarray((self.weights * share) @ error)

    def _output(self, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
        share = self.to_sink(alpha)[:, None]
        return np.asarray(share * beta + (1 - share) * self.leak)


@dataclass(frozen=True)
class ReinforcementFlow:
    """A solution of the flow at the times asked for."""

    times: Float[np.ndarray, " times"]
    alpha: Float[np.ndarray, "times tokens"]
    """Sink logit of each query token."""
    beta: Float[np.ndarray, "times tokens"]
    """The sink's value, in the space of logits."""
    loss: Float[np.ndarray, " times"]

    def value_norm(self) -> Float[np.ndarray, " times"]:
        """Norm of the sink's value without its mean, which no softmax sees."""
        return np.asarray(np.linalg.norm(self.beta - self.beta.mean(1, keepdims=True), axis=1))


def mutual_reinforcement_flow(
    head: DormantHead,
    alpha0: Any,
    beta0: Any,
    times: Any,
    *,
    trains_alpha: bool = True,
    trains_beta: bool = True,
    rtol: float = 1e-9,
) -> ReinforcementFlow:
    """Gradient flow of the sink logits and the sink's value, together or one of them alone, at ascending times.

    `alpha0` and `beta0` are numbers or vectors over tokens. Raises RuntimeError when the solver gives up.
    Source: the dynamics of 2410.13835, Theorem 2.

    >>> flow = mutual_reinforcement_flow(head, 0.0, 0.0, np.logspace(-1, 4, 50), trains_beta=False)
    >>> flow.alpha[-1]  # grows as half the log of time
    """
    times = np.asarray(times, float)
    size = len(head.leak)
    start = np.concatenate([np.broadcast_to(np.asarray(one, float), size) for one in (alpha0, beta0)])

    def velocity(_: float, state: np.ndarray) -> np.ndarray:
        to_alpha, to_beta = head.gradients(state[:size], state[size:])
        return -np.concatenate([trains_alpha * to_alpha, trains_beta * to_beta])

    solved = solve_ivp(
        velocity, (0.0, float(times[-1])), start, t_eval=times, rtol=rtol, atol=1e-12, method="LSODA", max_step=np.inf
    )
    if not solved.success:
        raise RuntimeError(f"the flow could not be solved: {solved.message}")
    alpha, beta = solved.y[:size].T, solved.y[size:].T
    losses = np.array([head.loss(one, other) for one, other in zip(alpha, beta, strict=True)])
    return ReinforcementFlow(times, alpha, beta, losses)


def sink_logit(times: Any, alpha0: Any, growth: Any) -> Float[np.ndarray, "..."]:
    """α(t) = ½ log(e^(2α₀) + 2 c t), the solution of dα/dt = c e^(−2α): half the log of time, late.

    Source: 2410.13835, Theorem 2 (its rate), with the constant derived here; c is `DormantHead.growth`.

    >>> float(sink_logit(1.0, 0.0, 1.0))  # ½ log 3
    0.5493061443340549
    """
    return np.asarray(0.5 * np.log(np.exp(2 * np.asarray(alpha0, float)) + 2 * np.asarray(growth) * np.asarray(times)))


def stationary_value(head: DormantHead, alpha: float, constant: float = 0.0) -> Float[np.ndarray, " tokens"]:
    """β = c·1 − context e^(−α) ξ̄: the sink's value that cancels the leak, when all sink logits are α.

    With equal logits every such pair (α, β) is stationary, and the loss there is 0. Source: 2410.13835, Theorem 2.

    >>> head.gradients(np.full(tokens, 3.0), stationary_value(head, 3.0))  # zeros
    """
    return np.asarray(constant - head.context * np.exp(-alpha) * head.leak)
