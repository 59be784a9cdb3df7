"""The gated delta rule: a linear recurrence whose state, a matrix a head, is all that it keeps of the tokens.

Source: Gated Delta Networks (arXiv:2412.06464), eq. 10; the chunked form is that of section 3.3, after DeltaNet
(arXiv:2406.06484).

Shape letters besides the usual ones: N chunks of T tokens, H heads of values, K heads of keys.
"""

import mlx.core as mx

CHUNK = 64  # tokens whose deltas are solved for at once


def gated_delta(
    queries: mx.array, keys: mx.array, values: mx.array, decays: mx.array, betas: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """For each token S = a S + b (v - a S k) k^T, then S q, where a is e to the power of its decay and b its beta.

    Args:
        queries, keys: float32[B, L, K, Dk]; each of the K heads serves H / K heads of values, that follow one another.
        values: float32[B, L, H, Dv].
        decays: float32[B, L, H], at most 0.
        betas: float32[B, L, H], between 0 and 1. A token with decay and beta 0 leaves the state as it is.
        state: float32[B, H, Dv, Dk], of the tokens before these.

    Returns:
        float32[B, L, H, Dv] and the state after the last token.
    """
    groups = values.shape[2] // keys.shape[2]
    if groups > 1:
        queries, keys = mx.repeat(queries, groups, axis=2), mx.repeat(keys, groups, axis=2)
    if queries.shape[1] == 1:
        out, state = _step(queries[:, 0], keys[:, 0], values[:, 0], decays[:, 0], betas[:, 0], state)
        return out[:, None], state
    return _chunks(queries, keys, values, decays, betas, state)


def _step(
    query: mx.array, key: mx.array, value: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token, without the axis of tokens."""
    state = state * mx.exp(decay)[..., None, None]
    delta = beta[..., None] * (value - (state @ key[..., None])[..., 0])
    state = state + delta[..., None] * key[..., None, :]
    return (state @ query[..., None])[..., 0], state


def _chunks(
    queries: mx.array, keys: mx.array, values: mx.array, decays: mx.array, betas: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Chunk by chunk: within one the deltas U are the solution of a triangular system, all chunks' at once but for what
    they owe to the state before them: U = U0 - W S^T."""
    B, L, H, _ = keys.shape
    size = min(CHUNK, 1 << (L - 1).bit_length())
    count = -(-L // size)

    def cut(x: mx.array) -> mx.array:  # (B, L, H, ...) -> (B, H, N, T, ...), zeros behind the last token
        x = mx.pad(x, [(0, 0), (0, count * size - L), *[(0, 0)] * (x.ndim - 2)])
        return mx.moveaxis(x, 2, 1).reshape(B, H, count, size, *x.shape[3:])

    q, k, v, g, b = (cut(each) for each in (queries, keys, values, decays, betas))
    since = mx.cumsum(g, axis=-1)  # the decay from the chunk's beginning to behind each token
    lower = mx.arange(size)[:, None] >= mx.arange(size)
    between = since[..., :, None] - since[..., None, :]
    decay = mx.exp(mx.where(lower, between, -float("inf")))  # masked first: above the diagonal it would overflow
    own = (b[..., None] * k) @ k.swapaxes(-1, -2) * mx.where(mx.eye(size, dtype=mx.bool_), 0.0, decay)
    solve = invert_unit_lower(own)
    alone = solve @ (b[..., None] * v)  # U0
    owed = solve @ ((b * mx.exp(since))[..., None] * k)  # W
    seen = q @ k.swapaxes(-1, -2) * decay
    q, k = q * mx.exp(since)[..., None], k * mx.exp(since[..., -1:] - since)[..., None]
    whole = mx.exp(since[..., -1])[..., None, None]
    outputs = []
    for n in range(count):
        delta = alone[:, :, n] - owed[:, :, n] @ state.swapaxes(-1, -2)
        outputs.append(q[:, :, n] @ state.swapaxes(-1, -2) + seen[:, :, n] @ delta)
        state = whole[:, :, n] * state + delta.swapaxes(-1, -2) @ k[:, :, n]
    out = mx.stack(outputs, axis=2).reshape(B, H, count * size, -1)[:, :, :L]
    return mx.moveaxis(out, 1, 2), state


def invert_unit_lower(lower: mx.array) -> mx.array:
    """(I + A)^-1 of strictly lower triangles A, float32[..., T, T], T a power of two.

    By halves, from single numbers up: every number on the way is one of the result, as in forward substitution. In
    powers of A, the other way without a solver, numbers grow and cancel where keys repeat.
    """
    size, lead = lower.shape[-1], lower.shape[:-2]
    lower = lower.reshape(-1, size, size)
    inverse = mx.ones((len(lower), size, 1, 1), dtype=lower.dtype)  # of the blocks on the diagonal
    width = 1
    while width < size:
        pairs = size // (2 * width)
        blocks = lower.reshape(-1, pairs, 2, width, pairs, 2, width)[:, :, 1, :, :, 0]
        below = mx.moveaxis(mx.diagonal(blocks, axis1=1, axis2=3), -1, 1)  # (., pairs, width, width)
        first, second = inverse[:, 0::2], inverse[:, 1::2]
        top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
        bottom = mx.concatenate([-(second @ below @ first), second], axis=-1)
        inverse = mx.concatenate([top, bottom], axis=-2)
        width *= 2
    return inverse.reshape(*lead, size, size)
