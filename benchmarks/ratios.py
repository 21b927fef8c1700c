"""Fractions of what the machine can do, measured beside the work: a history of these survives a noisy machine."""

import numba

from numba_attention.benchmarking import ROWS, run

CONTENDERS = ("ours", "own", "gemm", "read")


class _Ratios:
    """Three rounds of a row of ``numba-attention bench``, without the peers."""

    param_names = ("row",)
    timeout = 600

    def metric(self, row, name):
        (result,) = run([ROWS[row]], threads=numba.get_num_threads(), rounds=3, seconds=0.1, contenders=CONTENDERS)
        if "ours" in result.skipped:
            raise RuntimeError(result.skipped["ours"])
        return result.metrics[name]


class Gemm(_Ratios):
    """Rate of the two products over the rate of NumPy's matrix product in the same precision."""

    params = (
        [
            "full 4096 E64",
            "full 4096 E128",
            "causal 4096 E64",
            "causal 4096 E128",
            "encoder B1 H16 L1024 E64",
            "encoder B8 H12 L512 E64",
            "encoder B32 H12 L128 E32",
            "GQA causal H32 Hkv8 2048 E128",
            "float64 4096 E64",
            *(name for name, row in ROWS.items() if row.task != "forward"),
        ],
    )

    def track_of_gemm(self, row):
        return self.metric(row, "gemm")

    track_of_gemm.unit = "of gemm"


class Plain(_Ratios):
    """Rate with an option or another dtype over the plain float32 rate."""

    params = ([name for name, row in ROWS.items() if row.baseline is not None],)

    def track_of_plain(self, row):
        return self.metric(row, "own")

    track_of_plain.unit = "of the plain rate"


class Read(_Ratios):
    """Bytes of query, key and value over the time, beside the read bandwidth of the memory."""

    params = (["decode H32 Hkv8 L1 S8192 E128"],)

    def track_of_read_bandwidth(self, row):
        return self.metric(row, "read")

    track_of_read_bandwidth.unit = "of read bandwidth"
