"""Which tokens of a training example carry its influence on an output, and which tokens of the output they bear on.

The gradient of a linear module's weight is a sum over tokens, G = Σ_t g_t x_tᵀ of inputs x_t and output gradients g_t,
so that an inner product of two gradients is a sum over pairs of tokens:

    ⟨G, G'⟩ = Σ_t Σ_s T[t, s]        T[t, s] = Σ_modules (g_t·g'_s)(x_t·x'_s)

A token stands here for the position at which the model reads it. What the model makes of it there goes into every
prediction after it, through attention, so that tokens of a prompt have their part, too; the last token has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceABC
from dataclasses import dataclass, field

from gradsift.base.lazy import Tensor, nn, torch
from gradsift.base.types import Sequence
from gradsift.gradients.adam import AdamDirection
from gradsift.gradients.capture import Capture
from gradsift.gradients.folding import Captured

MOST_PAIRS = 1 << 13  # of tokens whose influence is kept one by one


@dataclass
class TokenInfluence:
    """An inner product of a row's gradient, or Adam direction, with an output's gradient, as sums over tokens.

    **Above zero: the token makes the output more likely** when the row is trained on.

    row:         float64 `[row token]`, Σ_s T[t, s]
    output:      float64 `[output token]`, Σ_t T[t, s], of an Adam direction with the momentum's part; the tokens of
        several sequences stand one behind the other
    constant:    what no token of the row carries: the momentum's part of an Adam direction, else 0
    pairs:       float64 `[row token, output token]`, T; None where it is large, or of an Adam direction
    row_square:  ‖G‖² or ‖Γ(G)‖²
    output_square: ‖G'‖²
    """

    row: Tensor
    output: Tensor
    pairs: Tensor | None = field(default=None, repr=False)
    constant: float = 0.0
    row_square: float = 0.0
    output_square: float = 0.0

    @property
    def total(self) -> float:
        """The inner product: `row` and `constant` add up to it, and so does `output`."""
        return float(self.row.sum()) + self.constant

    def add(self, other: TokenInfluence, *, weight: float = 1.0, cosine: bool = False) -> None:
        """Add `weight` times another one of the same tokens; `cosine` divides it by both norms first.

        The squares of norms are then of no single gradient, and are left as they are.
        """
        norms = (other.row_square * other.output_square) ** 0.5
        factor = weight if not cosine else weight / norms if norms > 0 else 0.0
        self.row += factor * other.row
        self.output += factor * other.output
        self.constant += factor * other.constant
        if self.pairs is not None:
            assert other.pairs is not None, "both are of the same tokens and kind"
            self.pairs += factor * other.pairs

    @classmethod
    def zeros(cls, row: int, output: int, *, adam: bool = False) -> TokenInfluence:
        """Of so many tokens."""
        kept = not adam and row * output <= MOST_PAIRS
        pairs = torch.zeros(row, output, dtype=torch.float64) if kept else None
        return cls(torch.zeros(row, dtype=torch.float64), torch.zeros(output, dtype=torch.float64), pairs)


@dataclass(frozen=True, slots=True)
class Factors:
    """What a module saw of one sequence: inputs `[token place in]` and output gradients `[token place out]`.

    A token has several places where a module is used more than once, or on each head.
    """

    x: Tensor
    g: Tensor

    @property
    def gradient(self) -> Tensor:
        """Σ g xᵀ `[out in]`."""
        return self.g.flatten(0, 1).T @ self.x.flatten(0, 1)

    def zeros(self, tokens: int) -> Factors:
        """Of as many tokens that had no part."""
        return Factors(*(one.new_zeros(tokens, *one.shape[1:]) for one in (self.x, self.g)))

    def before(self, other: Factors) -> Factors:
        """With the tokens of another sequence behind."""
        return Factors(torch.cat([self.x, other.x]), torch.cat([self.g, other.g]))

    def along(self, matrix: Tensor) -> Tensor:
        """gᵀ M x of each token, float64 `[token]`, for M `[out in]`."""
        return ((self.g @ matrix) * self.x).sum((1, 2), dtype=torch.float64).cpu()


def token_influences(
    model: nn.Module,
    modules: SequenceABC[Captured],
    rows: SequenceABC[Sequence],
    output: SequenceABC[Sequence],
    *,
    adam: Mapping[str, AdamDirection] | None = None,
    autocast: torch.dtype | None = None,
    checkpointing: bool = False,
    module_groups: int = 1,
    on_row: Callable[[int], None] | None = None,
) -> list[TokenInfluence]:
    """The inner products of some rows' gradients with an output's, each as sums over tokens; nothing is projected.

    With plain gradients, T[t, s] = Σ_modules (g_t·g'_s)(x_t·x'_s), and Σ_t Σ_s T = ⟨G, G'⟩.

    An Adam direction is not linear in the gradient. It is taken as it is written at the row, Γ(G) = D∘G + c with the
    row's own v' in both (`AdamDirection.parts`): D is Adam's diagonal preconditioner there, c the momentum's part.
    Then

        row[t]    = Σ_modules g_tᵀ (D∘G') x_t        constant = Σ_modules ⟨c, G'⟩
        output[s] = Σ_modules g'_sᵀ Γ(G) x'_s

    both add up to ⟨Γ(G), G'⟩ exactly, `row` with `constant`. What a token changes in D is in no token's part.

    Each row goes once forth and back, the output once (for each module group); the output's factors are held.

    Args:
        model: in any mode; it is evaluated without dropout and left as found.
        modules: from `find_modules`; UncapturedError where one does not tell its tokens apart, such as one of experts.
        rows: each a sequence.
        output: its sequences, whose gradients add up: one, or two of opposite weights for a contrast.
        adam: by module name, to split Adam directions of the rows.
        autocast, checkpointing: as for `Capture`.
        module_groups: go through the sequences this many times, each time for a part of the modules.
        on_row: told after each row.

    Returns:
        One for each row; higher = the token makes the output more likely.
    """
    length = sum(len(part.token_ids) for part in output)
    found = [TokenInfluence.zeros(len(row.token_ids), length, adam=adam is not None) for row in rows]
    size = -(-len(modules) // module_groups)
    for start in range(0, len(modules), size):
        group = modules[start : start + size]
        with Capture(model, group, autocast=autocast, checkpointing=checkpointing).open() as capture:
            held = _held(capture, output)
            square = sum(_square(factors.gradient) for factors in held.values())
            for row, sums in zip(rows, found, strict=True):
                sums.output_square += square
                _Sums(sums, held, adam).of(capture, row)
                if on_row is not None and start + size >= len(modules):
                    on_row(1)
    return found


@dataclass(frozen=True, slots=True)
class _Sums:
    """Adds up a row's modules as its backward pass frees them."""

    into: TokenInfluence
    output: Mapping[str, Factors]
    adam: Mapping[str, AdamDirection] | None

    def of(self, capture: Capture, row: Sequence) -> None:
        """Take a row through the model."""
        capture.run([row], self._add_unused, consume_tokens=lambda m, x, g: self._add(m, Factors(x[0], g[0])))

    def _add(self, module: Captured, row: Factors) -> None:
        gradient, output = row.gradient, self.output.get(module.name)
        if self.adam is not None:
            self._add_direction(module, gradient, row)
            return
        self.into.row_square += _square(gradient)
        if output is None:
            return
        pairs, (m, places), (n, others) = self.into.pairs, row.g.shape[:2], output.g.shape[:2]
        out, in_ = module.shape
        if pairs is None and m * places * n * others * (out + in_) > (m * places + 2 * n * others) * out * in_:
            self.into.row += row.along(output.gradient)
            self.into.output += output.along(gradient)
            return
        products = row.g.flatten(0, 1) @ output.g.flatten(0, 1).T
        products.mul_(row.x.flatten(0, 1) @ output.x.flatten(0, 1).T)
        products = products.view(m, places, n, others).sum((1, 3)).to("cpu", torch.float64)
        self.into.row += products.sum(1)
        self.into.output += products.sum(0)
        if pairs is not None:
            pairs += products

    def _add_unused(self, module: Captured, zeros: Tensor) -> None:
        """A module that had no part in the row's loss: its Adam direction is the momentum."""
        if self.adam is not None:
            self._add_direction(module, zeros[0], None)

    def _add_direction(self, module: Captured, gradient: Tensor, row: Factors | None) -> None:
        assert self.adam is not None, module
        scale, momentum = self.adam[module.name].parts(gradient)
        direction, output = (scale * gradient).add_(momentum), self.output.get(module.name)
        self.into.row_square += _square(direction)
        if output is None:
            return
        across = output.gradient
        if row is not None:
            self.into.row += row.along(scale * across)
        self.into.output += output.along(direction)
        self.into.constant += float((momentum * across).sum(dtype=torch.float64))


def _held(capture: Capture, output: SequenceABC[Sequence]) -> dict[str, Factors]:
    """Each module's factors of all sequences of an output, one behind the other; zeros where one did not use it."""
    parts: list[dict[str, Factors]] = []
    for one in output:
        own: dict[str, Factors] = {}

        def hold(module: Captured, x: Tensor, g: Tensor, own: dict[str, Factors] = own) -> None:
            own[module.name] = Factors(x[0], g[0])

        # A module that had no part in the output's loss adds to no product.
        capture.run([one], lambda _module, _gradients: None, consume_tokens=hold)
        parts.append(own)
    held = dict(parts[0])
    for before, own in enumerate(parts[1:], start=1):
        for name in held.keys() | own.keys():
            known = sum(len(one.token_ids) for one in output[:before])
            first, second = held.get(name), own.get(name)
            if first is None:
                assert second is not None, name
                first = second.zeros(known)
            held[name] = first.before(second or first.zeros(len(output[before].token_ids)))
    return held


def _square(gradient: Tensor) -> float:
    return float(gradient.square().sum(dtype=torch.float64))
