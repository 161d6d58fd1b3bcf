// A row of bfloat16 as X of small_m_hopper: each thread block that multiplies it normalizes and
// quantizes it for itself, into shared memory, while the first of W is on its way. Of one row that
// takes less than a kernel in front; of two or four it took more.
#pragma once

#include "ffi/follow.h"
#include "ffi/fused_kernels.h"
#include "ffi/product.h"

namespace jax_fp8 {
namespace {

// Each of the block's `threads` has `packs` packs of eight values of the row, which reach as far as
// K, and of its norm's weight.
template <int threads, int packs>
class RowOfBlock {
 public:
  __device__ void load_weights(const Product& p) {
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (p.norm_weight != nullptr && k_of(i) < p.k) weights_[i].load(p.norm_weight + k_of(i));
    }
  }
  __device__ void load_row(const Product& p) {
    const auto* const row = reinterpret_cast<const __nv_bfloat16*>(p.x.data);
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      x_[i] = {};
      if (k_of(i) < p.k) x_[i].load(row + k_of(i));
    }
  }

  // The scale, which comes of the values, or is *p.x.scale where that is not null. All threads of
  // the block call this. The codes from k on go where `place(k)` says, for K rounded up to
  // `padding`, with zeros (or NaN, as the scale is) behind K; they are there for other threads
  // after a barrier.
  //
  // The arithmetic, and so each bit, is that of rms_norm_quantize and quantize.
  template <int padding, typename Place>
  __device__ float quantize(const Product& p, Place place) const {
    constexpr int warps = threads / fused::kWarp, groups = packs * warps;
    __shared__ float square_parts[groups];
    __shared__ uint32_t amax_parts[warps];
    const int thread = static_cast<int>(threadIdx.x), k_size = static_cast<int>(p.k);
    const int k_padded = (k_size + padding - 1) / padding * padding;
    const bool has_norm = p.norm_weight != nullptr, is_given = p.x.scale != nullptr;

    // A factor that is not negative leaves the order of magnitudes as it is.
    const auto value = [&](int i, int e) {
      return has_norm ? __fmul_rn(x_[i][e], weights_[i][e]) : x_[i][e];
    };
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (k_of(i) >= k_size) continue;
      const float of_pack =
          fused::combine_pack(fused::Larger(), [&](int e) { return value(i, e); });
      amax = fused::Larger()(amax, of_pack);
    }
    fused::put_amax(amax, amax_parts);
#pragma unroll
    for (int i = 0; i < packs && has_norm; ++i) {
      float values[fused::kWidth];
#pragma unroll
      for (int e = 0; e < fused::kWidth; ++e) values[e] = x_[i][e];
      float sums[1] = {fused::pack_moment<fused::Norm<false, false>>(values, 0.0f, fused::kWidth)};
      const float sum = lanes_combine<fused::kWarp>(sums, fused::Add());
      if (thread % fused::kWarp == 0) square_parts[i * warps + thread / fused::kWarp] = sum;
    }
    __syncthreads();

    float factor = 1.0f;
    if (has_norm) {
      const float total =
          fused::combine_groups<(groups + fused::kWarp - 1) / fused::kWarp>(square_parts, groups);
      factor = reciprocal_deviation(__fmul_rn(1.0f / static_cast<float>(k_size), total), p.eps);
    }
    const float scale =
        is_given ? *p.x.scale : dynamic_scale(fused::get_amax(amax_parts) * factor, Type::kE4M3);
    const float inverse = inverse_scale(scale);
#pragma unroll
    for (int i = 0; i < packs; ++i) {
      if (k_of(i) >= k_padded) continue;
      float values[fused::kWidth];
#pragma unroll
      for (int e = 0; e < fused::kWidth; ++e) {
        values[e] = k_of(i) < k_size ? __fmul_rn(value(i, e), factor) : 0.0f;
      }
      is_given ? fused::store_codes<Type::kE4M3, true>(place(k_of(i)), values, inverse)
               : fused::store_codes<Type::kE4M3, false>(place(k_of(i)), values, inverse);
    }
    return scale;
  }

 private:
  __device__ static int k_of(int i) {
    return (i * threads + static_cast<int>(threadIdx.x)) * fused::kWidth;
  }

  Pack<Type::kBF16, fused::kWidth> x_[packs], weights_[packs];
};

}  // namespace
}  // namespace jax_fp8
