// What the kernels of cast_transpose share: the types, and the passes that find amaxes.
#pragma once

#include "ffi/cast_transpose.h"
#include "ffi/quantize_kernels.h"

namespace jax_fp8 {

// Finds the amax of each entry in `parts` parts, kMaxParts apart in the scratch.
cudaError_t tensor_amaxes(const CastTranspose& q, int* parts, cudaStream_t stream);
// Finds the amaxes of rows and of columns, as they are wanted.
cudaError_t row_and_column_amaxes(const CastTranspose& q, bool rows, bool columns,
                                  cudaStream_t stream);
// Casts tile by tile. `parts` as above; where it is not 0 or rows have scales, amaxes were found.
// `follows`: by the last kernel in the stream, which has not written x.
cudaError_t cast_tiles(const CastTranspose& q, int parts, bool follows, cudaStream_t stream);
// Both in one launch; cudaErrorNotSupported where it does not know how.
cudaError_t cast_held(const CastTranspose& q, cudaStream_t stream);

inline bool is_aligned(const void* pointer, int bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Calls launch with the type of x as a constant.
template <typename Launch>
cudaError_t with_type(Type type, Launch launch) {
  switch (type) {
    case Type::kBF16:
      return launch(std::integral_constant<Type, Type::kBF16>{});
    case Type::kF16:
      return launch(std::integral_constant<Type, Type::kF16>{});
    default:
      return launch(std::integral_constant<Type, Type::kF32>{});
  }
}

// Words of magnitudes, two of 16 bits or one of 32, compared as Amax does.
template <Type type>
__device__ inline uint32_t max_magnitudes(uint32_t a, uint32_t b) {
  if constexpr (type == Type::kF32) {
    return max(a, b);
  } else {
    return __vmaxu2(a, b);
  }
}
template <Type type>
__device__ inline uint32_t magnitudes(uint32_t word) {
  return word & (type == Type::kF32 ? 0x7fffffffu : 0x7fff7fffu);
}

// A magnitude as it is in memory to the bits of a float.
template <Type type>
__device__ inline uint32_t magnitude_bits(uint32_t bits) {
  if constexpr (type == Type::kF32) return bits;
  if constexpr (type == Type::kBF16) return bits << 16;
  return __float_as_uint(__half2float(__ushort_as_half(static_cast<uint16_t>(bits))));
}

}  // namespace jax_fp8
