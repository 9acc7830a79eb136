"""Compiles CUDA sources with the run-time compiler, NVRTC, which needs no GPU for it.

usage: nvrtc.py LIBRARY PROGRAM FOLDER ARCHITECTURE [OPTION ...]

As in production there is no include path: the files of FOLDER are handed over as text. What the
compiler says is printed, registers and spills of each kernel included.
"""

import ctypes
import pathlib
import sys


def strings(values):
    return (ctypes.c_char_p * len(values))(*values)


def main():
    library, program, folder, architecture, *options = sys.argv[1:]
    nvrtc = ctypes.CDLL(library)
    files = sorted(pathlib.Path(folder).glob("*.cu*"))
    names = [file.name.encode() for file in files]
    texts = [file.read_bytes() for file in files]
    options += [f"--gpu-architecture={architecture}", "--ptxas-options=--verbose"]

    handle = ctypes.c_void_p()
    text = pathlib.Path(program).read_bytes()
    arguments = (text, b"entente.cu", len(files), strings(texts), strings(names))
    if nvrtc.nvrtcCreateProgram(ctypes.byref(handle), *arguments) != 0:
        sys.exit("nvrtcCreateProgram failed")
    encoded = [option.encode() for option in options]
    failed = nvrtc.nvrtcCompileProgram(handle, len(encoded), strings(encoded)) != 0
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(handle, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(handle, log)
    print(log.value.decode())
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
