// What the kernels of quantize share: how types become kernels, and what a group's amax gives.
#pragma once

#include <type_traits>

#include "ffi/device.h"
#include "ffi/pack.h"
#include "ffi/quantize.h"

namespace jax_fp8 {

// One for each granularity. Rows longer than quantize_rows holds are read twice.
cudaError_t quantize_tensors(const Quantize& q, cudaStream_t stream);
cudaError_t quantize_rows(const Quantize& q, cudaStream_t stream);
cudaError_t quantize_strips(const Quantize& q, cudaStream_t stream);   // (1, 128)
cudaError_t quantize_squares(const Quantize& q, cudaStream_t stream);  // (128, 128)

// Whether a few thread blocks hold a row, so that it is read once.
bool row_is_held(const Quantize& q);

template <Type in_, Type out_, int width_>
struct Variant {
  static constexpr Type in = in_, out = out_;
  static constexpr int width = width_;
  using T = typename Native<in>::type;
  using Pack = jax_fp8::Pack<in, width>;

  __device__ static const T* source(const Quantize& q, int64_t index) {
    return static_cast<const T*>(q.x) + index;
  }
  __device__ static void store(const Quantize& q, int64_t index, const Pack& pack, float inverse) {
    store_quantized<out, width>(q.data + index, pack, inverse);
  }
};

// How many values a thread loads at once: 16 bytes, where the addresses are aligned and every run
// of values that lie one behind the other starts and ends with such a pack; else one.
inline int pack_width(const Quantize& q) {
  const int width = static_cast<int>(16 / byte_width(q.x_type));
  const int64_t run = q.block_rows == 0 ? q.rows * q.cols : q.cols;
  const bool aligned = run % width == 0 && reinterpret_cast<uintptr_t>(q.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(q.data) % width == 0;
  return aligned ? width : 1;
}

// Calls launch with the Variant of a call.
template <typename Launch>
cudaError_t dispatch(const Quantize& q, Launch launch) {
  const bool wide = pack_width(q) > 1;
  const auto with = [&](auto type) {
    constexpr Type in = decltype(type)::value;
    constexpr int width = 16 / sizeof(typename Native<in>::type);
    if (q.data_type == Type::kE4M3) {
      return wide ? launch(Variant<in, Type::kE4M3, width>{})
                  : launch(Variant<in, Type::kE4M3, 1>{});
    }
    return wide ? launch(Variant<in, Type::kE5M2, width>{}) : launch(Variant<in, Type::kE5M2, 1>{});
  };
  switch (q.x_type) {
    case Type::kBF16:
      return with(std::integral_constant<Type, Type::kBF16>{});
    case Type::kF16:
      return with(std::integral_constant<Type, Type::kF16>{});
    default:
      return with(std::integral_constant<Type, Type::kF32>{});
  }
}

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The inverse of a group's scale; one thread of the group writes the scale and the amax.
__device__ inline float scale_group(const Quantize& q, int64_t index, uint32_t amax, bool writes) {
  const float scale = q.given != nullptr
                          ? q.given[index]
                          : dynamic_scale(__uint_as_float(amax), q.data_type, q.power_of_two);
  if (writes) {
    q.scale[index] = scale;
    if (q.amax != nullptr) q.amax[index] = __uint_as_float(amax);
  }
  return inverse_scale(scale);
}

}  // namespace jax_fp8
