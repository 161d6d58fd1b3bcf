#include <algorithm>

#include "ffi/epilogue.h"
#include "ffi/finish.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256;

// A thread finishes kWidth columns of every gridDim.y-th row: N is a multiple of it.
constexpr int kWidth = 4;

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Product p, const float* raw, int64_t b0, int64_t row0, int64_t rows,
                  int64_t all_rows) {
  const int64_t n0 = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  float largest = 0.0f;
  for (int64_t r = blockIdx.y; n0 < p.n && r < all_rows; r += gridDim.y) {
    const int64_t b = b0 + r / rows, m = row0 + r % rows;
    const float4 sums = *reinterpret_cast<const float4*>(raw + r * p.n + n0);
    const float values[kWidth] = {sums.x, sums.y, sums.z, sums.w};
    const float x_scale = p.x.scale_at(b, m, 0);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float scaled = apply_scales(values[i], x_scale, p.w.scale_at(b, n0 + i, 0));
      const float value = finish(p, scaled, n0 + i);
      store(p, value, (b * p.m + m) * p.n + n0 + i);
      largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
    }
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
}

__global__ void fill_kernel(float* target, const float* source, int stride, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) target[i] = source[i * stride];
}

}  // namespace

cudaError_t finish_raw(const Product& p, const float* raw, int64_t b, int64_t count_b, int64_t row,
                       int64_t rows, cudaStream_t stream) {
  const int64_t all_rows = count_b * rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kThreads * kWidth)),
                  static_cast<unsigned>(std::min<int64_t>(all_rows, 4096)));
  finish_kernel<<<grid, kThreads, 0, stream>>>(p, raw, b, row, rows, all_rows);
  return cudaGetLastError();
}

cudaError_t fill_scales(float* target, const float* source, int stride, int64_t count,
                        cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  fill_kernel<<<blocks, kThreads, 0, stream>>>(target, source, stride, count);
  return cudaGetLastError();
}

}  // namespace jax_fp8
