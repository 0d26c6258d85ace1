"""The shortest prefix of an order whose measure reaches a target, found without a sort and exact in any batch.

Top-k, top-p and a random draw all ask this. `threshold` answers it by fixing the bits of the prefix's last key from the
highest down, one masked sum each. Sums are of fixed-point numbers of 39 bits, held as integers: they are the same in
any order, so what is found depends on the row alone, bit for bit.

Knows nothing of requests and of what the weights mean.
Letters: B rows, Y vocabulary, J blocks of Q tokens.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

DIGIT_BITS = 13  # of a fixed-point number: 2**19 weights of 2**13 still add up within 32 bits
DIGIT_MASK = 2**DIGIT_BITS - 1
MAX_VOCABULARY = 2**19 - 1

Amount = tuple[Array, Array]  # [B] uint32 each: units of 2**-13, and of 2**-39 below them (26 bits)
Measure = Callable[[Array], Amount]  # of a set of tokens per row: [B, Y] bool -> [B]


def prefix_of(order_BY: Array, measure: Measure, target: Amount) -> Array:
    """The shortest prefix that reaches `target`, of the tokens by falling `order` (uint32) and then by rising id."""
    last_B1 = threshold(order_BY, 32, measure, target)[:, None]
    vocabulary = order_BY.shape[-1]
    rank_1Y = vocabulary - jax.lax.broadcasted_iota(jnp.uint32, (1, vocabulary), 1)  # of ties: Y down to 1
    rank_BY = jnp.where(order_BY > last_B1, vocabulary + 1, jnp.where(order_BY == last_B1, rank_1Y, 0))
    return rank_BY >= threshold(rank_BY, (vocabulary + 1).bit_length(), measure, target)[:, None]


def threshold(keys_BY: Array, bits: int, measure: Measure, target: Amount) -> Array:
    """The largest t for which the tokens with `key >= t` reach `target`; 0 if none does. Keys are uint32 below 2**bits.

    A set that grows never measures less, so the bits of t can be settled one by one from the highest.
    """

    def settle(i: Array, threshold_B: Array) -> Array:
        candidate_B = threshold_B | (jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32))
        reached_B = at_least(measure(keys_BY >= candidate_B[:, None]), target)
        return jnp.where(reached_B, candidate_B, threshold_B)

    return jax.lax.fori_loop(0, bits, settle, jnp.zeros(keys_BY.shape[:1], jnp.uint32))


def first_index(measure: Measure, shape: tuple[int, ...], target: Amount) -> Array:
    """The lowest index along the second axis of `shape` up to which `target` is reached, int32."""
    length = shape[1]
    falling = length - jax.lax.broadcasted_iota(jnp.uint32, shape, 1)
    return length - threshold(falling, length.bit_length(), measure, target).astype(jnp.int32)


def ordinals(values_BY: Array) -> Array:
    """uint32 in the order of the float32 values; both zeros give one number."""
    bits_BY = jax.lax.bitcast_convert_type(jnp.where(values_BY == 0.0, 0.0, values_BY), jnp.uint32)
    sign_BY = bits_BY >> 31
    return jnp.where(sign_BY == 1, ~bits_BY, bits_BY | jnp.uint32(1 << 31))


# ------------------------------------------------------------------------------------------------- fixed-point amounts


def count_of(kept_BY: Array) -> Amount:
    """The measure that counts the tokens of a set, in units of 2**-39."""
    low_B = jnp.sum(kept_BY, axis=-1, dtype=jnp.uint32)
    return jnp.zeros_like(low_B), low_B


def mass_of(weights_BY: Array) -> Measure:
    """The measure of a set that adds up the weights of its tokens; digits are cheaper to make again than to read."""
    return lambda kept_BY: sum_of(digits_of(jnp.where(kept_BY, weights_BY, 0.0)))(kept_BY)


def sum_of(digits: Sequence[Array]) -> Measure:
    """The measure of a set that adds up three digits per member; the sum of each digit stays under 2**32."""

    def total(kept: Array) -> Amount:
        first_B, second_B, third_B = (jnp.sum(jnp.where(kept, digit, 0), axis=-1, dtype=jnp.uint32) for digit in digits)
        second_B += third_B >> DIGIT_BITS
        low_B = (second_B & DIGIT_MASK) << DIGIT_BITS | third_B & DIGIT_MASK
        return first_B + (second_B >> DIGIT_BITS), low_B

    return total


def digits_of(fraction: Array) -> list[Array]:
    """Three uint32 digits of 13 bits after the point, highest first; 1.0 gives 2**13, 0, 0.

    Every step is exact in float32. What lies below 2**-39 is cut off.
    """
    digits = []
    for _ in range(3):
        shifted = fraction * 2.0**DIGIT_BITS
        whole = jnp.floor(shifted)
        digits.append(whole.astype(jnp.uint32))
        fraction = shifted - whole
    return digits


def scaled(amount: Amount, fraction: Sequence[Array]) -> Amount:
    """floor(amount * fraction) by long multiplication; `fraction` < 1 as digits after the point, highest first."""
    high_B, low_B = amount
    digits = [low_B & DIGIT_MASK, low_B >> DIGIT_BITS]
    digits += [high_B & DIGIT_MASK, high_B >> DIGIT_BITS & DIGIT_MASK, high_B >> 2 * DIGIT_BITS]
    columns = [jnp.zeros_like(low_B)] * (len(digits) + len(fraction))
    for i, digit_B in enumerate(digits):
        for j, factor_B in enumerate(reversed(fraction)):
            columns[i + j] += digit_B * factor_B  # at most five products of 26 bits: no overflow
    for i in range(len(columns) - 1):
        columns[i + 1] += columns[i] >> DIGIT_BITS
        columns[i] &= DIGIT_MASK
    whole = columns[len(fraction) :]
    return whole[2] | whole[3] << DIGIT_BITS | whole[4] << 2 * DIGIT_BITS, whole[0] | whole[1] << DIGIT_BITS


def difference(amount: Amount, less: Amount) -> Amount:
    """`amount - less`, which is not negative."""
    borrow_B = (amount[1] < less[1]).astype(jnp.uint32)
    return amount[0] - less[0] - borrow_B, amount[1] - less[1] + (borrow_B << 2 * DIGIT_BITS)


def at_least(amount: Amount, target: Amount) -> Array:
    """Whether `amount >= target`, per row."""
    return (amount[0] > target[0]) | (amount[0] == target[0]) & (amount[1] >= target[1])
