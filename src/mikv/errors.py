"""Every exception mikv raises on purpose.

MiKVError
├── ConfigError            an option, preset or budget that cannot work            (also a ValueError)
├── UnsupportedModelError  a model or mask that mikv does not handle correctly     (also a ValueError)
├── NumericsError          NaN, Inf or a scale that does not fit 16 bits           (also an ArithmeticError)
├── CacheStateError        an operation the cache cannot do in its present state   (also a RuntimeError)
├── CheckpointError        a cache or model file that is missing, broken or newer  (also a ValueError)
└── ModelNotFoundError     the model asked for is not on this machine              (also a FileNotFoundError)
"""


class MiKVError(Exception):
    """Base class of all errors raised by mikv."""


class ConfigError(MiKVError, ValueError):
    """An option has a value that cannot work."""


class UnsupportedModelError(MiKVError, ValueError):
    """The model, or the attention it asks for, is not one mikv computes correctly."""


class NumericsError(MiKVError, ArithmeticError):
    """Keys or values cannot be quantized: NaN, Inf, or a scale beyond the range of 16-bit floats."""


class CacheStateError(MiKVError, RuntimeError):
    """The cache cannot do this in its present state."""


class CheckpointError(MiKVError, ValueError):
    """A saved cache or model is missing, damaged, of a newer version, or of another model."""


class ModelNotFoundError(MiKVError, FileNotFoundError):
    """The model asked for is not available on this machine."""
