"""What is installed, what devices there are, and which implementation each of them gets."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import pathlib
import re
from platform import python_version
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_fp8._src import _ffi, ffi, plan_choice


def choose(
    platform: str,
    capability: int | None = None,
    cublaslt_error: str | None = None,
    kernel_error: str | None = None,
) -> dict[str, dict[str, str | None]]:
    """Which implementation ``implementation=None`` means on a device, and why.

    This restates the dispatch of the handlers (``ffi/scaled_matmul.cc``, ``ffi/cublaslt.cc``).

    Args:
      platform: ``"cpu"``, ``"cuda"`` or another.
      capability: the compute capability of a CUDA device, as 90 for 9.0.
      cublaslt_error: why there is no usable cublasLt, None if there is one.
      kernel_error: why this library's kernels cannot run on the device, None if they can.

    Returns:
      For ``"scaled_matmul"`` and ``"quantize"`` a dict of ``implementation`` (None where a call
      fails), ``why`` and ``note`` (what else there is to know, or None).

    >>> choose("cuda", 86)["scaled_matmul"]["implementation"]
    'decode'
    """
    if platform == "cpu":
        return {
            "scaled_matmul": _choice(
                "xla",
                "a CPU has no FP8 units: XLA multiplies the decoded values in float32",
                "'naive' runs by name",
            ),
            "quantize": _choice("xla", "plain JAX, which XLA compiles", "'kernel' runs by name"),
        }
    if platform != "cuda":
        nothing = _choice(
            None, f"there is no handler for {platform}", "'xla', plain JAX, runs by name"
        )
        return {"scaled_matmul": nothing, "quantize": nothing}
    if capability is None or kernel_error:
        broken = _choice(
            None,
            f"the CUDA runtime cannot use the device: {kernel_error or 'no compute capability'}",
            "'xla', plain JAX, runs by name",
        )
        return {"scaled_matmul": broken, "quantize": broken}
    if capability < 75:
        old = "the default build holds code for compute capability 7.5 and newer alone"
        return {
            "scaled_matmul": _choice("naive", "'decode' begins with 7.5", old),
            "quantize": _choice("kernel", "the one kernel for every GPU", old),
        }
    quantize = _choice("kernel", "the one kernel for every GPU", None)
    if capability < 89:
        product = _choice(
            "decode",
            "FP8 tensor cores begin with 8.9: decoded to float16 for 16-bit tensor cores",
            None,
        )
    elif cublaslt_error:
        product = _choice(
            None,
            f"this device is for cublasLt, and a call fails: {cublaslt_error}",
            "'decode' runs by name",
        )
    else:
        hopper = 90 <= capability < 100
        rows = "inside the GEMM" if hopper else "by a second kernel after the GEMM"
        product = _choice(
            "cublaslt",
            f"FP8 tensor cores; row scales are applied {rows}",
            ("'small_m' up to 16 rows of E4M3 by most of 512 x 2048 and more; " if hopper else "")
            + "for what cublasLt does not take (16-bit activations, E5M2 by E5M2, "
            + ("unaligned data): 'small_m' or 'decode'" if hopper else "blocks, ...): 'decode'"),
        )
    return {"scaled_matmul": product, "quantize": quantize}


def _choice(implementation: str | None, why: str, note: str | None) -> dict[str, str | None]:
    return {"implementation": implementation, "why": why, "note": note}


def info() -> dict[str, Any]:
    """Versions, devices, and the implementation that each device gets.

    Starts JAX's backends and loads cublasLt if there is one. What is missing is said in the
    result and raises nothing.

    Returns:
      A dict of strings, numbers, lists and dicts, fit for JSON, with ``versions``, ``ffi_api``
      (compiled and running), ``driver``, ``cublaslt``, ``plan_choice``, ``cuda_plugin``,
      ``devices`` and ``hints`` (what to do about anything that is missing).
    """
    found, devices_error = _devices()
    api_error = None
    running = ffi._running_api_version()
    cublaslt: dict[str, str | None] = {"version": None, "error": None}
    try:
        cublaslt["version"] = ffi.cublaslt_version()
    except ImportError as error:  # The targets cannot be registered.
        api_error = cublaslt["error"] = str(error)
    except RuntimeError as error:
        cublaslt["error"] = str(error)
    result: dict[str, Any] = {
        "versions": {
            **{name: _version(name) for name in ("jax-fp8", "jax", "jaxlib")},
            "numpy": np.__version__,
            "ml_dtypes": ml_dtypes.__version__,
            "python": python_version(),
        },
        "ffi_api": {
            "compiled": _dotted(_ffi.API_VERSION),
            "running": _dotted(running),
            "error": api_error,
        },
        "driver": _driver(),
        "cuda_plugin": _cuda_plugin(),
        "cublaslt": cublaslt,
        "plan_choice": plan_choice.describe(),
        "devices": [_describe(device, cublaslt["error"]) for device in found],
        "devices_error": devices_error,
    }
    result["hints"] = _hints(result)
    return result


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, int] | None) -> str | None:
    return None if version is None else f"{version[0]}.{version[1]}"


def _driver() -> dict[str, str | None]:
    """The NVIDIA driver's version and the CUDA version that it supports."""
    version = cuda = None
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text):
            version = match.group(1)
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return {"version": version, "cuda": cuda}


