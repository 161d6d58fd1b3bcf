// Runs of values in the registers of a thread: loaded at once, their amax, their cast to FP8; and
// the maximum over a warp and a thread block. For kernels alone.
#pragma once

#include "ffi/fp8.h"

namespace jax_fp8 {

// `width` consecutive values as they are in memory, so that they can wait in registers for their
// scale. 8 values, aligned to 16 bytes, are what a thread loads best; 1 is for any address.
template <Type type, int width>
struct Pack {
  using T = typename Native<type>::type;
  static constexpr int kBytes = width * sizeof(T);
  alignas(kBytes % 16 == 0 ? 16 : 4) uint32_t words[(kBytes + 3) / 4];

  __device__ void load(const T* source) {
    if constexpr (kBytes % 16 == 0) {
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 four = reinterpret_cast<const uint4*>(source)[i];
        words[4 * i] = four.x, words[4 * i + 1] = four.y;
        words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
      }
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(source);
    } else {
      static_assert(kBytes == 2);
      words[0] = *reinterpret_cast<const uint16_t*>(source);
    }
  }

  __device__ float operator[](int i) const {
    if constexpr (type == Type::kF32) {
      return __uint_as_float(words[i]);
    } else if constexpr (type == Type::kBF16) {
      return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    } else {
      const uint32_t word = words[i / 2];
      return __half2float(__ushort_as_half(static_cast<uint16_t>(i % 2 ? word >> 16 : word)));
    }
  }
};

// The largest magnitude among packs, as bits: they order like the numbers, with infinity and then
// NaN on top, and two of 16 bits are compared at once.
template <Type type>
class Amax {
 public:
  template <int width>
  __device__ void take(const Pack<type, width>& pack) {
#pragma unroll
    for (const uint32_t word : pack.words) {
      if constexpr (type == Type::kF32) {
        largest_ = max(largest_, word & 0x7fffffffu);
      } else {
        largest_ = __vmaxu2(largest_, word & 0x7fff7fffu);
      }
    }
  }

  // The bits of it as a float.
  __device__ uint32_t bits() const {
    if constexpr (type == Type::kF32) return largest_;
    const uint32_t high = largest_ & 0xffff0000u, low = largest_ << 16;
    const uint32_t largest = max(high, low);
    if constexpr (type == Type::kBF16) return largest;
    return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(largest >> 16))));
  }

 private:
  uint32_t largest_ = 0;
};

// The bits of a float's magnitude, to be compared as integers.
__device__ inline uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7fffffffu; }

// Two codes, that of `low` in the low byte. Infinities are the caller's.
template <Type out>
__device__ inline uint32_t encode_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE,
                                  out == Type::kE4M3 ? __NV_E4M3 : __NV_E5M2);
#else
  return encode_bits<out>(low) | uint32_t{encode_bits<out>(high)} << 8;
#endif
}

// quantize_value for many values of one scale: `values` is anything that can be indexed.
template <Type out, int width, typename Values>
__device__ inline void store_quantized(uint8_t* data, const Values& values, float inverse) {
  // value * zero is NaN for an infinity and otherwise a zero of the product's own sign, which
  // changes no bit of it.
  const float zero = inverse * 0.0f;
  const auto scaled = [&](int i) { return fmaf(values[i], inverse, values[i] * zero); };
  if constexpr (width == 1) {
    *data = encode<out>(scaled(0));
  } else {
    static_assert(width % 4 == 0);
    uint32_t words[width / 4];
#pragma unroll
    for (int i = 0; i < width / 4; ++i) {
      words[i] = encode_pair<out>(scaled(4 * i), scaled(4 * i + 1)) |
                 encode_pair<out>(scaled(4 * i + 2), scaled(4 * i + 3)) << 16;
    }
    if constexpr (width == 4) {
      *reinterpret_cast<uint32_t*>(data) = words[0];
    } else if constexpr (width == 8) {
      *reinterpret_cast<uint2*>(data) = make_uint2(words[0], words[1]);
    } else {
      static_assert(width == 16);
      *reinterpret_cast<uint4*>(data) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// The maximum over each `lanes` neighbours of a warp, in every one of them. The whole warp calls.
template <int lanes>
__device__ inline uint32_t lanes_max(uint32_t value) {
#if __CUDA_ARCH__ >= 800
  if constexpr (lanes == 32) {
    return __reduce_max_sync(0xffffffffu, value);
  } else
#endif
  {
#pragma unroll
    for (int lane = lanes / 2; lane > 0; lane /= 2) {
      value = max(value, __shfl_xor_sync(0xffffffffu, value, lane));
    }
    return value;
  }
}

// Reduces each of `count` values over `lanes` neighbours. A lane gets one of the results, that of
// values[lane of the neighbours / (lanes / count)]: with halves exchanged at first, this takes
// little more than reducing one. Each result is made in the same order, whatever `count` is.
template <int lanes, typename T, int count, typename Combine>
__device__ inline T lanes_combine(T (&values)[count], Combine combine) {
  int bit = lanes / 2;
#pragma unroll
  for (int half = count / 2; half > 0; half /= 2, bit /= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T mine = upper ? values[half + i] : values[i];
      const T other = upper ? values[i] : values[half + i];
      values[i] = combine(mine, __shfl_xor_sync(0xffffffffu, other, bit));
    }
  }
#pragma unroll
  for (; bit > 0; bit /= 2) {
    values[0] = combine(values[0], __shfl_xor_sync(0xffffffffu, values[0], bit));
  }
  return values[0];
}

// The maximum over the thread block, of whole warps along x, in every thread. All of them call.
__device__ inline uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[32];
  value = lanes_max<32>(value);
  if (blockDim.x == 32) return value;
  __syncthreads();  // The call before has been read.
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  const unsigned lane = threadIdx.x % 32;
  return lanes_max<32>(lane < blockDim.x / 32 ? warps[lane] : 0);
}

}  // namespace jax_fp8
