// Element types that the kernels take, as the launchers name them. Host and device.
#pragma once

namespace unifiedar {

enum class DType { kFloat32, kBFloat16, kFloat16 };

}  // namespace unifiedar
