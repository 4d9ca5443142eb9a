#!/usr/bin/env python3
"""Makes layers.json: random layers packed as GPTQ, AWQ, EXL2 and EXL3, and their weights' digests.

Independent of the Rust code. GPTQ and AWQ are packed as AutoGPTQ and AutoAWQ pack, and the weights
follow from the unpacked integers. EXL2 is packed from integers as exllamav2's pack kernels do, before
the shuffle at load. EXL3 tiles are random words, decoded by scalar code that follows exllamav3's
CUDA sources; the Hadamard products are matrix products. A weight matrix (N, K) of halves is stored
as the sha256 of its little-endian bytes.

    pip install numpy
    python golden/quantised/make.py
"""

import hashlib
import json
from pathlib import Path

import numpy as np

RNG = np.random.default_rng(20261126)


def tensor(array, kind):
    array = np.ascontiguousarray(array)
    return {"type": kind, "shape": list(array.shape), "hex": array.tobytes().hex()}


def case(name, config, tensors, weights):
    """What layers.json says of a layer, and its weights (N, K)."""
    weights = np.ascontiguousarray(weights.astype("<f2"))
    layer = {
        "name": name,
        "config": config,
        "tensors": tensors,
        "shape": list(weights.shape),
        "first": [int(x) for x in weights.view("<u2").reshape(-1)[:4]],
        "sha256": hashlib.sha256(weights.tobytes()).hexdigest(),
    }
    return layer, weights


