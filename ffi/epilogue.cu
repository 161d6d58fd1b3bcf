#include "ffi/epilogue.h"

#include <algorithm>

#include "ffi/finish.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Product p, const float* raw, int64_t b0, int64_t row0, int64_t rows, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  float largest = 0.0f;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += stride) {
    const int64_t n = i % p.n, b = b0 + i / p.n / rows, m = row0 + i / p.n % rows;
    const float value =
        finish(p, apply_scales(raw[i], p.x.scale_at(b, m, 0), p.w.scale_at(b, n, 0)), n);
    store(p, value, (b * p.m + m) * p.n + n);
    largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
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
  const int64_t count = count_b * rows * p.n;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kThreads), 132 * 16));
  finish_kernel<<<blocks, kThreads, 0, stream>>>(p, raw, b, row, rows, count);
  return cudaGetLastError();
}

cudaError_t fill_scales(float* target, const float* source, int stride, int64_t count,
                        cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  fill_kernel<<<blocks, kThreads, 0, stream>>>(target, source, stride, count);
  return cudaGetLastError();
}

}  // namespace jax_fp8
