#include <algorithm>

#include "ffi/device.h"
#include "ffi/follow.h"
#include "ffi/small_m_hopper.h"
#include "ffi/small_m_hopper_kernel.h"
#include "ffi/tensor_map.h"

namespace jax_fp8 {
namespace {

// Of all groups of a tile's blocks; each takes a chunk in each.
int64_t rounds_of(const Product& p, int splits = 1) {
  return ceil_div(p.k, splits * kGroups * kChunk);
}

// Thread blocks that share the K of a tile.
int splits_here(const Product& p, int processors) {
  return splits_of(ceil_div(p.n, kTileRows), processors, p.k, kGroups * kChunk, kMostSplits);
}

template <int columns>
cudaError_t launch(const Product& p, int processors, bool follows, cudaStream_t stream) {
  constexpr int most_slots = most_x_slots(columns);
  static_assert(most_slots > 1);
  const bool quantizes = p.x.type == Type::kBF16;
  const int64_t tiles = ceil_div(p.n, kTileRows);  // Of two halves for a SwiGLU.
  const int splits = quantizes ? 1 : splits_here(p, processors);
  const int64_t rounds = rounds_of(p, splits);
  const int x_slots = static_cast<int>(std::min<int64_t>(rounds, most_slots));
  CUtensorMap x_map{};
  const bool x_stays = rounds <= most_slots;
  auto kernel = x_stays ? small_m_hopper_kernel<columns, true, false, false>
                        : small_m_hopper_kernel<columns, false, false, false>;
  if (splits > 1) {
    kernel = x_stays ? small_m_hopper_kernel<columns, true, false, true>
                     : small_m_hopper_kernel<columns, false, false, true>;
  }
  if constexpr (columns == 8) {
    static_assert(kMostXQuantizing <= most_slots &&
                  bytes_without_x(8) + kGroups * kMostXQuantizing * x_chunk(8) <=
                      kMostBytesQuantizing);
    if (quantizes) kernel = small_m_hopper_kernel<columns, true, true, false>;
  } else if (quantizes) {
    return cudaErrorInvalidValue;  // small_m_hopper_quantizes was not asked.
  }
  if (!quantizes &&
      !encode_map(&x_map, p.x.data, p.x.type, p.batch, p.m, p.k, columns, kChunk / 2)) {
    return cudaErrorInvalidValue;
  }
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           quantizes ? kMostBytesQuantizing : kMostBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::clamp<int64_t>(processors / p.batch, 1, tiles);
  const int64_t clusters = splits > 1 ? tiles : blocks;
  const dim3 grid(static_cast<unsigned>(clusters * splits), static_cast<unsigned>(p.batch));
  const int bytes = bytes_without_x(columns) + kGroups * x_slots * x_chunk(columns);
  return launch_clusters(kernel, follows, splits, grid, kThreads, bytes, stream, p, follows, splits,
                         x_slots, x_map);
}

}  // namespace

bool small_m_hopper_supports(const Product& p, int capability) {
  return capability == 90 && p.m <= 16 && p.x.type == Type::kE4M3 && p.w.type == Type::kE4M3 &&
         !p.blocks() && p.k > 0 && p.k % 16 == 0 && hopper::is_device();
}

bool small_m_hopper_quantizes(const Product& p, int capability) {
  Product quantized = p;
  quantized.x.type = Type::kE4M3;
  return small_m_hopper_supports(quantized, capability) && p.x.type == Type::kBF16 &&
         p.batch == 1 && p.m == 1 && rounds_of(p) <= kMostXQuantizing &&
         reinterpret_cast<uintptr_t>(p.x.data) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.norm_weight) % 16 == 0;
}

bool small_m_hopper_wins(const Product& p) {
  // Measured with 512 rows of W and more, with X that does not stay at 4096 x 14336 alone.
  int processors = 0;
  if (device_attribute(cudaDevAttrMultiProcessorCount, &processors) != cudaSuccess) return false;
  const bool x_stays = rounds_of(p, splits_here(p, processors)) <= most_x_slots(p.m <= 8 ? 8 : 16);
  const bool is_long = p.n >= 4096 && p.k <= (p.m <= 8 ? 30720 : 18432);
  // With so many rows of W, cublasLt takes 30.0 us on an H200 where this takes 31.2; on an H100
  // they are level. With scales of rows too, but there this starts beside the quantization of X.
  if (p.m > 8 && p.n >= 28672 && p.x.per_tensor() && p.w.per_tensor()) return false;
  return p.n >= 512 && p.k >= 1024 && (x_stays || is_long);
}

cudaError_t small_m_hopper(const Product& p, cudaStream_t stream, bool follows) {
  int processors = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error != cudaSuccess) return error;
  return p.m <= 8 ? launch<8>(p, processors, follows, stream)
                  : launch<16>(p, processors, follows, stream);
}

}  // namespace jax_fp8
