"""What the papers claim, one test per statement, through the public functions on fp64 logits.

Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network" (2015); Chen et al., "Exploring the
connection between knowledge distillation and logits matching"; Grätzer, "Neural networks and knowledge
distillation"; the distillation loss of the Machine Learning Research Flashcards. Right-hand sides are written
out here from the papers, in plain torch, and share nothing with the library. Where a printed statement is
wrong, what is true is tested, together with how far off the printed one is.

p is the teacher, of logits v and their mean c_t; q the student, of logits z and their mean c_s; K classes.
The logits drawn have means that differ, so that a wrong sign in front of them shows.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch
from rows import BACKENDS, make_rows
from torch import Tensor, nn

from kdkernels import fused_kd_loss, logit_matching_loss, tempered_log_softmax

ORDERS = [0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 2.0, 5.0, 30.0, math.inf]
TEMPERATURES = [0.5, 1.0, 4.0, 20.0]
close = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-15)


@pytest.fixture(params=["cpu", "eager"])
def backend(request):
    return request.param


def draw(rows: int = 4, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(z, v), fp64, of standard deviation 2, with means near -0.6 and 0.9."""
    g = torch.Generator().manual_seed(seed)
    z, v = torch.randn(2, rows, classes, generator=g, dtype=torch.float64) * 2
    return z - 0.6, v + 0.9


def value_and_grad(z: Tensor, v: Tensor, *args, loss=fused_kd_loss, **options) -> tuple[Tensor, Tensor]:
    """The loss of each row (all of them with another reduction) and its gradient in z."""
    z = z.clone().requires_grad_()
    value = loss(z, v, *args, **{"reduction": "none"} | options)
    value.sum().backward()
    return value.detach(), z.grad


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def centred(x: Tensor) -> Tensor:
    return x - mean(x)


def softmax(x: Tensor, T: float = 1.0) -> Tensor:
    e = torch.exp(x / T)
    return e / e.sum(-1, keepdim=True)


def cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    return -(p * q.log()).sum(-1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def renyi(p: Tensor, q: Tensor, order: float) -> Tensor:
    """Grätzer, eq. 1.16, and the extended orders 1.27, 1.31 and 1.33."""
    if order == 0:
        return -(q * (p > 0)).sum(-1).log()
    if order == 1:
        return torch.where(p > 0, p * (p / q).log(), 0.0).sum(-1)
    if math.isinf(order):
        return (p / q).log().amax(-1)
    return (p**order * q ** (1 - order)).sum(-1).log() / (order - 1)


def without(v: Tensor, gone: slice = slice(0, 3)) -> Tensor:
    v = v.clone()
    v[:, gone] = -math.inf
    return v


# ---------------------------------------------------------------- Hinton, Vinyals and Dean


@pytest.mark.parametrize("T", TEMPERATURES)
def test_hinton_eq_1(backend, T):
    """q_i = exp(z_i/T) / sum_j exp(z_j/T); also Grätzer eq. 1.3 and Chen et al. eq. 1."""
    z, _ = draw()
    close(tempered_log_softmax(z, T, backend=backend).exp(), softmax(z, T))


def test_hinton_eq_1_softens(backend):
    """A higher T gives a softer distribution: the entropy H grows at the rate Var_q(z) / T^3, up to log K."""
    z, _ = draw(rows=1)
    step = 1e-5

    def entropy(T: float) -> Tensor:
        log_q = tempered_log_softmax(z, T, backend=backend)
        return -(log_q.exp() * log_q).sum()

    for T in (0.5, 1.0, 2.0, 8.0, 30.0):
        q = softmax(z, T)
        variance = (q * (z - (q * z).sum()) ** 2).sum()
        slope = (entropy(T * (1 + step)) - entropy(T * (1 - step))) / (2 * T * step)
        close(slope, variance / T**3, rtol=1e-6)
    close(entropy(math.inf), torch.tensor(math.log(z.shape[-1]), dtype=torch.float64))


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("divergence", ["cross_entropy", "kl"])
def test_hinton_eq_2(backend, divergence, T):
    """dC/dz_i = (q_i - p_i)/T; also Grätzer eq. 1.14 and Chen et al. eq. A.3."""
    z, v = draw()
    _, grad = value_and_grad(z, v, divergence=divergence, temperature=T, backend=backend)
    close(grad, (softmax(z, T) - softmax(v, T)) / T)


def hinton_eq_3(z: Tensor, v: Tensor, T: float) -> Tensor:
    N = z.shape[-1]
    return (
        (1 + z / T) / (N + z.sum(-1, keepdim=True) / T) - (1 + v / T) / (N + v.sum(-1, keepdim=True) / T)
    ) / T


def square_term(z: Tensor, v: Tensor, T: float) -> Tensor:
    """What e^x = 1 + x + x^2/2 adds to T^2 times eq. 3, to first order in 1/T."""
    return (centred(z**2) - centred(v**2)) / (2 * z.shape[-1] * T)


@pytest.mark.parametrize("T", [1e2, 1e3, 1e4])
def test_hinton_eq_3(backend, T):
    """The error of eq. 3, relative to the gradient, falls like 1/T: it is the square term of the exponential,
    up to O(1/T)."""
    z, v = draw()
    _, grad = value_and_grad(z, v, divergence="cross_entropy", temperature=T, backend=backend)
    error, predicted = T**2 * (grad - hinton_eq_3(z, v, T)), square_term(z, v, T)
    assert (error - predicted).norm() <= 6 / T * predicted.norm()


@pytest.mark.parametrize("T", [1e2, 1e3, 1e4])
def test_hinton_eq_4(backend, T):
    """With zero-mean logits eq. 3 is eq. 4, (z_i - v_i)/(N T^2), and as good. With others eq. 4 is off by the
    means at every T."""
    z, v = draw()
    N = z.shape[-1]
    z0, v0 = centred(z), centred(v)
    predicted = square_term(z0, v0, T)
    close(hinton_eq_3(z0, v0, T), (z0 - v0) / (N * T**2), rtol=1e-9)
    for a, b, offset in ((z0, v0, 0.0), (z, v, -(mean(z) - mean(v)) / N)):
        _, grad = value_and_grad(a, b, divergence="cross_entropy", temperature=T, backend=backend)
        error = T**2 * grad - (a - b) / N
        assert (error - offset - predicted).norm() <= 6 / T * predicted.norm()


def test_hinton_eq_5(backend):
    """At T = inf, distillation of zero-mean logits is sum_i (z_i - v_i)^2 / 2, divided by N."""
    z, v = (centred(x) for x in draw())
    N = z.shape[-1]
    loss, grad = value_and_grad(z, v, temperature=math.inf, t_squared=True, backend=backend)
    close(loss * N, ((z - v) ** 2 / 2).sum(-1))
    close(grad * N, z - v)


# ---------------------------------------------------------------- the flashcard


@pytest.mark.parametrize("T", TEMPERATURES)
def test_flashcard_loss(backend, T):
    """alpha H(y, softmax(z)) + beta H(softmax(v/T), softmax(z/T)): two free weights, no T^2, hard labels at T
    = 1."""
    z, v = draw()
    alpha, beta = 0.3, 1.7
    y = torch.tensor([3, 0, 9, 5])
    one_hot = nn.functional.one_hot(y, z.shape[-1]).double()
    options = {
        "divergence": "cross_entropy",
        "temperature": T,
        "soft_weight": beta,
        "hard_weight": alpha,
        "backend": backend,
    }
    loss, grad = value_and_grad(z, v, y, **options)
    close(
        loss, alpha * cross_entropy(one_hot, softmax(z)) + beta * cross_entropy(softmax(v, T), softmax(z, T))
    )
    close(grad, alpha * (softmax(z) - one_hot) + beta / T * (softmax(z, T) - softmax(v, T)))


# ---------------------------------------------------------------- Chen et al.


def test_chen_eq_2(backend):
    """L_LM = sum (z_i - v_i)^2 / (2K), gradient (z_i - v_i)/K."""
    z, v = draw()
    K = z.shape[-1]
    loss, grad = value_and_grad(z, v, loss=logit_matching_loss, backend=backend)
    close(loss, ((z - v) ** 2).sum(-1) / (2 * K))
    close(grad, (z - v) / K)


@pytest.mark.parametrize("T", TEMPERATURES)
def test_chen_eq_4_steps_1_and_2(backend, T):
    """d(T^2 L_KD)/dz_i = T (q_i - p_i), with q and p from eq. 1."""
    z, v = draw()
    _, grad = value_and_grad(z, v, temperature=T, t_squared=True, backend=backend)
    q, p = (tempered_log_softmax(x, T, backend=backend).exp() for x in (z, v))
    close(grad, T * (q - p), atol=1e-14)
    ez, ev = torch.exp(z / T), torch.exp(v / T)
    close(grad, T * (ez / ez.sum(-1, keepdim=True) - ev / ev.sum(-1, keepdim=True)), atol=1e-14)


def chen_step_3(z: Tensor, v: Tensor, sign: int) -> Tensor:
    K = z.shape[-1]
    return (K * (z - v) + sign * (z - v).sum(-1, keepdim=True)) / K**2


def test_chen_eq_4_step_3_sign_corrected(backend):
    """T^2 L_KD's gradient tends to (K (z_i - v_i) - sum_j (z_j - v_j))/K^2, like 1/T; it is printed with a
    plus."""
    z, v = draw()
    limit = chen_step_3(z, v, -1)
    for T in (1e2, 1e3, 1e4, 1e5):
        _, grad = value_and_grad(z, v, temperature=T, t_squared=True, backend=backend)
        predicted = square_term(centred(z), centred(v), T)
        assert (grad - limit - predicted).norm() <= 6 / T * predicted.norm() + 1e-14 * T
    _, grad = value_and_grad(z, v, temperature=math.inf, t_squared=True, backend=backend)
    close(grad, limit)


@pytest.mark.parametrize("T", [1e3, 1e5, math.inf])
def test_chen_eq_4_step_3_printed_sign_is_wrong(backend, T):
    """With the printed plus the right-hand side is off by 2 (c_s - c_t)/K in every class, however high T, and
    breaks their eq. 5."""
    z, v = draw()
    K = z.shape[-1]
    printed = chen_step_3(z, v, +1)
    gap = (mean(z) - mean(v)).expand_as(z)
    close(printed.sum(-1), 2 * gap[:, 0])
    assert (gap.abs() > 0.3).all()
    _, grad = value_and_grad(z, v, temperature=T, t_squared=True, backend=backend)
    close(printed - grad, 2 * gap / K, rtol=0, atol=2 / T + 1e-14)


@pytest.mark.parametrize("sign", [-1, 1])
def test_chen_eq_4_step_4(backend, sign):
    """With zero-mean logits the step's result is (z_i - v_i)/K, the gradient of logit matching, whichever
    sign step 3 has."""
    z, v = (centred(x) for x in draw())
    _, kd = value_and_grad(z, v, temperature=math.inf, t_squared=True, backend=backend)
    _, matching = value_and_grad(z, v, loss=logit_matching_loss, backend=backend)
    close(chen_step_3(z, v, sign), kd)
    close(kd, matching)


@pytest.mark.parametrize("T", [*TEMPERATURES, 1e3, math.inf])
def test_chen_eq_5(backend, T):
    """sum_i d(T^2 L_KD)/dz_i = 0 at every temperature, to the rounding of q_i - p_i."""
    z, v = draw(rows=16, classes=1000)
    _, grad = value_and_grad(z, v, temperature=T, t_squared=True, backend=backend)
    factor = T if math.isfinite(T) else 1.0
    assert grad.sum(-1).abs().max() <= 1e-15 * factor
    assert grad.abs().sum(-1).min() > 1e-2


def test_chen_eq_6(backend):
    """The hard-label gradient is p_i - y_i (eq. B.3), and sums to zero."""
    z, v = draw(rows=16, classes=1000)
    y = torch.arange(16) * 61
    loss, grad = value_and_grad(z, v, y, soft_weight=0.0, hard_weight=1.0, backend=backend)
    one_hot = nn.functional.one_hot(y, 1000).double()
    close(loss, torch.exp(z).sum(-1).log() - z.gather(-1, y[:, None]).squeeze(-1))  # eq. B.1
    close(grad, softmax(z) - one_hot)
    assert grad.sum(-1).abs().max() <= 1e-15


def test_chen_eq_b4_with_the_mean(backend):
    """Jensen gives L_CE >= log K + mean z - z_y, an equality for equal logits.

    B.4 prints sum z in place of log K + mean z: wrong for equal logits above log(K)/(K - 1).
    """
    z, v = draw()
    K = z.shape[-1]
    y = torch.tensor([3, 0, 9, 5])
    hard = {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": "none", "backend": backend}
    own = z.gather(-1, y[:, None]).squeeze(-1)
    assert (fused_kd_loss(z, v, y, **hard) > math.log(K) + z.mean(-1) - own).all()
    level = torch.full_like(z, 1.5)
    loss = fused_kd_loss(level, v, y, **hard)
    close(loss, math.log(K) + level.mean(-1) - 1.5)
    assert (loss < level.sum(-1) - 1.5).all()


def chen_eq_8(z: Tensor, v: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """(value, gradient) of |z - v|^2/(2K) + sign (c_s - c_t)/K sum z, in which c_s and c_t are constants of
    the initialisation."""
    K = z.shape[-1]
    gap = (mean(z) - mean(v)).squeeze(-1)
    z = z.clone().requires_grad_()
    value = ((v - z) ** 2).sum(-1) / (2 * K) + sign * gap / K * z.sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def test_chen_eq_7_and_8_sign_corrected(backend):
    """The limit is logit matching with the regulariser -(c_s - c_t)/K sum z; printed with a plus. Its
    constant is (c_s^2 - c_t^2)/2."""
    z, v = draw()
    K = z.shape[-1]
    cs, ct = mean(z), mean(v)
    loss, grad = value_and_grad(z, v, temperature=math.inf, t_squared=True, backend=backend)
    close(grad, (z - v - (cs - ct)) / K)  # eq. 7
    value, gradient = chen_eq_8(z, v, -1)
    close(grad, gradient)
    close(loss, value + (cs**2 - ct**2).squeeze(-1) / 2)
    close(value_and_grad(z, v, True, loss=logit_matching_loss, backend=backend), (loss, grad), rtol=0, atol=0)


def test_chen_eq_7_and_8_printed_sign_is_wrong(backend):
    """Printed, eq. 7 and eq. 8 have a gradient of sum 2 (c_s - c_t): the means of their eq. 5 would not
    stay."""
    z, v = draw()
    K = z.shape[-1]
    gap = mean(z) - mean(v)
    _, grad = value_and_grad(z, v, temperature=math.inf, t_squared=True, backend=backend)
    close(chen_eq_8(z, v, +1)[1], (z - v + gap) / K)  # eq. 7 as printed is the gradient of eq. 8 as printed
    close((z - v + gap) / K - grad, (2 * gap / K).expand_as(z))
    assert (((z - v + gap) / K).sum(-1).abs() > 0.6).all()


def descend(z: Tensor, steps: int, loss) -> Tensor:
    """Gradient descent on the logits themselves, at a rate of K/2: logit matching halves its distance in a
    step."""
    for _ in range(steps):
        z = z.detach().requires_grad_()
        loss(z).sum().backward()
        z = z - z.shape[-1] / 2 * z.grad
    return z.detach()


@pytest.mark.parametrize("T", [4.0, math.inf])
def test_chen_means_of_logits_stay(backend, T):
    """Descent on the logits leaves their mean at c_s, so that distillation ends at v + (c_s - c_t), and logit
    matching at v.

    The regulariser therefore pulls no logit towards zero, as the paper says it does: it holds the mean where
    it is.
    """
    z, v = draw()
    end = descend(
        z, 60, lambda x: fused_kd_loss(x, v, temperature=T, t_squared=True, reduction="none", backend=backend)
    )
    close(mean(end), mean(z), rtol=0, atol=2e-15 * 60)
    assert (end - z).norm(dim=-1).min() > 1
    if T == math.inf:
        close(end, v + mean(z) - mean(v))
    matched = descend(z, 60, lambda x: logit_matching_loss(x, v, reduction="none", backend=backend))
    close(matched, v)


def test_chen_means_of_labelled_logits_stay(backend):
    """The same for a teacher that learns hard labels (eq. 6)."""
    z, v = draw()
    y = torch.tensor([3, 0, 9, 5])
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": "none", "backend": backend}
    end = descend(z, 20, lambda x: fused_kd_loss(x, v, y, **options))
    close(mean(end), mean(z), rtol=0, atol=2e-15 * 20 * 10)
    assert (end.argmax(-1) == y).all() and (end - z).norm(dim=-1).min() > 1


@pytest.mark.parametrize("centre", [False, True])
def test_chen_means_in_a_network(centre):
    """In a network the last layer's mean weight and bias stay, not the mean logit, unless that mean weight is
    zero.

    1'W moves by the sum over classes of the logits' gradient, which is zero; 1'W h moves with the features h.
    """
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(32, 6, generator=g, dtype=torch.float64), draw(rows=32)[1]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    head = net[2]
    if centre:
        head.weight.data -= head.weight.data.mean(0)
    weight, bias, logits = (t.detach().clone() for t in (head.weight, head.bias, net(x)))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    for _ in range(50):
        optimizer.zero_grad()
        fused_kd_loss(net(x), v, temperature=4.0, t_squared=True).backward()
        optimizer.step()
    close(head.weight.mean(0), weight.mean(0), rtol=0, atol=1e-14)
    close(head.bias.mean(), bias.mean(), rtol=0, atol=1e-14)
    assert (head.weight - weight).norm() > 1
    moved = (net(x).mean(-1) - logits.mean(-1)).abs().detach()
    assert moved.max() < 1e-13 if centre else moved.min() > 1e-3


@pytest.mark.parametrize("low", [-1.0, 0.0])
def test_chen_proposition_1(low):
    """E[w x] = 0 for zero-mean w, whatever x: over seeds, logit matching and distillation at T = inf have the
    same gradient on average.

    In a single run they do not: they differ by (c_s - c_t)/K, of the standard deviation that the layers'
    inputs x give the means. With parameters of another mean, here uniform in (0, 1), the claim is wrong.
    """
    seeds, K, widths = 4000, 20, (30, 50)
    g = torch.Generator().manual_seed(0)
    # all positive, as after a relu
    inputs = [torch.rand(d, generator=g, dtype=torch.float64) + 0.5 for d in widths]
    weights = [low + (1 - low) * torch.rand(seeds, K, d, generator=g, dtype=torch.float64) for d in widths]
    z, v = (w @ x for w, x in zip(weights, inputs, strict=True))
    _, matching = value_and_grad(z, v, loss=logit_matching_loss)
    _, kd = value_and_grad(z, v, temperature=math.inf, t_squared=True)
    gap = (matching - kd)[:, 0] * K
    deviation = ((1 - low) ** 2 / 12 * sum((x**2).sum() for x in inputs) / K).sqrt()
    assert abs(gap.std() / deviation - 1) < 4 / math.sqrt(2 * seeds)
    agrees = abs(gap.mean()) < 4 * deviation / math.sqrt(seeds)
    assert agrees if low == -1 else not agrees


# ---------------------------------------------------------------- Grätzer


def test_gratzer_example_horse_zebra_car(backend):
    """Logits 5.4, 0.2, -1.3: above 0.99 for the horse; at T = 4 0.685, 0.187 and 0.128.

    T = 4 magnifies the difference between the unlikely classes 13 times, while their ratio falls from e^1.5
    to e^(1.5/4).
    """
    z = torch.tensor([5.4, 0.2, -1.3], dtype=torch.float64)
    hard, soft = (tempered_log_softmax(z, T, backend=backend).exp() for T in (1.0, 4.0))
    close(hard, torch.tensor([0.99330, 0.00548, 0.00122], dtype=torch.float64), rtol=0, atol=5e-6)
    close(soft, torch.tensor([0.68501, 0.18669, 0.12831], dtype=torch.float64), rtol=0, atol=5e-6)
    close(hard[1] / hard[2], torch.tensor(math.exp(1.5), dtype=torch.float64))
    close(soft[1] / soft[2], torch.tensor(math.exp(0.375), dtype=torch.float64))
    assert (soft[1] - soft[2]) / (hard[1] - hard[2]) > 13


@pytest.mark.parametrize("T", TEMPERATURES)
def test_gratzer_eq_1_5(backend, T):
    """D_KL(P||Q) = -H(P) + H(P||Q), and H(P) is the least cross entropy; also Chen et al. eq. 3."""
    z, v = draw()
    options = {"temperature": T, "reduction": "none", "backend": backend}
    D = fused_kd_loss(z, v, **options)
    H = fused_kd_loss(z, v, divergence="cross_entropy", **options)
    least = fused_kd_loss(v, v, divergence="cross_entropy", **options)
    p, q = softmax(v, T), softmax(z, T)
    close(D, kl(p, q))
    close(H, cross_entropy(p, q))
    close(least, cross_entropy(p, p))
    close(D, H - least)


@pytest.mark.parametrize("T", [3.0, 4.0, 5.0])
def test_gratzer_eq_1_8(backend, T):
    """dD_KL/dz_j = (q_j - p_j)/T. The expression printed before it has exp z_j for exp z_j/T, which is
    another gradient."""
    z, v = draw()
    _, grad = value_and_grad(z, v, temperature=T, backend=backend)
    close(grad, (softmax(z, T) - softmax(v, T)) / T)
    printed = (softmax(z) - softmax(v, T)) / T
    assert (grad - printed).norm() > 0.5 * grad.norm()


@pytest.mark.parametrize("T", [3.0, 4.0, 5.0])
def test_gratzer_eq_1_12_and_1_13(backend, T):
    """L_KL = T^2 sum_i sum_j p log(p/q), and L = (1 - beta) L_CE + beta L_KL with beta = 0.9: sums over the
    samples."""
    z, v = draw()
    y = torch.tensor([3, 0, 9, 5])
    one_hot = nn.functional.one_hot(y, z.shape[-1]).double()
    options = {"temperature": T, "t_squared": True, "reduction": "sum", "backend": backend}
    p, q = softmax(v, T), softmax(z, T)
    soft = T**2 * kl(p, q).sum()
    close(fused_kd_loss(z, v, **options), soft)
    loss, grad = value_and_grad(z, v, y, soft_weight=0.9, hard_weight=1 - 0.9, **options)
    close(loss, (1 - 0.9) * cross_entropy(one_hot, softmax(z)).sum() + 0.9 * soft)
    close(grad, (1 - 0.9) * (softmax(z) - one_hot) + 0.9 * T * (q - p), atol=1e-14)


def test_gratzer_eq_1_14_and_1_15(backend):
    """dH/dz_j = (q_j - p_j)/T ~ (z_j - v_j)/(n T^2) for zero-mean logits: it falls with the square of T, and
    T^2 undoes that."""
    z, v = (centred(x) for x in draw())
    limit = (z - v) / z.shape[-1]
    for T in (1e2, 1e3, 1e4):
        _, grad = value_and_grad(z, v, divergence="cross_entropy", temperature=T, backend=backend)
        close(grad, (softmax(z, T) - softmax(v, T)) / T, rtol=1e-9)
        assert (T**2 * grad - limit).norm() <= 3 / T * limit.norm()
        _, scaled = value_and_grad(
            z, v, divergence="cross_entropy", temperature=T, t_squared=True, backend=backend
        )
        close(scaled, T**2 * grad, rtol=1e-10)


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("order", [0.1, 0.5, 0.9, 1.5, 2.0, 5.0])
def test_gratzer_eq_1_16(backend, order, T):
    """D_a = log(sum p^a q^(1-a)) / (a-1). Its gradient puts softmax((a v + (1-a) z)/T) where KL's has p."""
    z, v = draw()
    D, grad = value_and_grad(z, v, divergence=f"renyi({order})", temperature=T, backend=backend)
    close(D, renyi(softmax(v, T), softmax(z, T), order), atol=1e-14)
    close(grad, (softmax(z, T) - softmax(order * v + (1 - order) * z, T)) / T, atol=1e-14)


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("order", ORDERS)
def test_gratzer_eq_1_20(backend, order, T):
    """P = Q given A: D_a(P||Q) = -log Q(A) for every order."""
    z, _ = draw()
    D = fused_kd_loss(
        z, without(z), divergence=f"renyi({order})", temperature=T, reduction="none", backend=backend
    )
    close(D, -softmax(z, T)[:, 3:].sum(-1).log())


def orders_of(z: Tensor, v: Tensor, backend: str):
    return lambda order: fused_kd_loss(
        z, v, divergence=f"renyi({order!r})", reduction="none", backend=backend
    )


def test_gratzer_eq_1_27(backend):
    """D_0 = -log Q(p > 0), and D_a leaves it at the rate KL(Q given p > 0 || P)."""
    z, v = draw()
    v = without(v)
    D = orders_of(z, v, backend)
    p, q = softmax(v), softmax(z)
    close(D(0.0), -q[:, 3:].sum(-1).log())
    assert (D(0.0) > 0.01).all()
    inside = q[:, 3:] / q[:, 3:].sum(-1, keepdim=True)
    close((D(1e-7) - D(0.0)) / 1e-7, kl(inside, p[:, 3:]), rtol=1e-5)


def test_gratzer_eq_1_31(backend):
    """D_1 = sum p log(p/q), and D_a crosses it at the rate Var_p(log(p/q)) / 2. (1.28 and 1.29 print the
    limit as a -> 0.)"""
    z, v = draw()
    D = orders_of(z, v, backend)
    p, q = softmax(v), softmax(z)
    ratio = (p / q).log()
    close(D(1.0), (p * ratio).sum(-1))
    variance = (p * ratio**2).sum(-1) - (p * ratio).sum(-1) ** 2
    step = 1e-5
    close((D(1 + step) - D(1 - step)) / (2 * step), variance / 2, rtol=1e-7)


def test_gratzer_eq_1_33(backend):
    """D_inf = max log(p/q). With i the class of the maximum, D_inf + log(p_i)/(a-1) <= D_a <= D_inf, and the
    left is sharp."""
    z, v = draw()
    D = orders_of(z, v, backend)
    p, q = softmax(v), softmax(z)
    most, i = (p / q).log().max(-1)
    lag = p.gather(-1, i[:, None]).squeeze(-1).log()
    close(D(math.inf), most)
    for order in (2.0, 20.0, 200.0, 2000.0):
        assert (D(order) >= most + lag / (order - 1) - 1e-12).all() and (D(order) < most).all()
    close((D(2000.0) - most) * 1999, lag, rtol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_renyi_grows_with_the_order(backend, seed):
    """D_a never falls in a, and strictly grows unless log(p/q) is constant on the support (van Erven and
    Harremoës, theorem 3)."""
    z, v = draw(seed=seed)
    for teacher in (v, without(v)):
        D = torch.stack([orders_of(z, teacher, backend)(order) for order in ORDERS])
        assert (D.diff(dim=0) > 1e-4).all()
    flat = torch.stack([orders_of(z, without(z), backend)(order) for order in ORDERS])
    assert flat.diff(dim=0).abs().max() <= 1e-13


def merged(x: Tensor, groups: Tensor) -> Tensor:
    """The logits of the distribution in which classes of a group are one."""
    return x.new_zeros(x.shape[0], int(groups.max()) + 1).index_add(1, groups, softmax(x)).log()


@pytest.mark.parametrize("order", ORDERS)
def test_renyi_data_processing(backend, order):
    """Merging classes never raises D_a, and keeps it where p/q is the same in what is merged (van Erven and
    Harremoës, theorem 1)."""
    z, v = draw()
    v = without(v, slice(0, 1))
    groups = torch.tensor([0, 0, 1, 1, 2, 3, 3, 3, 4, 0])
    D = orders_of(z, v, backend)(order)
    less = orders_of(merged(z, groups), merged(v, groups), backend)(order)
    assert (less <= D + 1e-14).all() and (less < D - 1e-3).any()
    # a student that is off by one factor per group: nothing that tells them apart is lost
    z = draw()[1] + draw(seed=1)[0][:, groups]
    v = draw()[1]
    close(
        orders_of(merged(z, groups), merged(v, groups), backend)(order),
        orders_of(z, v, backend)(order),
        atol=1e-14,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_orders_are_their_limits(backend):
    """Alpha of 1e-17 is reverse KL, whose weights differ from q by less than a rounding, also where one class
    has nearly everything."""
    for kind in ("plain", "dominant", "outlier", "peaked_teacher"):
        z, v = make_rows(kind, 2, 60)
        found = []
        for name in ("alpha(1e-17)", "reverse_kl"):
            x = z.clone().requires_grad_()
            loss = fused_kd_loss(x, v, divergence=name, reduction="none", backend=backend)
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
        for mine, right in zip(*found, strict=True):
            torch.testing.assert_close(mine, right, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
@pytest.mark.parametrize(
    "name",
    [
        "renyi(1e-12)",
        "reverse_renyi(1e-12)",
        "skew_kl(0.99999999)",
        "skew_reverse_kl(0.99999999)",
        "skew_kl(1e-8)",
        "jsd(1e-8)",
    ],
)
def test_tiny_orders_and_weights_have_both_gradients(name, backend):
    """Of complements that keep few of their digits."""
    z, v = make_rows("plain", 3, 500)
    found = []
    for dtype, which in ((torch.float32, backend), (torch.float64, "eager")):
        x, y = (t.detach().to(dtype).requires_grad_() for t in (z, v))
        loss = fused_kd_loss(x, y, divergence=name, teacher_grad=True, reduction="none", backend=which)
        found.append((loss.detach().double(), *(g.double() for g in torch.autograd.grad(loss.sum(), (x, y)))))
    for mine, right in zip(*found, strict=True):
        assert (mine - right).norm() <= 3e-6 * right.norm()
