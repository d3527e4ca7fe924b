"""The GPU's SM clock, memory and driver, through NVML where its binding is installed, else nvidia-smi."""

from __future__ import annotations

import subprocess

import torch


class GpuMonitor:
    """Reads one GPU; what cannot be read is None.

    Attributes
    ----------
    quick : whether reading takes well under a millisecond (NVML), not tens of them (nvidia-smi).
    """

    def __init__(self, device: torch.device) -> None:
        self._uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # indices differ from torch's
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(self._uuid)
            pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM)
            self._nvml = pynvml
        except Exception:  # not installed, or a container that does not allow it: errors of two kinds
            self._nvml = None
        self.quick = self._nvml is not None

    def sm_mhz(self) -> int | None:
        """The SM clock now, in MHz."""
        if self._nvml:
            return self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)
        said = self._nvidia_smi("clocks.sm")
        return int(said) if said and said.isdigit() else None

    def driver(self) -> str | None:
        """The driver's version."""
        if self._nvml:
            version = self._nvml.nvmlSystemGetDriverVersion()
            return version.decode() if isinstance(version, bytes) else version
        return self._nvidia_smi("driver_version")

    def memory_bytes(self) -> int | None:
        """Memory in use, by all processes."""
        if self._nvml:
            return self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        said = self._nvidia_smi("memory.used")
        return int(said) << 20 if said and said.isdigit() else None

    def _nvidia_smi(self, query: str) -> str | None:
        command = ["nvidia-smi", "-i", self._uuid, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None
