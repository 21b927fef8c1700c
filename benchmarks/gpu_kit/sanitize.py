"""compute-sanitizer on small steps of smoke.py, several at the same time: python sanitize.py SECONDS"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
# (tool, step): what is most likely to show something first.
RUNS = [
    ("racecheck", "bfloat16_E64_causal"),
    ("memcheck", "bfloat16_E128"),
    ("racecheck", "backward_bfloat16_atomics"),
    ("memcheck", "backward_bfloat16_atomics"),
    ("memcheck", "warpgroups_E128_causal"),
    ("racecheck", "warpgroups_E64"),
    ("synccheck", "warpgroups_E128_causal"),
    ("racecheck", "warpgroups_options_packed"),
    ("memcheck", "warpgroups_backward_alibi"),
    ("racecheck", "latent_backward"),
    ("memcheck", "latent_decode"),
    ("racecheck", "float32_two_tiles"),
    ("memcheck", "all_options"),
    ("racecheck", "decode_split"),
    ("memcheck", "decode_split"),
    ("racecheck", "gradients_of_far_rows"),
    ("racecheck", "decode_pages_int8"),
    ("racecheck", "backward_float32"),
    ("synccheck", "backward_bfloat16_atomics"),
    ("racecheck", "tf32"),
    ("memcheck", "backward_float32"),
    ("initcheck", "bfloat16_E128"),
    ("memcheck", "gradients_of_far_rows"),
    ("memcheck", "decode_pages_int8"),
    ("memcheck", "append_on_the_device"),
    ("memcheck", "merge_on_the_device"),
    ("memcheck", "bias_and_mask_in_pairs"),
    ("racecheck", "bias_tiles"),
    ("memcheck", "bias_tiles"),
    ("memcheck", "weights_of_half_types"),
    ("racecheck", "bfloat16_E256"),
    ("synccheck", "all_options"),
    ("initcheck", "backward_bfloat16_atomics"),
]
AT_ONCE = 6


def main():
    limit = float(sys.argv[1]) if len(sys.argv) > 1 else 95
    program = shutil.which("compute-sanitizer")
    if program is None:
        found = sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))
        program = os.fspath(found[-1]) if found else None
    if program is None:
        print("sanitizer: compute-sanitizer is not there")
        return 1
    begin, waiting, running, bad, done = time.perf_counter(), list(RUNS), [], [], 0
    while (waiting or running) and time.perf_counter() - begin < limit:
        while waiting and len(running) < AT_ONCE:
            tool, step = waiting.pop(0)
            settings = ["--error-exitcode", "9", "--print-limit", "5", "--destroy-on-device-error", "kernel"]
            smoke = [sys.executable, os.fspath(HERE / "smoke.py"), "--only", step]
            command = [program, "--tool", tool, *settings, *smoke]
            output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read when it ends; a pipe that nobody reads fills up)
            child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
            running.append((tool, step, child, output, time.perf_counter()))
        for item in list(running):
            tool, step, child, output, at = item
            if child.poll() is not None:
                running.remove(item)
                done += 1
                output.seek(0)
                said = output.read()
                lines = re.findall(r"^=========.*SUMMARY.*$", said, re.M)
                failed = child.returncode != 0
                verdict, seconds = "FAIL" if failed else "ok  ", time.perf_counter() - at
                print(f"  {verdict} {tool} {step} ({seconds:.0f} s): {' '.join(lines)[:160]}", flush=True)
                if failed:
                    bad.append(f"{tool} {step}")
                    print("\n".join(said.splitlines()[:60])[:6000], flush=True)
        time.sleep(0.1)
    for tool, step, child, *_ in running:
        child.kill()
        print(f"  stopped: {tool} {step}")
    said = f": FAILED {', '.join(bad)}" if bad else ""
    print(f"sanitizer: {done - len(bad)} of {done} runs clean, {len(waiting) + len(running)} not done{said}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
