"""INT8 attention for NVIDIA GPUs: INT-FlashAttention in CuPy raw kernels, with an exact NumPy model."""

from .api import attention, attention_quantized, explain, quantize_qkv
from .dispatch import BackendStatus, Plan, UnsupportedError, backends
from .metrics import ErrorReport, error_report
from .problem import Problem
from .quantized import QuantizedQKV, QuantizedTensor
from .recipes import Recipe, recipes
from .reference import reference_attention

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "ErrorReport",
    "Plan",
    "Problem",
    "QuantizedQKV",
    "QuantizedTensor",
    "Recipe",
    "UnsupportedError",
    "attention",
    "attention_quantized",
    "backends",
    "error_report",
    "explain",
    "quantize_qkv",
    "recipes",
    "reference_attention",
]
