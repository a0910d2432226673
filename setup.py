"""Builds `_C_cpu.so` and `_C_cuda.so` where it can; installs pure Python and Triton where it can't.

torch is imported only while the libraries are built, so metadata can be read without it. They use torch's stable ABI
and no Python ABI: one build serves every supported torch and Python. CONTRIBUTING.md lists the environment variables.
"""

import os
import re
import subprocess
import sys
from contextlib import suppress
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1, which still builds in place
    from wheel.bdist_wheel import bdist_wheel

# The oldest supported torch: nothing newer than its stable ABI is used.
COMMON = ["-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_FLAGS = [*COMMON, "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
CUDA_FLAGS = [*COMMON, "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
# Nothing calls libtorch_cuda by name: the linker would leave it out. With cudart static no other runtime is needed.
CUDA_LINK = ["-Wl,--no-as-needed", "-ltorch_cuda", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
REMEDY = """Every op works all the same, slower. For the kernels, have a C++20 compiler, for CUDA its toolkit, and from
pip torch, ninja and "setuptools>=77"; then build beside that torch, which pip hides unless told otherwise:
pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps fastshap-kernels  (in a checkout: `.`)"""


def flag(name: str) -> bool:
    return os.environ.get(f"FASTSHAP_{name}", "0").lower() not in ("", "0", "false", "no")


def find_cuda() -> str | None:
    """The CUDA toolkit: CUDA_HOME, or what the nvcc on the PATH belongs to, be it a script that calls the real one."""
    shown = subprocess.run("nvcc --dryrun -c x.cu", shell=True, capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", shown, re.MULTILINE)
    return os.environ.get("CUDA_HOME") or (top and os.path.realpath(top[1].strip()))


class BuildLibraries(build_ext):
    """Hands each library to torch's BuildExtension, and goes on without those that can't be built."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extensions(self) -> None:
        wanted, self.extensions, problems = self.extensions, [], []
        for library in wanted:
            try:
                self.build_library(library, library.name.rpartition("_")[2])
            except Exception as error:
                if flag("FORCE_BUILD"):
                    raise
                problems.append(f"{library.name} WAS NOT BUILT: {error}")
        if problems:
            text = "\n".join(["", "*" * 100, *problems, REMEDY, "*" * 100, ""])
            print(text, file=sys.stderr)
            with suppress(OSError), open("/dev/tty", "w") as terminal:  # pip keeps what a build prints to itself
                terminal.write("" if sys.stderr.isatty() else text)

    def build_library(self, library: Extension, device: str) -> None:
        # Before torch looks: ninja may lie in an environment that is not activated, and nvcc be a script elsewhere.
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)])
        os.environ |= {"CUDA_HOME": find_cuda() or "", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
        import torch
        from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

        if (cuda := device == "cuda") and torch.version.cuda is None:
            return  # this torch never sees a CUDA tensor
        library.libraries, library.library_dirs = ["torch_cpu", "torch"], library_paths(device)
        library.include_dirs = [os.path.abspath("csrc/include"), *include_paths(device)]
        library.extra_link_args = CUDA_LINK if cuda else []
        defined = [f'-DFASTSHAP_ARCHITECTURES="{ARCHITECTURES}"'] if cuda else []
        cxx = [*CPU_FLAGS, *defined, *os.environ.get("CXXFLAGS", "").split()]
        library.extra_compile_args = {"cxx": cxx, "nvcc": CUDA_FLAGS}
        # A folder each, for the build.ninja in it.
        command = BuildExtension(self.distribution, no_python_abi_suffix=True)
        command.build_lib, command.build_temp = self.build_lib, os.path.join(self.build_temp, device)
        command.ensure_finalized()
        command.extensions = [library]
        command.run()
        self.extensions.append(library)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2] if self.get_finalized_command("build_ext").extensions else "any"


# The gate reads the flags above without building.
if __name__ == "__main__":
    devices = [] if flag("SKIP_CPP") else ["cpu"] if flag("SKIP_CUDA") else ["cpu", "cuda"]
    headers = glob("csrc/include/**/*.h", recursive=True)
    libraries = [Extension(f"fastshap_kernels._C_{x}", glob(f"csrc/{x}/*.c*"), depends=headers) for x in devices]
    setup(ext_modules=libraries, cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel})
