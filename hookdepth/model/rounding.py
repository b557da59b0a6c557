"""Settings of a process that change rounding, and that the engine does not set itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ENVIRONMENT = (
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_CUDNN_SDPA_ENABLED",
)

_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")
_MATMUL = (
    "fp32_precision",
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


def rounding_of(device: torch.device) -> dict[str, Any]:
    """Settings of this process that change rounding on a device, and that the engine does not set itself: JSON-able.

    Of a CPU they are the number of threads, the instructions in use, whether denormal numbers are flushed to 0 and
    whether oneDNN may round to 16 bits; of a GPU, which short cuts its libraries may take. Attention kernels that are
    switched off, deterministic algorithms and variables of the environment that the libraries heed belong to both.
    """
    backends: Any = torch.backends
    cuda: Any = backends.cuda
    kernels = [name for name in _ATTENTION if getattr(cuda, f"{name}_sdp_enabled", lambda: False)()]
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "sdp": [name for name in kernels if name != "cudnn"] or kernels,  # the engine turns cuDNN's off
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
    }
    if device.type == "cuda":
        found |= {f"matmul.{name}": _flag(cuda.matmul, name) for name in _MATMUL}
        found |= {f"cudnn.{name}": _flag(backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark")}
        found["blas"] = str(cuda.preferred_blas_library())
    else:
        found["mkldnn.enabled"] = bool(torch._C._get_mkldnn_enabled())
        found["mkldnn.fp32_precision"] = _flag(getattr(backends.mkldnn, "matmul", None), "fp32_precision")
        found["cpu"] = backends.cpu.get_cpu_capability()
        found["denormals"] = bool((torch.full((1,), 1e-40, dtype=torch.float32) * 1.0).item())
    return found


def _flag(owner: Any, name: str) -> Any:
    value = getattr(owner, name, None)
    if (name, value) == ("fp32_precision", "none"):
        return "ieee"  # what nobody has set, under the name that it has once it was set and put back
    return value if isinstance(value, bool | str | int | type(None)) else str(value)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads in this process, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
