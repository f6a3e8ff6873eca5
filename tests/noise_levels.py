"""Two objectives asked of one noised sample: where each has the same level of noise, and what data it then predicts."""

from torch import Tensor

from cinemesh.model.config import SIGMA_MIN
from cinemesh.model.objective import ObjectiveName
from cinemesh.model.paths import DIFFUSION


def at_level(objective: ObjectiveName, signal: float) -> tuple[float, float]:
    """(t, scale): where x_t, times ``scale``, is ``signal`` x1 + (1 - signal^2)^(1/2) x0.

    Raises ValueError where an objective has no such level.
    """
    if objective == "flow-matching":
        noise = (1 - signal**2) ** 0.5
        scale = noise + (1 - SIGMA_MIN) * signal
        return signal / scale, scale
    n = int((DIFFUSION.signal - signal).abs().argmin())
    if abs(DIFFUSION.signal[n].item() - signal) > 1e-9:
        raise ValueError(f"no step of noise leaves a signal of {signal}")
    return 1 - n / DIFFUSION.objective.steps, 1.0


def data_of(objective: ObjectiveName, x_t: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
    """The x1 that a prediction at x_t [B, ...] stands for; ``t`` is [B].

    X_1 = (1 - sigma_min) X_t + (1 - (1 - sigma_min) t) V of flow matching, alpha x_t - sigma v of v-prediction.
    """
    wide = (-1, *[1] * (x_t.dim() - 1))
    if objective == "flow-matching":
        return (1 - SIGMA_MIN) * x_t + (1 - (1 - SIGMA_MIN) * t.to(x_t.dtype).view(wide)) * predicted
    alpha, sigma = (level.to(x_t.dtype).view(wide) for level in DIFFUSION.levels(t))
    return alpha * x_t - sigma * predicted
