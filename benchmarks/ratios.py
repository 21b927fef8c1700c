"""Times beside what the machine can do, measured in turns: a history of these survives a noisy machine.

asv takes what is lower for better, so each is a time over that of a ceiling.
"""

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
        return 1 / result.metrics[name]


class Gemm(_Ratios):
    """Time over that of the same products at the rate of NumPy's matrix product in the same precision."""

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

    def track_beside_gemm(self, row):
        return self.metric(row, "gemm")

    track_beside_gemm.unit = "x gemm's time"


class Plain(_Ratios):
    """Time with an option or another dtype over that of the plain call in float32."""

    params = ([name for name, row in ROWS.items() if row.baseline is not None],)

    def track_beside_plain(self, row):
        return self.metric(row, "own")

    track_beside_plain.unit = "x the plain time"


class Read(_Ratios):
    """Time over that of reading query, key and value at the read bandwidth of the memory."""

    params = (["decode H32 Hkv8 L1 S8192 E128"],)

    def track_beside_reading(self, row):
        return self.metric(row, "read")

    track_beside_reading.unit = "x the time of reading"
