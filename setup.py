"""Builds `_C_cpu.so` and `_C_cuda.so` where it can; installs pure Python and Triton where it can't.

torch is imported only while the extensions are built, so metadata can be read without it. The libraries use
torch's stable ABI: one build serves every supported torch. Environment variables:

FASTSHAP_SKIP_CPP=1     install without the compiled libraries
FASTSHAP_SKIP_CUDA=1    install without the CUDA one
FASTSHAP_FORCE_BUILD=1  fail instead of falling back; also where there is no CUDA toolkit for a torch with CUDA,
                        unless FASTSHAP_SKIP_CUDA=1
TORCH_CUDA_ARCH_LIST    devices to compile for, such as "8.0;9.0+PTX" (default: 8.0 to 12.0)
CUDA_HOME               the CUDA toolkit (default: where nvcc on the PATH leads)
NVCC_APPEND_FLAGS       extra flags of nvcc, as everywhere
MAX_JOBS=N              compile N files at a time (default: the number of cores)
CXX, CXXFLAGS           compiler and extra flags, as everywhere
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# The oldest supported torch: nothing newer than its stable ABI is used.
DEFINITIONS = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wno-psabi"]
# The report of registers, shared memory and spills goes to a file beside each object.
REPORT = ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
CUDA_FLAGS = [*REPORT, "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, or the folder that the nvcc on the PATH belongs to, be it a script that calls it."""
    if os.environ.get("CUDA_HOME"):
        return Path(os.environ["CUDA_HOME"])
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # nvcc names its own folder, which a wrapper script on the PATH does not.
    shown = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = re.search(r"^#\$ TOP=(.*)$", shown, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else Path(nvcc).resolve().parents[1]


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list such as "8.0;9.0+PTX"."""
    flags = []
    for name in re.split(r"[;\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", name)
        if match is None:
            raise ValueError(f'TORCH_CUDA_ARCH_LIST must look like "8.0;9.0+PTX", but it has {name!r}')
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def compile_and_log(command: list[str], target: Path) -> None:
    """Runs a compiler and keeps what it says in `target` with the suffix .log."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    target.with_suffix(".log").write_text(done.stdout)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")


class BuildLibraries(build_ext):
    """Compiles plain shared libraries that `torch.ops.load_library` opens."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def get_export_symbols(self, ext):
        return []  # a shared library of operators: there is no PyInit

    def build_extension(self, ext) -> None:
        try:
            if ext.name.endswith("_C_cuda"):
                self.build_cuda(ext)
            else:
                self.build_cpu(ext)
        except Exception as error:
            if flag("FASTSHAP_FORCE_BUILD"):
                raise
            print(
                f"fastshap_kernels: {ext.name} was not built ({error}).\n"
                "fastshap_kernels: the package works without it, slower. To get it, install torch, a C++20 compiler "
                "and, for CUDA, its toolkit first, then: pip install --no-build-isolation fastshap-kernels",
                file=sys.stderr,
            )

    def build_cpu(self, ext) -> None:
        import torch

        package = Path(torch.__file__).parent
        includes = [str(ROOT / "csrc" / "include"), str(package / "include")]

        def compile_one(source: str) -> list[str]:
            flags = [*CPU_FLAGS, *DEFINITIONS]
            return self.compiler.compile(
                [source], output_dir=self.build_temp, include_dirs=includes, extra_postargs=flags, depends=ext.depends
            )

        self.link(ext, package, self.in_parallel(compile_one, ext.sources), ["torch_cpu", "torch"])

    def build_cuda(self, ext) -> None:
        import torch

        if torch.version.cuda is None:
            return  # this torch never sees a CUDA tensor
        home = find_cuda()
        if home is None:
            raise RuntimeError("nvcc is not on the PATH and CUDA_HOME is not set")
        package = Path(torch.__file__).parent
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        includes = [f"-I{folder}" for folder in (ROOT / "csrc" / "include", package / "include", home / "include")]
        flags = [*CUDA_FLAGS, *DEFINITIONS, f'-DFASTSHAP_ARCHITECTURES="{architectures}"']
        flags += [*includes, *architecture_flags(architectures)]

        def compile_one(source: str) -> list[str]:
            target = Path(self.build_temp) / f"{source}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            newest = max(Path(path).stat().st_mtime for path in [source, *ext.depends])
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                compile_and_log([str(home / "bin" / "nvcc"), *flags, "-c", source, "-o", str(target)], target)
            return [str(target)]

        objects = self.in_parallel(compile_one, ext.sources)
        # Nothing here calls a function of libtorch_cuda by name, and the linker would leave it out.
        self.link(ext, package, objects, ["torch_cpu", "torch_cuda", "torch"], ["-Wl,--no-as-needed"], home)

    def in_parallel(self, compile_one, sources: list[str]) -> list[str]:
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            return [name for names in pool.map(compile_one, sources) for name in names]

    def link(self, ext, package: Path, objects: list[str], libraries: list[str], extra=(), cuda: Path | None = None):
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        folders = [str(package / "lib")]
        if cuda is not None:
            # Statically: the package then needs no CUDA runtime beside torch's.
            folders += [str(folder) for folder in (cuda / "lib64", cuda / "lib") if folder.is_dir()]
            libraries = [*libraries, "cudart_static", "rt", "pthread", "dl"]
        self.compiler.link_shared_object(
            objects,
            str(library),
            library_dirs=folders,
            libraries=libraries,
            extra_preargs=list(extra),
            target_lang="c++",
        )


def extension(name: str, folder: str) -> Extension:
    sources = [path for kind in ("*.cpp", "*.cu") for path in (ROOT / "csrc" / folder).glob(kind)]
    headers = (ROOT / "csrc" / "include").rglob("*.h")
    relative = [sorted(str(path.relative_to(ROOT)) for path in paths) for paths in (sources, headers)]
    return Extension(f"fastshap_kernels.{name}", relative[0], depends=relative[1])


def extensions() -> list[Extension]:
    if flag("FASTSHAP_SKIP_CPP"):
        return []
    libraries = [extension("_C_cpu", "cpu")]
    return libraries if flag("FASTSHAP_SKIP_CUDA") else [*libraries, extension("_C_cuda", "cuda")]


# The gate reads the flags above without building.
if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildLibraries})
