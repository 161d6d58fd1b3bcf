#include "ffi/fused.h"
#include "ffi/fused_matmul.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256;

__host__ __device__ const __nv_bfloat16* row_of_x(const Product& p, int64_t m) {
  return reinterpret_cast<const __nv_bfloat16*>(p.x.data) + m * p.k;
}

__host__ __device__ __nv_bfloat16 normalized_value(const Product& p, float x, int64_t k,
                                                   float factor) {
  return __float2bfloat16(x * __bfloat162float(p.norm_weight[k]) * factor);
}

__host__ __device__ void finish_element(const Product& p, const void* sums, Type type,
                                        int64_t index) {
  const int64_t columns = p.d_columns();
  const int64_t sum = index / columns * p.n + index % columns;
  float value = load_as_float(sums, type, sum);
  if (p.swiglu) value = silu(value) * load_as_float(sums, type, sum + columns);
  if (p.residual != nullptr) value += __bfloat162float(p.residual[index]);
  static_cast<__nv_bfloat16*>(p.d)[index] = __float2bfloat16(value);
}

// A block has a row.
__global__ void __launch_bounds__(kThreads) normalize_kernel(Product p, __nv_bfloat16* normalized) {
  __shared__ float warp_squares[kThreads / 32];
  const int64_t m = blockIdx.x;
  const __nv_bfloat16* const x = row_of_x(p, m);
  float squares = 0.0f;
  for (int64_t k = threadIdx.x; k < p.k; k += kThreads) {
    const float value = __bfloat162float(x[k]);
    squares += value * value;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    squares += __shfl_xor_sync(0xffffffffu, squares, lanes);
  }
  if (threadIdx.x % 32 == 0) warp_squares[threadIdx.x / 32] = squares;
  __syncthreads();
  float total = 0.0f;
  for (const float part : warp_squares) total += part;
  const float factor = reciprocal_deviation(total / static_cast<float>(p.k), p.eps);
  for (int64_t k = threadIdx.x; k < p.k; k += kThreads) {
    normalized[m * p.k + k] = normalized_value(p, __bfloat162float(x[k]), k, factor);
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(Product p, const void* sums, Type type) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index < p.m * p.d_columns()) finish_element(p, sums, type, index);
}

}  // namespace

cudaError_t normalize_device(const Product& p, __nv_bfloat16* normalized, cudaStream_t stream) {
  normalize_kernel<<<static_cast<unsigned>(p.m), kThreads, 0, stream>>>(p, normalized);
  return cudaGetLastError();
}

cudaError_t finish_device(const Product& p, const void* sums, Type type, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(ceil_div(p.m * p.d_columns(), kThreads));
  finish_kernel<<<blocks, kThreads, 0, stream>>>(p, sums, type);
  return cudaGetLastError();
}

void normalize_host(const Product& p, __nv_bfloat16* normalized) {
  for (int64_t m = 0; m < p.m; ++m) {
    const __nv_bfloat16* const x = row_of_x(p, m);
    double squares = 0.0;  // The host's sums are not to be the worst there are.
    for (int64_t k = 0; k < p.k; ++k) {
      const double value = __bfloat162float(x[k]);
      squares += value * value;
    }
    const float factor =
        reciprocal_deviation(static_cast<float>(squares / static_cast<double>(p.k)), p.eps);
    for (int64_t k = 0; k < p.k; ++k) {
      normalized[m * p.k + k] = normalized_value(p, __bfloat162float(x[k]), k, factor);
    }
  }
}

void finish_host(const Product& p, const void* sums, Type type) {
  for (int64_t i = 0; i < p.m * p.d_columns(); ++i) finish_element(p, sums, type, i);
}

}  // namespace jax_fp8
