// From the accumulated sum of one output element to what is stored: scales, bias, activation, cast.
#pragma once

#include <cmath>

#include "ffi/product.h"

namespace jax_fp8 {

// In float64, so that scales near the ends of float32's range lose nothing on the way to a result
// inside of it.
__host__ __device__ inline float apply_scales(float sum, float x_scale, float w_scale) {
  return static_cast<float>(static_cast<double>(sum) * x_scale * w_scale);
}

// NaN stays NaN in both activations.
__host__ __device__ inline float activate(Activation activation, float value) {
  if (activation == Activation::kRelu) return value < 0.0f ? 0.0f : value;
  if (activation == Activation::kGelu) {
    // The tanh approximation, sqrt(2 / pi) and 0.044715: Hendrycks and Gimpel, arXiv 1606.08415.
    const float inner = 0.7978845608f * (value + 0.044715f * value * value * value);
    return 0.5f * value * (1.0f + tanhf(inner));
  }
  return value;
}

// Bias and activation of column n.
__host__ __device__ inline float finish(const Product& p, float value, int64_t n) {
  if (p.bias != nullptr) value += load_as_float(p.bias, p.bias_type, n);
  return activate(p.activation, value);
}

__host__ __device__ inline void store(const Product& p, float value, int64_t index) {
  switch (p.d_type) {
    case Type::kF32:
      static_cast<float*>(p.d)[index] = value;
      break;
    case Type::kBF16:
      static_cast<__nv_bfloat16*>(p.d)[index] = __float2bfloat16(value);
      break;
    case Type::kF16:
      static_cast<__half*>(p.d)[index] = __float2half(value);
      break;
    case Type::kE4M3:
      static_cast<uint8_t*>(p.d)[index] = quantize_value<Type::kE4M3>(value, *p.inverse_out_scale);
      break;
    case Type::kE5M2:
      static_cast<uint8_t*>(p.d)[index] = quantize_value<Type::kE5M2>(value, *p.inverse_out_scale);
      break;
  }
}

#ifdef __CUDACC__
__device__ inline unsigned warp_max(unsigned value) {
  for (int lane = 16; lane > 0; lane /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, lane));
  }
  return value;
}

// Whole warps must call it, lanes without an element with 0. Non-negative floats, infinity and NaN
// order like their bits, so an integer maximum in any order gives the same amax, and a NaN wins.
__device__ inline void amax_to_memory(float* amax, float magnitude) {
  const unsigned bits = warp_max(float_bits(fabsf(magnitude)));
  if ((threadIdx.x & 31) == 0) atomicMax(reinterpret_cast<unsigned*>(amax), bits);
}
#endif

}  // namespace jax_fp8
