"""SDE solvers: the flow with a Langevin correction, at any rate gamma(t).

    dZ = velocity dt + gamma w sigma score dt + √(2 gamma w sigma) dW,        w = alpha' sigma - alpha sigma'

has the path's marginals at every time for any gamma(t) >= 0: gamma = 0 is the ODE, gamma = 1/alpha the reverse SDE of
diffusion models. kappa = alpha gamma is the same rate counted per unit of log-SNR: it does not depend on the path.
Every stochastic sampler here is this equation, by a choice of the rate and of how a step is made:

| how                                       | where             | names                                             |
|---|---|---|
| Euler's step and a Langevin step          | here              | langevin, euler_maruyama                          |
| noise mixed into natural Euler's          | `mixing`          | ddpm, ancestral, stochastic_euler, noise_refresh  |
| an ODE step and the forward kernel back   | `overshoot`       | overshoot, churn, restart                         |
| the exponential integral, noise in it     | `sde_exponential` | sde_dpmpp_2m, seeds                               |
| Langevin steps at a fixed time            | `correctors`      | predictor_corrector, annealed_langevin            |

`rates` has the exponent of a step and the translations between their knobs.

Over a step from t to s the score's pull on the noise, gamma w (s - t)/sigma = r, is taken as 1 - exp(-r), which is r
for small steps and can never overshoot: large rates stay stable at few steps, with the same limit. The step that
lands on the data adds no noise.

Source: Hu, Liao, Liu, Liu: Flow to diffusion: Langevin is a guardrail (2024), https://rectifiedflow.github.io
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fluvial.solvers.rates import Rate, Stochastic, check_rate, positive, rate_at
from fluvial.solvers.rows import At, Row


def _euler_with_noise(at: At, gamma: float) -> Row:
    """One Euler-Maruyama step at the constant rate gamma; gamma = 0 gives Euler's row exactly."""
    estimate = at.ask(at.x, at.t)
    if at.lands:
        return estimate.data
    h = at.s - at.t
    flow = at.x + h * estimate.velocity
    if gamma == 0.0:
        return flow
    sigma = at.start.sigma
    pull = -math.expm1(-gamma * at.start.wronskian * h / sigma)
    # w sigma score = -w noise, so the drift takes `pull` of the state's noise away, and as much variance comes back.
    return flow - (pull * sigma) * estimate.noise + (sigma * math.sqrt(2.0 * pull)) * at.randn()


@dataclass(frozen=True)
class Langevin(Stochastic):
    """The Langevin-corrected flow with gamma a number or a function of t; gamma = 0 is `Euler`, bit for bit.

    Args:
        gamma: >= 0; finite at both ends of the path. 0.5 is gentle; beyond 5 an imperfect model over-concentrates.
    """

    gamma: Rate = 0.5

    def __post_init__(self) -> None:
        check_rate("gamma", self.gamma)

    @property
    def stochastic(self) -> bool:
        return positive(self.gamma)

    def step(self, at: At) -> Row:
        return _euler_with_noise(at, rate_at("gamma", self.gamma, at.t))


@dataclass(frozen=True)
class EulerMaruyama(Stochastic):
    """The reverse SDE at rate kappa = alpha gamma: 1 is the time reversal of the noising SDE, 0 is `Euler`.

    Where alpha = 0 (pure noise) the state is already stationary, and that step is a plain Euler step.

    Source: Song et al.: Score-based generative modeling through SDEs (2021), https://arxiv.org/abs/2011.13456, eq. 6
    """

    kappa: Rate = 1.0

    def __post_init__(self) -> None:
        check_rate("kappa", self.kappa)

    @property
    def stochastic(self) -> bool:
        return positive(self.kappa)

    def step(self, at: At) -> Row:
        kappa = rate_at("kappa", self.kappa, at.t)
        return _euler_with_noise(at, kappa / at.start.alpha if at.start.alpha else 0.0)
