"""check_wheel.py WHEEL FOLDER: unpacks the CUDA wheel into FOLDER and fails unless it is what we mean to publish."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import triton

wheel, folder = Path(sys.argv[1]), Path(sys.argv[2])
assert re.fullmatch(r"unifiedar_kernels-[\d.]+-py3-none-linux_x86_64\.whl", wheel.name), wheel.name
with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    archive.extractall(folder)

needed = (
    r"unifiedar/_C\.so",
    r"unifiedar/_build\.json",
    r"unifiedar/kernels/codes\.py",
    r"unifiedar/weights/.+\.safetensors",
    r"unifiedar/data/emoji_held_out\.json",
    r"unifiedar/data/samples/.+\.png",
    r".+\.dist-info/licenses/LICENSE",
)
for pattern in needed:
    assert any(re.fullmatch(pattern, name) for name in names), f"the wheel lacks {pattern}"
strangers = [name for name in names if not name.startswith(("unifiedar/", "unifiedar_kernels-"))]
assert not strangers, f"the wheel installs outside its own package: {strangers}"
assert [name for name in names if name.endswith(".so")] == ["unifiedar/_C.so"], (
    "one library, nothing tied to one Python"
)

library = folder / "unifiedar" / "_C.so"
content = library.read_bytes()
for place in (Path.cwd(), Path.home(), Path(sys.prefix), "/tmp/pip-", "site-packages"):
    assert str(place).encode() not in content, f"the library names a folder of the build machine: {place}"

dynamic = subprocess.run(["readelf", "-dW", library], check=True, capture_output=True, text=True).stdout
linked = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic))
assert "libtorch.so" in linked, linked
assert linked <= {"libtorch.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "ld-linux-x86-64.so.2"}, (
    linked
)
assert "RPATH" not in dynamic, dynamic
assert "RUNPATH" not in dynamic, dynamic

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
listing = subprocess.run(
    [cuobjdump, "--list-elf", "--list-ptx", library], check=True, capture_output=True, text=True
).stdout
images = set(re.findall(r"\.(sm_\w+\.(?:cubin|ptx))", listing))
assert images == {"sm_80.cubin", "sm_90a.cubin", "sm_90.ptx"}, images
print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {len(names)} files, {', '.join(sorted(images))}")
