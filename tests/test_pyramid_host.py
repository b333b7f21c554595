"""The kernels of a step of VAR's pyramid on the host, thread by thread, against the definition."""

import ctypes

import pytest
import torch
from host_cuda import CSRC, DRAW, compile_on_host

from unifiedar.ops import Phi, next_scale_input

EXPORTS = """
extern "C" int step(const void* base, const int64_t* codes, const void* table, const void* weight, const void* bias,
                    float* total, void* out, void* following, const int64_t* n, float ratio, int dtype) {
  host_waits = true;
  unifiedar::PyramidArgs args{base, codes, table, weight, bias, total, out, following, n[0], n[1], n[2]};
  int* sizes[] = {&args.base_c, &args.base_y, &args.base_x, &args.table_entry, &args.table_c, &args.batch,
                  &args.height, &args.width, &args.h, &args.w, &args.next_h, &args.next_w, &args.num_codes};
  for (int i = 0; i < 13; ++i) *sizes[i] = n[3 + i];
  args.ratio = ratio;
  return unifiedar::launch_next_scale_input(args, unifiedar::DType(dtype), nullptr);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    wide = (CSRC / "device/wide.cuh").read_text(encoding="utf-8")
    instead = {"device/wide.cuh": wide + DRAW}
    return compile_on_host(["pyramid.cu"], EXPORTS, tmp_path_factory.mktemp("pyramid"), instead)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("convolved", [True, False], ids=["phi", "no phi"])
@pytest.mark.parametrize(
    ("sizes", "batch"),
    [
        (((1, 1), (2, 2), (16, 16)), 3),
        (((2, 3), (5, 9), (5, 9)), 3),
        (((4, 1), (1, 1), (7, 3)), 3),
        (((1, 2), (13, 18)), 12),  # enough for the larger tiles
        (((3, 2), (5, 9), (5, 9)), 30),
    ],
    ids=str,
)
def test_step(library, sizes, batch, convolved, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    height, width = sizes[-1]
    features = normal(batch, height, width, 32).permute(0, 3, 1, 2)
    wide = torch.full((41, 40), torch.nan, dtype=dtype)
    codebook = wide[:40, 3:35]
    codebook.copy_(normal(40, 32, scale=0.7))
    phi = Phi(normal(1, 32, 32, 3, 3, scale=0.1), normal(1, 32, scale=0.1), 0.5) if convolved else None
    for step, (h, w) in enumerate(sizes):
        codes = torch.randint(-1, 40, (batch, h * w), generator=generator)
        vectors = normal(batch, 32, h * w).transpose(1, 2)
        next_h, next_w = sizes[step + 1] if step + 1 < len(sizes) else (0, 0)
        for given in (codes, vectors):
            want = next_scale_input(features, given, codebook, phi, sizes, step, backend="eager")
            table = vectors if given is vectors else codebook
            total = torch.full((batch, height * width, 32), torch.nan)
            out = torch.full((batch, 32, height, width), torch.nan, dtype=dtype)
            following = torch.full((batch, next_h * next_w, 32), torch.nan, dtype=dtype)
            numbers = [features.stride(0), codes.stride(0), vectors.stride(0) if given is vectors else 0]
            numbers += [*features.stride()[1:], table.stride(-2), table.stride(-1)]
            numbers += [batch, height, width, h, w, next_h, next_w]
            numbers += [40 if given is codes else 2**31 - 1]
            tensors = (
                features,
                codes if given is codes else None,
                table,
                *((phi.weight, phi.bias) if phi else (None, None)),
            )
            tensors += (total, out, following if next_h else None)
            status = library.step(
                *(ctypes.c_void_p(None if one is None else one.data_ptr()) for one in tensors),
                (ctypes.c_int64 * 16)(*numbers),
                ctypes.c_float(0.5 if phi else 0.0),
                (torch.float32, torch.bfloat16, torch.float16).index(dtype),
            )
            assert status == 0
            tolerance = 1e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(out, want[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(total, out.flatten(2).transpose(1, 2).float(), rtol=tolerance, atol=tolerance)
            if next_h:
                torch.testing.assert_close(following, want[1], rtol=tolerance, atol=tolerance)
