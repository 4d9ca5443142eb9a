#!/usr/bin/env python3
"""Writes statistics.json: what numpy and scipy give for the statistics of crate `metrics`.

Needs numpy and scipy. Run it in this folder; the file changes only if a definition does.
"""

import json

import numpy as np
from scipy import stats
from scipy.special import log_softmax


def fidelity(rng: np.random.Generator, lengths: tuple) -> dict:
    """A model and its reference on sequences; the last position of each has no token behind it."""
    v, n = 11, sum(lengths)
    p = rng.normal(0, 3, (n, v)).astype(np.float32)
    q = (p + rng.normal(0, 0.5, (n, v))).astype(np.float32)
    following = rng.integers(0, v, n)
    ln_p, ln_q = log_softmax(p.astype(float), axis=1), log_softmax(q.astype(float), axis=1)
    klds = np.array([stats.entropy(np.exp(a), np.exp(b)) for a, b in zip(ln_p, ln_q)])
    of = np.repeat(np.arange(len(lengths)), lengths)
    ends = np.cumsum(lengths) - 1
    inner = np.setdiff1d(np.arange(n), ends)
    rows = np.arange(n)
    losses = (ln_p - ln_q)[rows, following]
    shifts = (np.exp(ln_q) - np.exp(ln_p))[rows, following]

    def error(values: np.ndarray, groups: np.ndarray) -> float | None:
        m = len(lengths)
        if m < 2:
            return None
        totals = np.array([np.sum(values[groups == g] - values.mean()) for g in range(m)])
        # The mean of the totals, which np.var subtracts, is zero.
        return float(np.sqrt(m * np.var(totals, ddof=1)) / len(values))

    return {
        "lengths": list(lengths), "reference": p.tolist(), "other": q.tolist(),
        "following": following.tolist(),
        "kld_mean": float(klds.mean()), "kld_mean_se": error(klds, of),
        "kld_median": float(np.median(klds)), "kld_p99": float(np.quantile(klds, 0.99)),
        "kld_max": float(klds.max()), "top1": float(np.mean(p.argmax(1) == q.argmax(1))),
        "ln_ppl_ratio": float(losses[inner].mean()),
        "ln_ppl_ratio_se": error(losses[inner], of[inner]),
        "rms_dp": float(np.sqrt(np.mean(shifts[inner] ** 2))),
    }


def main() -> None:
    rng = np.random.Generator(np.random.PCG64(20240607))
    cases = {"quantile": [], "auroc": [], "wilson": [], "theil_sen": [], "kld": [], "fidelity": [], "tost": []}
    for n in (1, 2, 3, 10, 57):
        values = rng.normal(size=n).round(2).tolist()
        for p in (0.0, 0.05, 0.25, 0.5, 0.731, 0.95, 1.0):
            found = float(np.quantile(values, p, method="linear"))
            cases["quantile"].append({"values": values, "p": p, "expected": found})
    for n, m, ties in ((5, 7, False), (30, 20, True), (50, 60, True), (4, 4, True)):
        lower, higher = rng.normal(0.0, 1.0, n), rng.normal(0.7, 1.0, m)
        if ties:
            lower, higher = (lower * 2).round() / 2, (higher * 2).round() / 2
        u = stats.mannwhitneyu(higher, lower).statistic
        cases["auroc"].append(
            {"lower": lower.tolist(), "higher": higher.tolist(), "expected": float(u) / (n * m)}
        )
    for k, n in ((6, 6), (0, 6), (5, 6), (46, 50), (90, 100), (1, 1000), (98, 100), (0, 180)):
        interval = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        cases["wilson"].append(
            {"successes": k, "trials": n, "low": interval.low, "high": interval.high}
        )
    for n in (2, 5, 12, 40):
        x = rng.uniform(0, 10, n).round(1)
        y = 0.3 * x + rng.standard_t(2, n)
        line = stats.theilslopes(y, x)
        cases["theil_sen"].append(
            {"x": x.tolist(), "y": y.tolist(), "slope": float(line[0]), "intercept": float(line[1])}
        )
    for n in (2, 7, 100):
        p, q = rng.normal(0, 3, n).astype(np.float32), rng.normal(0, 3, n).astype(np.float32)
        found = stats.entropy(np.exp(log_softmax(p.astype(float))), np.exp(log_softmax(q.astype(float))))
        cases["kld"].append({"reference": p.tolist(), "other": q.tolist(), "expected": float(found)})
    for lengths in ((5,), (4, 9), (130, 70, 3)):
        cases["fidelity"].append(fidelity(rng, lengths))
    for n, middle, sd in ((2, 0.0, 0.01), (3, 0.05, 0.001), (20, 0.0, 0.03), (20, 0.0, 0.08), (21, -0.2, 0.1), (57, 0.01, 0.01)):
        values, margin = rng.normal(middle, sd, n), 0.02
        low, high = stats.t.interval(0.90, n - 1, loc=values.mean(), scale=stats.sem(values))
        above = stats.ttest_1samp(values, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(values, margin, alternative="less").pvalue
        cases["tost"].append({
            "values": values.tolist(), "margin": margin, "low": float(low), "high": float(high),
            "same": bool(max(above, below) < 0.05),
            "above": bool(stats.ttest_1samp(values, margin, alternative="greater").pvalue < 0.05),
            "below": bool(stats.ttest_1samp(values, -margin, alternative="less").pvalue < 0.05),
        })
    with open("statistics.json", "w", encoding="ascii") as file:
        json.dump(cases, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
