"""Federated sketching on least squares with A fixed: optimum, mean and second moment in closed form.

Client i of weight w_i holds rows X_i [n_i, in], Y_i [n_i, out]; the base weight is zero and the LoRA scale one:

    f_i(W) = |X_i W^T - Y_i|^2 / (2 n_i),   W = B S_i A,   G_i = A X_i^T X_i A^T / n_i,   D_i = Y_i^T X_i A^T / n_i,

with A [r, in] of orthonormal rows, B [out, r] trained, and S_i = (r/k_i) sum_{j in I_i} e_j e_j^T, I_i a uniform
k_i-subset. The sketched objective of the paper (W. Fang et al., arXiv 2501.19389) is F(B) = sum_i w_i E f_i(B S_i A).

Optimum. The gradient at B is B S_i G_i S_i - D_i S_i, for one sketch. P(j in I) = k/r and P(j, l in I) = k(k-1) /
(r(r-1)), so in the mean over sketches

    B M_i - D_i,   M_i = E[S_i G_i S_i] = (r/k) diag(G_i) + c (G_i - diag(G_i)),   c = r (k-1) / (k (r-1)) <= 1:

the diagonal is enlarged, the rest is damped, and F is a quadratic with curvature M = sum w_i M_i, optimum B* = D M^-1,
D = sum w_i D_i, and excess F(B) - F(B*) = tr((B - B*) M (B - B*)^T) / 2. As M_i = c G_i + (r/k - c) diag(G_i) and a
diagonal entry is at least the smallest eigenvalue, mu_k = lambda_min(M) >= (r/k) lambda_min(sum w_i G_i) for equal k.

Mean. A round of one full-batch step a client, all clients taking part, is B <- B - eta sum_i w_i (B S_i G_i S_i -
D_i S_i) with sketches independent of B, so the mean obeys m <- m - eta (m M - D): it contracts by I - eta M exactly.

Second moment. R = E[B^T B] obeys a linear recursion too, since the sketches of a round are independent of one another
and E[S G S R S G S] needs only P(a, c, d, b in I), a function of how many of the four differ (`inclusion`).

Step size. Whatever the subset, |S_i G_i S_i| <= (r/k)^2 L with L = max_i lambda_max(G_i), so that K = sum w_i S_i G_i
S_i has E[K^2] <= (r/k)^2 L M. At eta <= (k/r)^2 / (2 L), with sigma^2 the variance of the step's gradient at B*,

    E|B_t - B*|^2 <= (1 - eta mu_k)^t |B_0 - B*|^2 + 2 eta sigma^2 / mu_k

(R. Gower et al., "SGD: General Analysis and Improved Rates", arXiv 1901.09401, theorem 3.1, for this case).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fslora_hf.data.clients import ClientIndex


@dataclass(frozen=True)
class Problem:
    """Least squares shared out to clients, in float64.

    Attributes:
        A: `[r, in]`, fixed.
        X, Y: `[rows, in]` and `[rows, out]`, of all clients.
        index: which rows each client owns.
    """

    A: torch.Tensor
    X: torch.Tensor
    Y: torch.Tensor
    index: ClientIndex

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def weights(self) -> list[float]:
        """Of each client, in proportion to its rows."""
        return (self.index.sizes / len(self.X)).tolist()

    @cached_property
    def shards(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """X_i `[n_i, in]` and Y_i `[n_i, out]` of each client."""
        rows = [self.index.shard(i).tolist() for i in range(len(self.index))]
        return [(self.X[chosen], self.Y[chosen]) for chosen in rows]

    @cached_property
    def grams(self) -> list[torch.Tensor]:
        """G_i `[r, r]` of each client."""
        features = [X @ self.A.mT for X, _ in self.shards]
        return [one.mT @ one / len(one) for one in features]

    @cached_property
    def linear(self) -> list[torch.Tensor]:
        """D_i `[out, r]` of each client."""
        return [Y.mT @ X @ self.A.mT / len(X) for X, Y in self.shards]


def make_problem(rank: int, clients: int, spread: float = 0.1, seed: int = 0) -> Problem:
    """Clients of different sizes and inputs, whose targets come from weights that differ by `spread` of their size."""
    wide, out = rank + rank // 2, 6
    generator = np.random.default_rng(seed)
    owners = np.repeat(np.arange(clients), [6 * wide + 2 * wide * i for i in range(clients)])
    generator.shuffle(owners)
    X = generator.normal(size=(len(owners), wide)) * np.linspace(0.5, 1.5, wide)
    T = generator.normal(size=(out, wide)) + spread * generator.normal(size=(clients, out, wide))
    Y = np.einsum("nj,noj->no", X, T[owners])
    A = np.linalg.qr(generator.normal(size=(wide, rank)))[0].T
    tensors = (torch.from_numpy(np.ascontiguousarray(array)) for array in (A, X, Y))
    return Problem(*tensors, ClientIndex.from_column(owners))


def safe_rate(problem: Problem, ranks: list[int]) -> float:
    """The step size of theory, eta = (k/r)^2 / (2 L), for the smallest k."""
    largest = max(torch.linalg.eigvalsh(gram)[-1].item() for gram in problem.grams)
    return (min(ranks) / problem.rank) ** 2 / (2 * largest)


def inclusion(r: int, k: int, order: int) -> torch.Tensor:
    """E[s_a s_b ...] of the sketch's diagonal s, `[r] * order`: (r/k)^order P(a, b, ... in I)."""
    tuples = torch.cartesian_prod(*[torch.arange(r)] * order).view(-1, order).sort(dim=1).values
    distinct = 1 + (tuples.diff(dim=1) != 0).sum(dim=1)
    drawn = torch.tensor([(k - i) / (r - i) for i in range(min(order, r))], dtype=torch.float64)
    return (r / k) ** order * drawn.cumprod(0)[distinct - 1].view([r] * order)