def _cuda_plugin() -> str | None:
    for name in ("jax-cuda13-plugin", "jax-cuda12-plugin"):
        if version := _version(name):
            return f"{name} {version}"
    return None


def _devices() -> tuple[list[Any], str | None]:
    """This process's devices, the CPU last, or the reason why there are none."""
    try:
        devices = list(jax.local_devices())
    except RuntimeError as error:
        return [], str(error)
    if all(device.platform != "cpu" for device in devices):
        with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may leave it out.
            devices += jax.local_devices(backend="cpu")
    return devices, None


def _platform(device: Any) -> str:
    """JAX's name, but "cuda" for an NVIDIA device, which JAX calls "gpu"."""
    if device.platform != "gpu":
        return str(device.platform)
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"


def _describe(device: Any, cublaslt_error: str | None) -> dict[str, Any]:
    name = _platform(device)
    capability = kernel_error = None
    if name == "cuda":
        try:  # What the handlers ask: the CUDA runtime that they were linked with.
            capability = _ffi.compute_capability(device.local_hardware_id)
        except RuntimeError as error:
            kernel_error = str(error)
    reported = getattr(device, "compute_capability", None) if name == "cuda" else None
    return {
        "id": device.id,
        "platform": name,
        "kind": device.device_kind,
        "compute_capability": (
            reported if capability is None else f"{capability // 10}.{capability % 10}"
        ),
        **choose(name, capability, cublaslt_error, kernel_error),
    }


def _hints(found: dict[str, Any]) -> list[str]:
    hints = []
    has_gpu = any(device["platform"] == "cuda" for device in found["devices"])
    has_driver = found["driver"]["version"] or found["driver"]["cuda"]
    if has_driver and not has_gpu:
        if found["cuda_plugin"] is None:
            hints.append(
                "there is an NVIDIA driver, but JAX has no CUDA plugin:"
                " install jax[cuda13] or jax[cuda12]"
            )
        else:
            hints.append("there is an NVIDIA driver, but JAX uses no GPU: see JAX's own warnings")
    cuda = found["driver"]["cuda"]
    if has_gpu and cuda and int(cuda.split(".")[0]) < 13:
        hints.append(
            f"the driver supports CUDA {cuda}, and this library's kernels are built with CUDA 13"
            " by default: update the driver to 580 or newer"
        )
    return hints


def format_info(found: dict[str, Any]) -> str:
    """The result of ``info`` as text."""
    api, driver, cublaslt = found["ffi_api"], found["driver"], found["cublaslt"]
    plans = found["plan_choice"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows[0] = ("jax-fp8", found["versions"]["jax-fp8"] or "imported from a folder")
    fits = "PROBLEM: " + api["error"] if api["error"] else "fits"
    rows += [
        (
            "FFI API",
            f"compiled {api['compiled']}, running {api['running'] or 'unknown'}: {fits}",
        ),
        (
            "driver",
            f"{driver['version'] or 'unknown version'}, CUDA {driver['cuda'] or 'unknown'}"
            if driver["version"] or driver["cuda"]
            else "no NVIDIA driver",
        ),
        ("CUDA plugin", found["cuda_plugin"] or "none (extras cuda12 and cuda13 bring it)"),
        ("cublasLt", cublaslt["version"] or f"none: {cublaslt['error']}"),
        (
            "plans",
            f"{plans['mode']}, {plans['choices']} kept"
            + (f" in {plans['file']}" if plans["file"] else ""),
        ),
    ]
    lines = [f"{name:<12} {value}" for name, value in rows]
    for device in found["devices"]:
        capability = device["compute_capability"]
        lines += [
            "",
            f"{device['platform']}:{device['id']}  {device['kind']}"
            + (f", compute capability {capability}" if capability else ""),
        ]
        for operation in ("scaled_matmul", "quantize"):
            choice = device[operation]
            name = choice["implementation"] or "NONE"
            lines.append(f"  {operation:<14} {name:<9} {choice['why']}")
            if choice["note"]:
                lines.append(f"  {'':<24} ({choice['note']})")
    if found["devices_error"]:
        lines += ["", f"JAX has no devices: {found['devices_error']}"]
    return "\n".join(lines + [f"\nhint: {hint}" for hint in found["hints"]])
