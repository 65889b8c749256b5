"""Several teachers at the price of one: `python examples/recipes/several_teachers.py`.

With weights w_i that sum to 1, sum_i w_i KL(p_i, q) and KL(sum_i w_i p_i, q) differ by a number that the
student is not in (how far the teachers are from their mixture), so that their gradients are the same. The
mixture can be kept in place of the teachers' logits, and a step then takes one pass, whatever their number;
even where it is made anew for each step it costs less than the passes of the sum. Only KL and the cross
entropy allow for that.
"""

import time

import torch

from kdkernels import fused_kd_loss


def mixture(teachers: list[torch.Tensor], weights: list[float], temperature: float) -> torch.Tensor:
    """Logits whose softmax at the temperature is the mixture of the teachers' softmaxes at it."""
    total, tempered, softmax = torch.zeros_like(teachers[0]), *torch.empty(2, *teachers[0].shape)
    for logits, weight in zip(teachers, weights, strict=True):
        torch.div(logits, temperature, out=tempered)
        total.add_(torch.softmax(tempered, -1, out=softmax), alpha=weight)
    return total.log_().mul_(temperature)


def gradient(loss, logits: torch.Tensor) -> tuple[float, torch.Tensor, float]:
    """(value, gradient, seconds) of a loss of the student's logits."""
    logits = logits.detach().requires_grad_()
    start = time.perf_counter()
    value = loss(logits)
    value.backward()
    return value.item(), logits.grad, time.perf_counter() - start


def main(tokens: int = 256, vocab: int = 8192, count: int = 4, temperature: float = 2.0) -> dict[str, float]:
    """How far the two gradients are apart, and what a step of each takes."""
    torch.manual_seed(0)
    student = torch.randn(tokens, vocab)
    teachers = [2 * torch.randn(tokens, vocab) for _ in range(count)]
    weights = [(i + 1) * 2 / (count * (count + 1)) for i in range(count)]
    options = dict(temperature=temperature, t_squared=True)

    def of_each(logits: torch.Tensor) -> torch.Tensor:
        pairs = zip(teachers, weights, strict=True)
        return sum(fused_kd_loss(logits, x, soft_weight=weight, **options) for x, weight in pairs)

    mixture(teachers, weights, temperature)
    start = time.perf_counter()
    mixed = mixture(teachers, weights, temperature)
    making = time.perf_counter() - start

    def of_mixture(logits: torch.Tensor) -> torch.Tensor:
        return fused_kd_loss(logits, mixed, **options)

    def fastest(loss):
        return min((gradient(loss, student) for _ in range(4)), key=lambda found: found[2])

    (value, right, seconds), (other, mine, fewer) = fastest(of_each), fastest(of_mixture)
    return dict(
        apart=float((mine - right).norm() / right.norm()),
        values_apart=value - other,
        seconds_of_each=seconds,
        seconds_of_mixture=fewer,
        seconds_of_making=making,
    )


if __name__ == "__main__":
    print(main())
