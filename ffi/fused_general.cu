// Rows of any length at any address: a thread block a row, which is read again for each step.
#include "ffi/fused_kernels.h"

namespace jax_fp8::fused {
namespace {

template <typename Producer, Type in, bool wide>
__global__ void __launch_bounds__(1024) general_kernel(Fused f, Pass pass) {
  const int64_t row = pass == Pass::kTensor ? gridDim.x - 1 - int64_t{blockIdx.x} : blockIdx.x;
  const int64_t entry = f.batch == 1 ? 0 : row / f.rows, start = row * f.cols;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const float share = 1.0f / static_cast<float>(f.cols);
  __shared__ float sum_parts[2][kWarp];
  __shared__ uint32_t amax_parts[kWarp];

  float values[kWidth];
  const auto load = [&](int64_t column, int count) {
    Pack<in, kWidth> first, second;
    const int64_t index = row * (Producer::kParts * f.cols) + column;
    load_pack<wide>(f.x, index, count, first);
    if constexpr (Producer::kParts == 2) load_pack<wide>(f.x, index + f.cols, count, second);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      values[e] = Producer::value(first[e], Producer::kParts == 2 ? second[e] : 0.0f);
    }
    if constexpr (Producer::kResidual) {
      load_pack<wide>(f.residual, index, count, second);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] += second[e];
      const Pack<in, kWidth> sum = make_pack<in>(values);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) values[e] = sum[e];
    }
  };
  // Whole warps take part, with a count that is not positive beyond the end of the row.
  const auto each = [&](auto body) {
    for (int64_t column = int64_t{threadIdx.x} * kWidth; column - lane * kWidth < f.cols;
         column += int64_t{blockDim.x} * kWidth) {
      const int count = static_cast<int>(min(f.cols - column, int64_t{kWidth}));
      load(column, count);
      body(column, count);
    }
  };

  float mean = 0.0f, factor = 0.0f;
  if constexpr (Producer::kNorm) {
    const auto row_sum = [&](float* parts, auto term) {
      float sum = 0.0f;
      each([&](int64_t column, int count) {
        float sums[1] = {term(column, count)};
        sum += lanes_combine<kWarp>(sums, Add());
      });
      if (lane == 0) parts[warp] = sum;
      __syncthreads();
      return combine_groups<1>(parts, blockDim.x / kWarp);
    };
    if constexpr (Producer::kCentered) {
      mean =
          __fmul_rn(share, row_sum(sum_parts[0], [&](int64_t, int) { return pack_total(values); }));
    }
    const float moment = row_sum(sum_parts[1], [&](int64_t, int count) {
      return pack_moment<Producer>(values, mean, count);
    });
    factor = reciprocal_deviation(__fmul_rn(share, moment), f.eps);
    if constexpr (Producer::kResidual) {
      each([&](int64_t column, int count) {
        auto* const target = static_cast<typename Native<in>::type*>(f.sum) + start + column;
        const Pack<in, kWidth> pack = make_pack<in>(values);
        if constexpr (wide) {
          if (count > 0) store_pack(target, pack);
        } else {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            if (e < count) target[e] = Native<in>::store(pack[e]);
          }
        }
      });
    }
  }
  const auto finish = [&](int64_t column, int count) {
    const int64_t place = entry * f.weight_stride + column;
    if constexpr (Producer::kCentered) {
      shift_and_scale<wide, false, in>(f, place, count, mean, factor, values);
    } else if constexpr (Producer::kNorm) {
      float weights[kWidth];
      load_weights<wide, false, in>(f.weight, f.weight_type, place, count, weights);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[e] = __fmul_rn(__fmul_rn(values[e], weights[e]), factor);
      }
    }
  };
  const auto store = [&](int64_t column, int count, float inverse) {
    if constexpr (wide) {
      if (count > 0) store_codes(f, start + column, values, inverse);
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        if (e < count) store_code(f, start + column + e, values[e], inverse);
      }
    }
  };

  if (f.block_cols != 0) {
    each([&](int64_t column, int count) {
      finish(column, count);
      const int64_t place = row * ((f.cols + 127) / 128) + column / 128;
      float amaxes[1] = {pack_amax(values)};
      const float amax = lanes_combine<kStrip>(amaxes, Larger());
      if (count <= 0) return;
      const float scale = pass == Pass::kStrips ? dynamic_scale(amax, f.data_type) : f.given[place];
      if (lane % kStrip == 0) f.scale[place] = scale;
      store(column, count, inverse_scale(scale));
    });
    return;
  }
  float scale = 0.0f;
  if (pass == Pass::kRow || pass == Pass::kAmax) {
    float amax = 0.0f;
    each([&](int64_t column, int count) {
      finish(column, count);
      amax = Larger()(amax, pack_amax(values));
    });
    put_amax(amax, amax_parts);
    __syncthreads();
    amax = get_amax(amax_parts);
    if (pass == Pass::kAmax) {
      if (threadIdx.x == 0) amax_to_memory(f, entry, amax);
      return;
    }
    scale = dynamic_scale(amax, f.data_type);
  } else {
    scale = known_scale(f, pass, entry, row);
  }
  if (threadIdx.x == 0) store_scale(f, entry, row, scale);
  const float inverse = inverse_scale(scale);
  each([&](int64_t column, int count) {
    finish(column, count);
    store(column, count, inverse);
  });
}

}  // namespace

cudaError_t launch_general(const Fused& f, Pass pass, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(f.batch * f.rows);
  const int64_t groups = ceil_div(f.cols, kWidth * kWarp);
  const auto threads = static_cast<unsigned>(std::clamp<int64_t>(groups, 1, kWarp)) * kWarp;
  return with_kind(f, [&](auto kind) {
    using K = decltype(kind);
    if (is_wide(f)) {
      general_kernel<typename K::Producer, K::in, true><<<blocks, threads, 0, stream>>>(f, pass);
    } else {
      general_kernel<typename K::Producer, K::in, false><<<blocks, threads, 0, stream>>>(f, pass);
    }
    return cudaGetLastError();
  });
}

}  // namespace jax_fp8::fused
