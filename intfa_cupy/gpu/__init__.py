"""Quantisation and attention on the GPU: buffers, launches, and the caller's stream.

Nothing here waits for the device: kernels go to the current stream of CuPy, or of torch for torch tensors,
and the calls can be captured in a CUDA graph.

    devices     the device, the stream, the kernels loaded there
    params      the structs that carry a kernel's arguments
    arena       many arrays in one allocation
    views       arrays of any library as strided memory, results as the caller's kind
    quantizer   quantisation into the packed layout
    transfer    quantised tensors made elsewhere
    launch      the attention kernels
"""

from .devices import device, matrix_library, unavailable
from .launch import attention, bind
from .params import ATTENTION_PARAMS, QUANTIZE_PARAMS
from .quantizer import quantize, quantizer_defines
from .transfer import upload

__all__ = [
    "ATTENTION_PARAMS",
    "QUANTIZE_PARAMS",
    "attention",
    "bind",
    "device",
    "matrix_library",
    "quantize",
    "quantizer_defines",
    "unavailable",
    "upload",
]
