// Stochastic rounding to FP8, and the random bits for it: alike on the host, on the device and in
// plain JAX (round_stochastic and random_bits of numerics.py).
#pragma once

#include "ffi/fp8.h"

namespace jax_fp8 {

struct RandomWords {
  uint32_t first, second;
};

// Threefry-2x32 with 20 rounds: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011. The 64-bit counter goes in high word first.
__host__ __device__ inline RandomWords threefry(uint32_t key0, uint32_t key1, uint64_t counter) {
  constexpr int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t keys[3] = {key0, key1, 0x1bd11bdau ^ key0 ^ key1};
  uint32_t a = static_cast<uint32_t>(counter >> 32) + keys[0];
  uint32_t b = static_cast<uint32_t>(counter) + keys[1];
  for (int i = 0; i < 5; ++i) {
    for (int j = 0; j < 4; ++j) {
      const int rotation = kRotations[i % 2][j];
      a += b;
      b = (b << rotation | b >> (32 - rotation)) ^ a;
    }
    a += keys[(i + 1) % 3];
    b += keys[(i + 2) % 3] + (i + 1);
  }
  return {a, b};
}

// The 16 bits of the element `index`: four of them share the words of one counter.
__host__ __device__ inline uint32_t random_bits(uint32_t key0, uint32_t key1, uint64_t index) {
  const RandomWords words = threefry(key0, key1, index / 4);
  const uint32_t word = index & 2 ? words.second : words.first;
  return index & 1 ? word >> 16 : word & 0xffffu;
}

// With u the distance of the codes around v = |scaled|, limited to the largest:
// floor(v / u + bits / 2^16) * u with the sign of `scaled`, which encodes without rounding. All but
// the sum is exact. NaN stays NaN.
template <Type type>
__host__ __device__ inline float round_stochastic(float scaled, uint32_t bits) {
  constexpr uint32_t mantissa = type == Type::kE4M3 ? 3 : 2;
  constexpr uint32_t bias = type == Type::kE4M3 ? 7 : 15;
  const uint32_t raw = float_bits(scaled), magnitude = raw & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return scaled;
  const uint32_t largest = float_bits(fp8_max(type));
  const uint32_t limited = magnitude < largest ? magnitude : largest;
  const uint32_t exponent = limited & 0x7f800000u, smallest = (127 + 1 - bias) << 23;
  const uint32_t binade = exponent > smallest ? exponent : smallest;
  const float unit = bits_float(binade - (mantissa << 23));
  // The exponents of a number and of its reciprocal add up to twice the bias.
  const float inverse_unit = bits_float(((254 + mantissa) << 23) - binade);
  const float fraction = bits_float(0x3f800000u | bits << 7) - 1.0f;
  const float sum = bits_float(limited) * inverse_unit + fraction;
#ifdef __CUDA_ARCH__
  const float floored = __fadd_rd(sum, 8388608.0f) - 8388608.0f;  // Quicker than floorf.
#else
  const float floored = std::floor(sum);
#endif
  return bits_float(float_bits(floored * unit) | (raw & 0x80000000u));
}

// As quantize_value, rounding so.
template <Type type>
__host__ __device__ inline uint8_t quantize_random(float value, float inverse, uint32_t bits) {
  const bool infinite = (float_bits(value) & 0x7fffffffu) == 0x7f800000u;
  return infinite ? uint8_t{0x7f} : encode<type>(round_stochastic<type>(value * inverse, bits));
}

}  // namespace jax_fp8
