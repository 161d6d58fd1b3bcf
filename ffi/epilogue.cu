#include <algorithm>

#include "ffi/epilogue.h"
#include "ffi/finish.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256;

// A thread finishes kWidth columns of every gridDim.y-th row: N is a multiple of it.
constexpr int kWidth = 4;

__global__ void __launch_bounds__(kThreads)
    finish_kernel(Product p, const float* raw, bool scaled, int64_t b0, int64_t row0, int64_t rows,
                  int64_t all_rows) {
  const int64_t n0 = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kWidth;
  float largest = 0.0f;
  for (int64_t r = blockIdx.y; n0 < p.n && r < all_rows; r += gridDim.y) {
    const int64_t b = b0 + r / rows, m = row0 + r % rows;
    const float4 sums = *reinterpret_cast<const float4*>(raw + r * p.n + n0);
    const float values[kWidth] = {sums.x, sums.y, sums.z, sums.w};
    const float x_scale = scaled ? 1.0f : p.x.scale_at(b, m, 0);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const float w_scale = scaled ? 1.0f : p.w.scale_at(b, n0 + i, 0);
      const float value = finish(p, apply_scales(values[i], x_scale, w_scale), n0 + i);
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

constexpr int kSquare = 32, kSquareRows = 8;

// By squares through shared memory: neither side's accesses lie apart.
__global__ void __launch_bounds__(kSquare* kSquareRows)
    vector_scales_kernel(float* target, Operand operand, int64_t k_blocks, int64_t b, int64_t row0,
                         int64_t rows) {
  __shared__ float square[kSquare][kSquare + 1];
  const int64_t first_row = int64_t{blockIdx.x} * kSquare, first_block = blockIdx.y * kSquare;
  for (int i = threadIdx.y; i < kSquare; i += kSquareRows) {
    const int64_t row = first_row + i, k_block = first_block + threadIdx.x;
    if (row >= rows || k_block >= k_blocks) continue;
    square[i][threadIdx.x] = operand.scale_at(b, row0 + row, operand.block_cols ? k_block : 0);
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kSquare; i += kSquareRows) {
    const int64_t row = first_row + threadIdx.x, k_block = first_block + i;
    if (row < rows && k_block < k_blocks) target[k_block * rows + row] = square[threadIdx.x][i];
  }
}

__global__ void tile_scales_kernel(float* target, Operand operand, int64_t pitch, int64_t b,
                                   int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t k_block = i % pitch;
  target[i] = k_block < operand.scale_cols ? operand.scale_at(b, i / pitch * kBlock, k_block) : 0;
}

}  // namespace

cudaError_t finish_raw(const Product& p, const float* raw, bool scaled, int64_t b, int64_t count_b,
                       int64_t row, int64_t rows, cudaStream_t stream) {
  const int64_t all_rows = count_b * rows;
  const dim3 grid(static_cast<unsigned>(ceil_div(p.n, kThreads * kWidth)),
                  static_cast<unsigned>(std::min<int64_t>(all_rows, 4096)));
  finish_kernel<<<grid, kThreads, 0, stream>>>(p, raw, scaled, b, row, rows, all_rows);
  return cudaGetLastError();
}

cudaError_t fill_scales(float* target, const float* source, int stride, int64_t count,
                        cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  fill_kernel<<<blocks, kThreads, 0, stream>>>(target, source, stride, count);
  return cudaGetLastError();
}

cudaError_t vector_scales(float* target, const Operand& operand, int64_t k, int64_t b, int64_t row,
                          int64_t rows, cudaStream_t stream) {
  const int64_t k_blocks = ceil_div(k, kBlock);
  const dim3 grid(static_cast<unsigned>(ceil_div(rows, kSquare)),
                  static_cast<unsigned>(ceil_div(k_blocks, kSquare)));
  vector_scales_kernel<<<grid, dim3(kSquare, kSquareRows), 0, stream>>>(target, operand, k_blocks,
                                                                        b, row, rows);
  return cudaGetLastError();
}

cudaError_t tile_scales(float* target, const Operand& operand, int64_t b, int64_t rows,
                        cudaStream_t stream) {
  const int64_t pitch = ceil_div(operand.scale_cols, 4) * 4;
  const int64_t count = ceil_div(rows, kBlock) * pitch;
  const auto blocks = static_cast<unsigned>(ceil_div(count, kThreads));
  tile_scales_kernel<<<blocks, kThreads, 0, stream>>>(target, operand, pitch, b, count);
  return cudaGetLastError();
}

}  // namespace jax_fp8
