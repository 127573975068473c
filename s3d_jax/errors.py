"""The exceptions of s3d_jax. Every message says what was wrong, where, and what to do about it."""


class S3DError(Exception):
    """Base class of every error that s3d_jax raises on purpose.

    Its text has no control characters: names from files may hold some, and terminals obey them.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class ConfigError(S3DError, ValueError):
    """A model, draft or sampling setting that is unknown, contradictory or out of range."""


class InputError(S3DError, ValueError):
    """A prompt or generation argument that cannot be used."""


class CheckpointError(S3DError):
    """A checkpoint folder that is missing, incomplete, corrupt, or of another format."""


class DeviceError(S3DError):
    """The device that JAX is to compute on is not there, or has too little free memory."""


class ConversionError(CheckpointError):
    """Weights that cannot be converted; lists every offending tensor at once."""


class NumericalError(S3DError):
    """Results that are no numbers: a computation overflowed its dtype, or weights hold NaN."""


class TrainingError(S3DError):
    """A training run that cannot begin, resume or continue, or that has made the draft worse."""
