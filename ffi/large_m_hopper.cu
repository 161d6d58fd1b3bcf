#include <algorithm>

#include "ffi/device.h"
#include "ffi/large_m_hopper.h"
#include "ffi/large_m_hopper_kernel.h"
#include "ffi/tensor_map.h"

namespace jax_fp8 {
namespace {

template <bool swiglu>
cudaError_t launch(const Product& p, int processors, cudaStream_t stream) {
  const int64_t columns = p.d_columns();
  const void* residual = p.residual == nullptr ? p.d : p.residual;
  Maps maps;
  const bool encoded =
      encode_map(&maps.x, p.x.data, p.x.type, 1, p.m, p.k, kRows, kDepth) &&
      encode_map(&maps.w, p.w.data, p.w.type, 1, p.n, p.k, kWRows / kCluster, kDepth) &&
      encode_map(&maps.d, p.d, p.d_type, 1, p.m, columns, kOwnRows, kPart) &&
      encode_map(&maps.residual, residual, p.d_type, 1, p.m, columns, kOwnRows, kPart);
  if (!encoded) return cudaErrorInvalidValue;
  Tiles tiles;
  tiles.row_clusters = static_cast<int>(ceil_div(p.m, kRows * kCluster));
  tiles.column_tiles = static_cast<int>(ceil_div(columns, kColumns<swiglu>));
  tiles.count = tiles.row_clusters * tiles.column_tiles;
  tiles.steps = static_cast<int>(ceil_div(p.k, kDepth));
  const auto kernel = large_m_hopper_kernel<swiglu>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int clusters = std::min(tiles.count, processors / kCluster);
  kernel<<<static_cast<unsigned>(clusters * kCluster), kThreads, kBytes, stream>>>(p, maps, tiles);
  return cudaGetLastError();
}

}  // namespace

bool large_m_hopper_supports(const Product& p, int capability) {
  const auto is_aligned = [](const void* pointer) {  // For the copy engine.
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
  };
  constexpr int64_t kMost = int64_t{1} << 30;  // So that coordinates are ints.
  return capability == 90 && p.m < kMost && p.n < kMost && p.k < kMost && is_aligned(p.x.data) &&
         is_aligned(p.w.data) && is_aligned(p.d) && is_aligned(p.residual) && p.batch == 1 &&
         p.x.type == Type::kE4M3 && p.w.type == Type::kE4M3 && p.d_type == Type::kBF16 &&
         !p.blocks() && p.k > 0 && p.k % 16 == 0 && p.d_columns() % 8 == 0 &&
         p.activation == Activation::kNone && hopper::is_device();
}

cudaError_t large_m_hopper(const Product& p, cudaStream_t stream) {
  int processors = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error != cudaSuccess) return error;
  return p.swiglu ? launch<true>(p, processors, stream) : launch<false>(p, processors, stream);
}

}  // namespace jax_fp8