def pack_stream(values, bits):
    """Columns of integers to columns of words: one contiguous stream each, lowest bits first."""
    words = np.zeros((values.shape[0] * bits // 32, values.shape[1]), "<u4")
    for column in range(values.shape[1]):
        number = 0
        for i, value in enumerate(values[:, column]):
            number |= int(value) << (i * bits)
        for w in range(words.shape[0]):
            words[w, column] = (number >> (32 * w)) & 0xFFFFFFFF
    return words


def half_scales(shape, extreme):
    scales = (RNG.random(shape) * 0.02 + 0.001).astype("<f2")
    if not extreme:
        return scales
    scales.flat[0] = 60000.0  # products overflow to infinity, as in the reference
    scales.flat[-1] = 6e-8  # subnormal
    return scales


def product(q, zero, scale):
    with np.errstate(over="ignore"):
        return (q.astype(np.float16) - zero.astype(np.float16)) * scale


def gptq(bits, version, group, act_order, symmetric, k=96, n=32, extreme=True):
    size = k if group == -1 else group
    groups = -(-k // size)
    q = RNG.integers(0, 2**bits, (k, n))
    zero = np.full((groups, n), 2 ** (bits - 1)) if symmetric else RNG.integers(0, 2**bits, (groups, n))
    scales = half_scales((groups, n), extreme)
    index = np.arange(k) // size
    if act_order:
        index = RNG.permutation(index)
    stored = zero if version == "gptq_v2" else (zero - 1) % 2**bits
    tensors = {
        "qweight": tensor(pack_stream(q, bits), "I32"),
        "qzeros": tensor(pack_stream(stored.T, bits).T, "I32"),
        "scales": tensor(scales, "F16"),
    }
    if act_order:
        tensors["g_idx"] = tensor(index.astype("<i4"), "I32")
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "checkpoint_format": version}
    return case(f"gptq {bits} {version} {group} {act_order}", config, tensors, product(q, zero[index], scales[index]).T)


def awq(version, group, k=256, n=24, extreme=True):
    groups = k // group
    q, zero = RNG.integers(0, 16, (k, n)), RNG.integers(0, 16, (groups, n))
    scales = half_scales((groups, n), extreme)
    weights = product(q, np.repeat(zero, group, 0), np.repeat(scales, group, 0)).T
    if version == "gemm":
        order = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(x):
            grouped = x.reshape(x.shape[0], -1, 8)[:, :, order].astype("<u4")
            return np.bitwise_or.reduce(grouped << (4 * np.arange(8, dtype="<u4")), axis=2)

        tensors = {"qweight": tensor(pack(q), "I32"), "qzeros": tensor(pack(zero), "I32"), "scales": tensor(scales, "F16")}
    else:
        multiple = 1 if group >= 128 else 2 if group == 64 else 4
        width = -(-(-(-groups // 8)) // multiple) * multiple
        padded_zero = np.zeros((n, 8 * width), int)
        padded_zero[:, :groups] = zero.T
        padded_scale = np.zeros((n, 8 * width), "<f2")
        padded_scale[:, :groups] = scales.T
        tensors = {
            "qweight": tensor(pack_stream(q, 4).T, "I32"),
            "qzeros": tensor(pack_stream(padded_zero.T, 4).T, "I32"),
            "scales": tensor(padded_scale, "F16"),
        }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version, "zero_point": True}
    return case(f"awq {version} {group}", config, tensors, weights)


def exl2(widths, n=16):
    words, pairs, rows = [], [], []
    scale = RNG.integers(0, 16, (len(widths), n))
    most = (RNG.random(len(widths)) * 2 + 0.1).astype("<f2")
    first = 0
    for g, (bits, count) in enumerate(widths):
        q = RNG.integers(0, 2**bits, (count, n))
        words.append(pack_stream(q, bits))
        pairs += [bits, first]
        first += words[-1].shape[0]
        step = ((scale[g] + 1) ** 2).astype(np.float16) * (most[g] / np.float16(256)).astype(np.float16)
        rows.append((q - 2 ** (bits - 1)).astype(np.float16) * step)
    stored = np.concatenate(rows)
    inverse = RNG.permutation(len(stored))
    tensors = {
        "q_weight": tensor(np.concatenate(words), "I32"),
        "q_groups": tensor(np.array(pairs, "<i2"), "I16"),
        "q_scale": tensor(pack_stream(scale.T, 4).T, "I32"),
        "q_scale_max": tensor(most, "F16"),
        "q_invperm": tensor(inverse.astype("<i4"), "I32"),
    }
    # exllamav2 writes stored row j to input feature q_perm[j], q_perm = argsort(q_invperm).
    weights = np.zeros_like(stored)
    weights[np.argsort(inverse)] = stored
    return case(f"exl2 {widths}", {"quant_method": "exl2", "bits": 4.0}, tensors, weights.T)


def decode(codebook, x):
    if codebook == "mul1":
        x = x * 0x83DCD12D & 0xFFFFFFFF
        total = 1024 + sum(x >> s & 255 for s in (0, 8, 16, 24))
        factor, bias = (float(np.array(b, "<u2").view("<f2")) for b in (0x1EEE, 0xC931))
        return np.float16(total * factor + bias)
    x = x * 0xCBAC1FED if codebook == "mcg" else x * 89226354 + 64248484
    x = (x & 0x8FFF8FFF) ^ 0x3B603B60
    low, high = np.array([x & 0xFFFF, x >> 16], "<u2").view("<f2")
    return low + high


def exl3(bits, codebook, old, k=128, n=128):
    trellis = RNG.integers(0, 65536, (k // 16, n // 16, 16 * bits), dtype="<u2")
    w = np.zeros((k, n), np.float16)
    for tk in range(k // 16):
        for tn in range(n // 16):
            words = trellis[tk, tn].view("<u4")
            stream = int("".join(f"{int(word):032b}" for word in words), 2)
            total = 256 * bits
            doubled = stream << total | stream
            for lane in range(32):
                for i in range(8):
                    end = (lane * 8 + i + 1) * bits
                    state = doubled >> (total - end) & 0xFFFF
                    row = lane % 4 * 2 + (i & 1) + (8 if i & 2 else 0)
                    column = lane // 4 + (8 if i & 4 else 0)
                    w[16 * tk + row, 16 * tn + column] = decode(codebook, state)
    h = np.array([[1.0]])
    while len(h) < 128:
        h = np.block([[h, h], [h, -h]])
    scale = float(np.float32(1.0) / np.sqrt(np.float32(128.0)))
    tensors = {"trellis": tensor(trellis, "I16")}
    if old:
        signs = [RNG.integers(0, 2, size) for size in (k, n)]
        left, right = [(1 - 2 * s).astype(np.float16) for s in signs]
        for name, s in zip(("su", "sv"), signs):
            tensors[name] = tensor((s.reshape(-1, 16) << np.arange(16)).sum(1).astype("<u2"), "I16")
    else:
        left, right = [RNG.standard_normal(size).astype("<f2") for size in (k, n)]
        tensors["suh"], tensors["svh"] = tensor(left, "F16"), tensor(right, "F16")
    if codebook != "default":
        tensors[codebook] = {"type": "I32", "shape": [], "hex": "00000000"}
    # Sums of 128 halves are exact in f64, so the order of the product does not matter.
    h_k, h_n = (np.kron(np.eye(size // 128), h) for size in (k, n))
    w = ((h_k @ w.astype(float)) * scale).astype(np.float16) * left[:, None]
    w = ((w.astype(float) @ h_n) * scale).astype(np.float16) * right[None, :]
    return case(f"exl3 {bits} {codebook}", {"quant_method": "exl3", "bits": bits}, tensors, w.T)


def main():
    cases = []
    for bits in (2, 3, 4, 8):
        for version in ("gptq", "gptq_v2"):
            cases.append(gptq(bits, version, 32, False, False))
            cases.append(gptq(bits, version, 32, True, True))
        cases.append(gptq(bits, "gptq", -1, False, True))
    cases += [awq(version, group) for version in ("gemm", "gemv") for group in (32, 64, 128)]
    cases.append(exl2([(8, 32), (6, 32), (5, 64), (4, 32), (3, 32), (2, 48)]))
    cases.append(exl2([(4, 128), (4, 32)]))
    books = ("default", "mcg", "mul1")
    cases += [exl3(bits, books[bits % 3], bits % 2 == 0) for bits in range(1, 9)]
    cases += [exl3(4, book, False) for book in ("default", "mul1")]
    text = ",\n".join(json.dumps(layer) for layer, _ in cases)
    Path(__file__).with_name("layers.json").write_text("[\n" + text + "\n]\n")


if __name__ == "__main__":
    main()
