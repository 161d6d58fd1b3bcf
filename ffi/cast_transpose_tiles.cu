// The cast itself: a thread block reads a tile of 128 x 128 once and writes both layouts of it.
#include "ffi/cast_transpose_cast.h"
#include "ffi/follow.h"

namespace jax_fp8 {
namespace {

template <Type in, Type out, bool split, bool vector, bool stochastic>
__global__ void __launch_bounds__(Tile<in>::kThreads,
                                  // What waits for arithmetic had better have its registers.
                                  Tile<in>::kBlocks / (vector && !stochastic ? 1 : 2))
    cast_kernel(const CastTranspose q, const Walk walk) {
  constexpr int kRows = Tile<in>::kRows;
  __shared__ alignas(16) uint8_t turned[kEdge * kEdge];
  __shared__ alignas(16) float inverses[split ? 2 * kEdge : 1];
  const Place at = find_place(q, walk, kRows, blockIdx.x, static_cast<int>(threadIdx.x));
  if (at.rows <= 0) return;  // The last band of a matrix may have fewer rows.
  Pack<in, kColumns> packs[kRows];
  load_tile<in, vector>(q, at, packs);
  wait_for_kernel_in_front();  // Which finds amaxes, or zeroes them.
  float inverse = 0.0f;
  if constexpr (split) {
    uint32_t amax = 0;
    if (q.block_cols == 0) {
      amax = known_amax(q, at);
    } else {
      strip_amaxes<in>(at, packs, turned);
      __syncthreads();
      amax = strip_amax<in>(turned);
    }
    split_inverses<out>(q, walk, at, amax, inverses);
    __syncthreads();
  } else {
    inverse = shared_inverse<in, out>(q, walk, at, packs);
  }
  cast_tile<in, out, split, vector, stochastic>(q, walk, at, packs, inverse, inverses, turned);
}

template <Type in, Type out, bool split, bool vector>
cudaError_t launch(const CastTranspose& q, const Walk& walk, bool follows, cudaStream_t stream) {
  const auto kernel = q.keys != nullptr ? cast_kernel<in, out, split, vector, true>
                                        : cast_kernel<in, out, split, vector, false>;
  return launch_kernel(kernel, follows, walk.tiles, Tile<in>::kThreads, 0, stream, q, walk);
}

}  // namespace

cudaError_t cast_tiles(const CastTranspose& q, int parts, bool follows, cudaStream_t stream) {
  const Walk walk = walk_of(q, parts);
  const bool vector = loads_vectors(q);
  return with_type(q.x_type, [&](auto type) {
    constexpr Type in = decltype(type)::value;
    const auto with_format = [&](auto format) {
      constexpr Type out = decltype(format)::value;
      if (q.block_rows == 1) {
        return vector ? launch<in, out, true, true>(q, walk, follows, stream)
                      : launch<in, out, true, false>(q, walk, follows, stream);
      }
      return vector ? launch<in, out, false, true>(q, walk, follows, stream)
                    : launch<in, out, false, false>(q, walk, follows, stream);
    };
    return q.data_type == Type::kE4M3 ? with_format(std::integral_constant<Type, Type::kE4M3>{})
                                      : with_format(std::integral_constant<Type, Type::kE5M2>{});
  });
}

}  // namespace jax_fp8