class Law:
    """What rounds do to B in the mean, exactly, for clients of ranks `ranks`.

    Attributes:
        hessian: M `[r, r]`, and `curvature` its eigenvalues in ascending order.
        linear: D `[out, r]`.
        optimum: B* `[out, r]`.
    """

    def __init__(self, problem: Problem, ranks: list[int]):
        r, weights = problem.rank, problem.weights
        clients = list(zip(weights, problem.grams, problem.linear, ranks, strict=True))
        self._parts = [(w, inclusion(r, k, 2) * G, D) for w, G, D, k in clients]
        self.hessian = sum(w * M for w, M, _ in self._parts)
        self.linear = sum(w * D for w, _, D in self._parts)
        self.curvature = torch.linalg.eigvalsh(self.hessian)
        self.optimum = torch.linalg.solve(self.hessian, self.linear, left=False)
        # The second moment of a client's gradient: quadratic, linear and constant in B.
        self._quadratic = sum(
            w**2 * torch.einsum("acdb,ac,db->abcd", inclusion(r, k, 4), G, G) for w, G, _, k in clients
        )
        self._mixed = sum(w**2 * torch.einsum("acb,ac,ob->aboc", inclusion(r, k, 3), G, D) for w, G, D, k in clients)
        self._constant = sum(w**2 * inclusion(r, k, 2) * (D.mT @ D) for w, _, D, k in clients)

    def excess(self, B: torch.Tensor) -> torch.Tensor:
        """F(B) - F(B*) of B `[..., out, r]`."""
        distance = B - self.optimum
        return ((distance @ self.hessian) * distance).sum((-2, -1)) / 2

    def expected_excess(self, mean: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """E[F(B)] - F(B*) for a random B of mean `[out, r]` and second moment E[B^T B] `[r, r]`."""
        variance = second - mean.mT @ mean
        return self.excess(mean) + (self.hessian * variance).sum() / 2

    def step(self, mean: torch.Tensor, second: torch.Tensor, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and second moment of B one round later."""
        slope = mean @ self.hessian - self.linear
        drift = second @ self.hessian - mean.mT @ self.linear  # E[B^T gradient]
        noise = self.gradient_second_moment(mean, second)
        return mean - rate * slope, second - rate * (drift + drift.mT) + rate**2 * noise

    def gradient_second_moment(self, mean: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """E[g^T g] `[r, r]` of the round's averaged gradient g: clients draw independently, so only the products of a
        client with itself differ from those of the mean gradients."""
        mixed = torch.einsum("aboc,oc->ab", self._mixed, mean)
        own = torch.einsum("abcd,cd->ab", self._quadratic, second) - mixed - mixed.mT + self._constant
        own_means = sum(w**2 * _gram_of_slope(M, D, mean, second) for w, M, D in self._parts)
        return _gram_of_slope(self.hessian, self.linear, mean, second) + own - own_means

    def moments(self, rate: float, rounds: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Mean and second moment of B after 0, 1, ... `rounds` rounds from B = 0."""
        state = torch.zeros_like(self.linear), torch.zeros_like(self.hessian)
        yield state
        for _ in range(rounds):
            state = self.step(*state, rate)
            yield state

    def floor(self, rate: float) -> torch.Tensor:
        """E[F(B)] - F(B*) after infinitely many rounds: the fixed point of the second moment at the mean B*."""
        size = len(self.hessian)
        constant = self.step(self.optimum, torch.zeros_like(self.hessian), rate)[1]
        basis = torch.eye(size * size, dtype=constant.dtype).view(-1, size, size)
        columns = [(self.step(self.optimum, one, rate)[1] - constant).flatten() for one in basis]
        fixed = torch.linalg.solve(basis.flatten(1) - torch.stack(columns, dim=1), constant.flatten())
        return self.expected_excess(self.optimum, fixed.view(size, size)).clamp(
            min=0
        )  # rounding, where there is no noise

    def bound(self, rate: float, rounds: int) -> torch.Tensor:
        """The theorem's bound on E|B_t - B*|^2, `[rounds + 1]`, from B = 0."""
        variance = self.gradient_second_moment(self.optimum, self.optimum.mT @ self.optimum).trace()
        smallest = self.curvature[0]
        decay = (1 - rate * smallest) ** torch.arange(rounds + 1, dtype=smallest.dtype)
        return decay * self.optimum.square().sum() + 2 * rate * variance / smallest


def _gram_of_slope(M: torch.Tensor, D: torch.Tensor, mean: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """E[(B M - D)^T (B M - D)] `[r, r]`."""
    cross = M @ mean.mT @ D
    return M @ second @ M - cross - cross.mT + D.mT @ D
