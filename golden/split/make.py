"""A tiny model split into several GGUF files by llama.cpp.

    python golden/split/make.py GGUF_SPLIT     # llama.cpp's program llama-gguf-split; no package

README.md holds what is written.
"""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
WHOLE = HERE / "../families/llama-llama3/model.gguf"
SETS = {"tiny": [], "bare": ["--no-tensor-first-split"]}


def main():
    for old in HERE.glob("*.gguf"):
        old.unlink()
    for name, options in SETS.items():
        command = [sys.argv[1], "--split", "--split-max-tensors", "9", *options, WHOLE, HERE / name]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for file in sorted(HERE.glob("*.gguf")):
        print(file.name, file.stat().st_size)


if __name__ == "__main__":
    main()
