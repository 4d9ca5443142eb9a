#!/usr/bin/env python3
"""Makes dequantise.json: random blocks of every format and what ggml's formulas make of them.

The oracle is the Python package `gguf` (gguf.quants), which follows ggml-quants.c. Values are
stored as the hex of their little-endian f32 bytes, so that the comparison is bit for bit.

    pip install gguf numpy
    python golden/tensor/make.py
"""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize

BLOCKS = 3
# Byte offsets of half-precision scales: random bits there could be infinite or NaN, whose payload
# no two implementations need to agree on.
FORMATS = {
    "F32": (4, None),
    "F16": (2, [0]),
    "BF16": (2, None),
    "Q4_0": (18, [0]),
    "Q4_1": (20, [0, 2]),
    "Q5_0": (22, [0]),
    "Q5_1": (24, [0, 2]),
    "Q8_0": (34, [0]),
    "Q4_K": (144, [0, 2]),
    "Q5_K": (176, [0, 2]),
    "Q6_K": (210, [208]),
    "Q2_K": (84, [80, 82]),
    "Q3_K": (110, [108]),
    "IQ4_NL": (18, [0]),
    "IQ4_XS": (136, [0]),
    "MXFP4": (17, []),
}
# Formats added with a block of extreme scales; the blocks of the older ones stay as they were.
EXTREME = {"Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"}


def random_blocks(rng, name, size, halves):
    if name == "F32":
        return rng.standard_normal(BLOCKS).astype("<f4").view(np.uint8).reshape(BLOCKS, size)
    if name == "BF16":
        upper = rng.standard_normal(BLOCKS).astype("<f4").view("<u4") >> 16
        return upper.astype("<u2").view(np.uint8).reshape(BLOCKS, size)
    blocks = rng.integers(0, 256, (BLOCKS, size), dtype=np.uint8)
    for offset in halves:
        # The last block's scales are subnormal halves: flushing them to zero must be noticed.
        scales = rng.standard_normal(BLOCKS) * 0.05
        scales[-1] = 3e-6
        if name in EXTREME:
            # The largest half: products with the largest group scales exceed the halves' range.
            scales[0] = 65504.0
        blocks[:, offset : offset + 2] = scales.astype("<f2").view(np.uint8).reshape(BLOCKS, 2)
    if name == "MXFP4":
        # Both subnormal scales and the largest that leaves every value finite.
        blocks[:, 0] = [0, 1, 252]
    return blocks


def main():
    rng = np.random.default_rng(20261125)
    cases = []
    for name, (size, halves) in FORMATS.items():
        blocks = random_blocks(rng, name, size, halves)
        values = dequantize(blocks.reshape(-1), gguf.GGMLQuantizationType[name])
        cases.append(
            {
                "dtype": name,
                "ggml_type": int(gguf.GGMLQuantizationType[name]),
                "blocks": blocks.tobytes().hex(),
                "values": values.astype("<f4").tobytes().hex(),
            }
        )
    path = Path(__file__).with_name("dequantise.json")
    path.write_text(json.dumps({"source": "gguf.quants, seed 20261125", "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
