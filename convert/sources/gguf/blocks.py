"""The blocks of a GGUF file as groups of integers with scales and offsets.

A block is a run of 32 numbers, or of 256 in the "K" types, in the layout of ggml's C structs. What
they stand for is `gguf.quants.dequantize`, which the tests compare with.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from s3d_jax.weights.blocks import Blocks


class Groups(NamedTuple):
    """Rows of a matrix: scale · number + offset.

    Attributes:
        numbers: int8 [rows, in].
        scale: float32 [rows, groups].
        offset: float32 [rows, groups], or None for zeros.
    """

    numbers: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None


def groups_of(packed: np.ndarray, kind: str) -> Groups:
    """Decodes rows of a tensor.

    Args:
        packed: uint8 [rows, bytes].
        kind: one of KINDS.
    """
    decode, size = _DECODERS[kind]
    rows = len(packed)
    numbers, scale, offset = decode(np.ascontiguousarray(packed).reshape(-1, size))
    return Groups(
        numbers.astype(np.int8).reshape(rows, -1),
        scale.reshape(rows, -1),
        None if offset is None else offset.reshape(rows, -1),
    )


_Decoded = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _q8_0(blocks: np.ndarray) -> _Decoded:
    return blocks[:, 2:].view(np.int8), _halves(blocks[:, :2]), None


def _q4_0(blocks: np.ndarray) -> _Decoded:
    return _shifted(blocks[:, 2:], 16, (0, 4), 15).view(np.int8) - 8, _halves(blocks[:, :2]), None


def _q4_1(blocks: np.ndarray) -> _Decoded:
    scale, offset = _halves(blocks[:, :2]), _halves(blocks[:, 2:4])
    return _shifted(blocks[:, 4:], 16, (0, 4), 15), scale, offset


def _q5_0(blocks: np.ndarray) -> _Decoded:
    return _five_bits(blocks[:, 2:]).view(np.int8) - 16, _halves(blocks[:, :2]), None


def _q5_1(blocks: np.ndarray) -> _Decoded:
    return _five_bits(blocks[:, 4:]), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _five_bits(packed: np.ndarray) -> np.ndarray:
    """Four bytes of upper bits, one for each number, and sixteen of the four bits below."""
    high = np.unpackbits(np.ascontiguousarray(packed[:, :4]), axis=1, bitorder="little")
    return _shifted(packed[:, 4:], 16, (0, 4), 15) | high << 4


def _q4_k(blocks: np.ndarray) -> _Decoded:
    return _shifted(blocks[:, 16:], 32, (0, 4), 15), *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> _Decoded:
    low = _shifted(blocks[:, 48:], 32, (0, 4), 15)
    high = _shifted(blocks[:, 16:48], 32, range(8), 1)
    return low | high << 4, *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> _Decoded:
    low = _shifted(blocks[:, :128], 64, (0, 4), 15)
    high = _shifted(blocks[:, 128:192], 32, (0, 2, 4, 6), 3)
    scale = _halves(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high << 4).view(np.int8) - 32, scale, None


def _shifted(
    packed: np.ndarray, run: int, shifts: range | tuple[int, ...], mask: int
) -> np.ndarray:
    """Numbers of a few bits: each run of bytes holds one run of numbers for each shift.

    uint8 [blocks, bytes] -> uint8 [blocks, bytes · shifts].
    """
    runs = packed.reshape(len(packed), -1, 1, run)
    by_shift = runs >> np.array(list(shifts), np.uint8)[:, None] & np.uint8(mask)
    return by_shift.reshape(len(packed), -1)


def _halves(two_bytes: np.ndarray) -> np.ndarray:
    """The float16 of each block: uint8 [blocks, 2] -> float32 [blocks, 1]."""
    return np.ascontiguousarray(two_bytes).view(np.float16).astype(np.float32)


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and offsets of the eight groups of 32 of a K block, from 6 bits each.

    Bytes 4 to 15: of the first four scales, of the first four offsets, four bits each of the other
    scales and offsets, whose upper two bits are those of the first eight bytes.
    """
    scales, offsets, low = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.hstack([scales & 63, low & 15 | scales >> 6 << 4]).astype(np.float32)
    offset = np.hstack([offsets & 63, low >> 4 | offsets >> 6 << 4]).astype(np.float32)
    return scale * _halves(blocks[:, :2]), -(offset * _halves(blocks[:, 2:4]))


# The bytes of a block, by ggml's names; and the kind of group that holds it.
_DECODERS: dict[str, tuple[Callable[[np.ndarray], _Decoded], int]] = {
    "Q8_0": (_q8_0, 34),
    "Q4_0": (_q4_0, 18),
    "Q4_1": (_q4_1, 20),
    "Q5_0": (_q5_0, 22),
    "Q5_1": (_q5_1, 24),
    "Q4_K": (_q4_k, 144),
    "Q5_K": (_q5_k, 176),
    "Q6_K": (_q6_k, 210),
}
KINDS: dict[str, Blocks] = {
    "Q8_0": Blocks(8, 32, "float16"),
    "Q4_0": Blocks(4, 32, "float16"),
    "Q4_1": Blocks(4, 32, "float16", offset=True),
    "Q5_0": Blocks(8, 32, "float16"),
    "Q5_1": Blocks(8, 32, "float16", offset=True),
    "Q4_K": Blocks(4, 32, "float32", offset=True),
    "Q5_K": Blocks(8, 32, "float32", offset=True),
    "Q6_K": Blocks(8, 16, "float32"),
}
