"""GPUs as XLA wants them described: limits and sizes of NVIDIA's data sheets, in the text form of a GpuTargetConfig."""

from __future__ import annotations

__all__ = ["GPUS"]

_LIMITS = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536"""


def _gpu(
    name: str, major: int, cores: int, bandwidth: float, memory: int, cache: int, shared: int, clock: float
) -> str:
    """One GPU.

    Args:
      name: what JAX calls its kind.
      major: of its compute capability; the minor is 0.
      cores: multiprocessors.
      bandwidth: bytes a second of its memory.
      memory, cache, shared: bytes of its memory, of its second cache, and of what the blocks of a core share.
      clock: GHz.
    """
    return f"""gpu_device_info {{{_LIMITS}
  core_count: {cores}
  fpus_per_core: {128 if major >= 9 else 64}
  memory_bandwidth: {round(bandwidth)}
  device_memory_size: {memory}
  l2_cache_size: {cache}
  shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared - 1024}
  clock_rate_ghz: {clock}
  cuda_compute_capability {{ major: {major} minor: 0 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""


GPUS = {
    "h100": _gpu("NVIDIA H100 80GB HBM3", 9, 132, 3.35e12, 80 << 30, 50 << 20, 228 << 10, 1.98),
    "h200": _gpu("NVIDIA H200", 9, 132, 4.8e12, 141 << 30, 50 << 20, 228 << 10, 1.98),
    "a100": _gpu("NVIDIA A100-SXM4-80GB", 8, 108, 2.04e12, 80 << 30, 40 << 20, 164 << 10, 1.41),
}
