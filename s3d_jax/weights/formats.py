"""Weight formats by name.

To add a format, write it in a file of this folder, add it to `FORMATS`, and describe it in
`settings.model.QUANTIZATIONS`. No other file knows which formats there are.
"""

from s3d_jax.settings.model import ModelConfig
from s3d_jax.weights.base import WeightFormat
from s3d_jax.weights.dense import Dense
from s3d_jax.weights.int8 import Int8

FORMATS: dict[str | None, WeightFormat] = {
    None: Dense(),
    "int8": Int8(rotated=True),
    "int8-plain": Int8(rotated=False),
}


def weight_format(config: ModelConfig) -> WeightFormat:
    """The format of a model's matrices."""
    return FORMATS[config.quantization]


def exact_sums(config: ModelConfig) -> bool:
    """Whether the model's norms and attention sum independently of the order (`exact`)."""
    asked = config.exact_sums
    return weight_format(config).exact_sums if asked is None else asked
