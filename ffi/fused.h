// A producer and quantization in one: what the last operation before a product computes goes to
// FP8 without a round trip through memory. On the host and on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>

#include "ffi/fp8.h"

namespace jax_fp8 {

enum class Producer : int { kRmsNorm, kLayerNorm, kSwiglu, kGelu };

// x is (batch, rows, cols), for kSwiglu (batch, rows, 2 cols); data is (batch, rows, cols).
// block_rows and block_cols as in Quantize; (128, 128) is not among them.
struct Fused {
  Producer producer;
  int64_t batch, rows, cols;
  int block_rows, block_cols;
  const void* x;
  Type x_type;
  const void* residual;  // Of x's shape and type, or null. The norms alone have these.
  void* sum;             // x + residual, or null.
  const void* weight;    // (cols), or (batch, cols) with weight_stride = cols.
  Type weight_type;
  const void* bias;  // As the weight; kLayerNorm alone has it.
  Type bias_type;
  int64_t weight_stride;  // From one batch entry's weight and bias to the next one's: 0 or cols.
  float eps;
  const float* given;  // Static scales, or null for dynamic ones.
  uint8_t* data;
  Type data_type;
  float* scale;
  float* amax;   // (batch), scratch for dynamic scales of tensors; else null.
  bool follows;  // Whether it may start while the kernel in front still runs, as follow.h has it.
};

// 1 / (1 + exp(-t)), given -t * log2(e). Below 2^-126 it is zero.
__host__ __device__ inline float gate(float exponent) {
#ifdef __CUDA_ARCH__
  float power, result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
  return result;
#else
  return 1.0f / (1.0f + std::exp2(exponent));
#endif
}

__host__ __device__ inline float silu(float x) { return x * gate(-1.4426950409f * x); }

// The tanh approximation, with (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)) and
// z = sqrt(2 / pi) (x + 0.044715 x^3): Hendrycks and Gimpel, arXiv 1606.08415.
__host__ __device__ inline float gelu(float x) {
  constexpr float linear = -2.3022082f;  // -2 sqrt(2 / pi) log2(e)
  return x * gate(x * std::fma(linear * 0.044715f, x * x, linear));
}

// 1 / sqrt(mean + eps). A sum that overflowed would make all of its row zero: NaN instead.
__host__ __device__ inline float reciprocal_deviation(float mean, float eps) {
  if ((float_bits(mean) & 0x7f800000u) == 0x7f800000u) return bits_float(0x7fc00000u);
#ifdef __CUDA_ARCH__
  return __frsqrt_rn(__fadd_rn(mean, eps));
#else
  return 1.0f / std::sqrt(mean + eps);
#endif
}

void fused_host(const Fused& f);
cudaError_t fused_device(const Fused& f, cudaStream_t stream);

}  // namespace jax_fp8
