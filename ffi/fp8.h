// The two FP8 formats and the wide ones, decoded and encoded alike on the host and on the device.
//
// Host code encodes with the integer arithmetic below, which is also what GPUs without the
// conversion instruction run; the instruction gives the same bits, but for the sign of NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace jax_fp8 {

// The element types of all operations.
enum class Type : int { kF32, kBF16, kF16, kE4M3, kE5M2 };

__host__ __device__ constexpr bool is_fp8(Type type) {
  return type == Type::kE4M3 || type == Type::kE5M2;
}
__host__ __device__ inline int64_t byte_width(Type type) {
  return is_fp8(type) ? 1 : (type == Type::kF32 ? 4 : 2);
}
inline const char* type_name(Type type) {
  switch (type) {
    case Type::kF32:
      return "float32";
    case Type::kBF16:
      return "bfloat16";
    case Type::kF16:
      return "float16";
    case Type::kE4M3:
      return "float8_e4m3fn";
    case Type::kE5M2:
      return "float8_e5m2";
  }
  return "?";
}

__host__ __device__ inline float fp8_max(Type type) {
  return type == Type::kE4M3 ? 448.0f : 57344.0f;
}

__host__ __device__ inline uint32_t float_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__host__ __device__ inline float bits_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

// Rounds to nearest even; finite values saturate, NaN stays NaN. Infinities are the caller's.
template <Type type>
__host__ __device__ inline uint8_t encode_bits(float value) {
  static_assert(type == Type::kE4M3 || type == Type::kE5M2);
  constexpr int mantissa = type == Type::kE4M3 ? 3 : 2;
  constexpr int bias = type == Type::kE4M3 ? 7 : 15;
  constexpr int dropped = 23 - mantissa;
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7fu);
  const uint32_t largest = float_bits(fp8_max(type));
  magnitude = magnitude < largest ? magnitude : largest;
  if (magnitude < uint32_t{127 + 1 - bias} << 23) {
    // Below the smallest normal: adding 2^k whose last bit is the format's smallest subnormal
    // makes the float adder round to it.
    constexpr uint32_t magic = static_cast<uint32_t>(127 + 1 - bias + dropped) << 23;
    return static_cast<uint8_t>(sign |
                                (float_bits(bits_float(magnitude) + bits_float(magic)) - magic));
  }
  magnitude += ((1u << (dropped - 1)) - 1) + ((magnitude >> dropped) & 1u);
  return static_cast<uint8_t>(
      sign | ((magnitude >> dropped) - (static_cast<uint32_t>(127 - bias) << mantissa)));
}

template <Type type>
__host__ __device__ inline uint8_t encode(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(value, __NV_SATFINITE, type == Type::kE4M3 ? __NV_E4M3 : __NV_E5M2);
#else
  return encode_bits<type>(value);
#endif
}

// What a quantized value becomes: `value * inverse`, saturated, but NaN for an infinity. `inverse`
// comes from inverse_scale, so it is finite or NaN.
template <Type type>
__host__ __device__ inline uint8_t quantize_value(float value, float inverse) {
  const float scaled = value * inverse;
  const bool infinite = (float_bits(value) & 0x7fffffffu) == 0x7f800000u;
  return infinite ? uint8_t{0x7f} : encode<type>(scaled);
}

// 1 / scale; NaN where that or the scale is not finite, so that nothing finite comes of it.
__host__ __device__ inline float inverse_scale(float scale) {
  const float inverse = 1.0f / scale;
  const uint32_t infinity = 0x7f800000u;
  const bool finite =
      (float_bits(scale) & infinity) != infinity && (float_bits(inverse) & infinity) != infinity;
  return finite ? inverse : bits_float(0x7fc00000u);
}

// max(amax / max, 2^-126), which may be rounded up to a power of two; 1 for an amax of 0, NaN for
// one that is not finite.
__host__ __device__ inline float dynamic_scale(float amax, Type type, bool power_of_two = false) {
  if (amax == 0.0f) return 1.0f;
  if ((float_bits(amax) & 0x7f800000u) == 0x7f800000u) return bits_float(0x7fc00000u);
  // Both formats' max is 7 * 2^k. One Newton step, whose residual is exact, rounds the division by
  // 7 to nearest, in less than a division takes on a GPU.
  const float quotient = amax * (1.0f / 7.0f);
  const float residual = fmaf(-7.0f, quotient, amax);
  const float scale = fmaf(residual, 1.0f / 7.0f, quotient) * (7.0f / fp8_max(type));
  const float smallest = bits_float(1u << 23);
  const float limited = scale < smallest ? smallest : scale;
  // A carry out of the mantissa is the next binade.
  return power_of_two ? bits_float((float_bits(limited) + 0x7fffffu) & 0xff800000u) : limited;
}

// One byte to float, exactly.
template <Type type>
__host__ __device__ inline float decode(uint8_t code) {
#ifdef __CUDA_ARCH__
  const __half_raw half =
      __nv_cvt_fp8_to_halfraw(code, type == Type::kE4M3 ? __NV_E4M3 : __NV_E5M2);
  return __half2float(__half(half));
#else
  constexpr int mantissa = type == Type::kE4M3 ? 3 : 2;
  constexpr int bias = type == Type::kE4M3 ? 7 : 15;
  const int exponent = (code & 0x7f) >> mantissa;
  const int fraction = code & ((1 << mantissa) - 1);
  float magnitude;
  if (type == Type::kE4M3 ? (code & 0x7f) == 0x7f : (code & 0x7f) > 0x7c) {
    magnitude = bits_float(0x7fc00000u);
  } else if (type == Type::kE5M2 && (code & 0x7f) == 0x7c) {
    magnitude = bits_float(0x7f800000u);
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(fraction), 1 - bias - mantissa);
  } else {
    magnitude =
        std::ldexp(1.0f + std::ldexp(static_cast<float>(fraction), -mantissa), exponent - bias);
  }
  return code & 0x80 ? -magnitude : magnitude;
#endif
}

template <Type type>
struct Native;
template <>
struct Native<Type::kF32> {
  using type = float;
  __host__ __device__ static float load(float value) { return value; }
  __host__ __device__ static float store(float value) { return value; }
};
template <>
struct Native<Type::kBF16> {
  using type = __nv_bfloat16;
  __host__ __device__ static float load(__nv_bfloat16 value) { return __bfloat162float(value); }
  __host__ __device__ static __nv_bfloat16 store(float value) { return __float2bfloat16(value); }
};
template <>
struct Native<Type::kF16> {
  using type = __half;
  __host__ __device__ static float load(__half value) { return __half2float(value); }
  __host__ __device__ static __half store(float value) { return __float2half(value); }
};

// An element of a wide array, whose type is known at run time alone.
__host__ __device__ inline float load_as_float(const void* data, Type type, int64_t index) {
  switch (type) {
    case Type::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Type::kF16:
      return __half2float(static_cast<const __half*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

}  // namespace jax_fp8
