"""check_kernels.py WHEEL FOLDER: unpacks a wheel with the inspect module and prints `unifiedar info --kernels` from it.

Fails if a kernel spills registers or uses more shared memory than its architecture has. Two may spill a little: draws
were measured to be faster so than with fewer threads on a multiprocessor (bench/NOTES.md), steps of the pyramid in half
precision hold a weight or two more than fits.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

wheel, folder = Path(sys.argv[1]), Path(sys.argv[2]).resolve()
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(folder)
sys.path.insert(0, str(folder))

from unifiedar.info import kernel_report  # noqa: E402

report = kernel_report()
assert report["reason"] is None, report["reason"]
assert {kernel["arch"] for kernel in report["kernels"]} == {"sm_80", "sm_90a"}, "kernels of both architectures"
SPILLS = {"sample_codes_kernel": 320, "next_scale_kernel": 40}
limit = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}  # bytes a block
for kernel in report["kernels"]:
    allowed = SPILLS.get(kernel["name"].partition("<")[0], 0)  # bytes a thread
    assert max(kernel["spill_stores"], kernel["spill_loads"]) <= allowed, f"spills: {kernel}"
    assert kernel["shared"] <= limit[kernel["arch"]], f"too much shared memory: {kernel}"
    assert kernel["max_threads"] >= 128, f"too many registers: {kernel}"
    assert all(0 <= share <= 1 for share in kernel["occupancy"].values()), kernel
print(f"{len(report['kernels'])} kernels, none spills more than it may")
command = [sys.executable, "-m", "unifiedar", "info", "--kernels"]
subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)})
