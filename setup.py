"""Builds `_C_cpu.so` where there is a compiler and torch; installs pure Python where there is not.

torch is imported only while the extension is built, so metadata can be read without it. The library
uses torch's stable ABI: one build serves every supported torch. Environment variables:

FASTSHAP_SKIP_CPP=1     install without the compiled library
FASTSHAP_FORCE_BUILD=1  fail instead of falling back to pure Python
MAX_JOBS=N              compile N files at a time (default: the number of cores)
CXX, CXXFLAGS           compiler and extra flags, as everywhere
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The oldest supported torch: nothing newer than its stable ABI is used.
TORCH_TARGET_VERSION = "0x020b000000000000"
COMPILE_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


class BuildLibraries(build_ext):
    """Compiles `_C_cpu.so`, a plain shared library that `torch.ops.load_library` opens."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext):
        return []  # a shared library of operators: there is no PyInit

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if flag("FASTSHAP_FORCE_BUILD"):
                raise
            print(
                f"fastshap_kernels: the compiled CPU library was not built ({error}).\n"
                "fastshap_kernels: the package works without it, slower. To get it, install torch and a C++20 "
                "compiler first, then: pip install --no-build-isolation fastshap-kernels",
                file=sys.stderr,
            )

    def build_extension(self, ext) -> None:
        import torch

        package = Path(torch.__file__).parent
        flags = [*COMPILE_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]
        includes = [str(ROOT / "csrc" / "include"), str(package / "include")]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> list[str]:
            return self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=includes, extra_postargs=flags, depends=ext.depends
            )

        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(library),
            library_dirs=[str(package / "lib")],
            libraries=["torch_cpu", "torch"],
            target_lang="c++",
        )


sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "include").rglob("*.h"))
extensions = [] if flag("FASTSHAP_SKIP_CPP") else [Extension("fastshap_kernels._C_cpu", sources, depends=headers)]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})
