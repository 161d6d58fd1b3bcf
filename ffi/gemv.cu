#include <algorithm>
#include <type_traits>

#include "ffi/finish.h"
#include "ffi/gemv.h"
#include "ffi/small_m_device.h"

namespace jax_fp8 {
namespace {

// Of the rows, threads and blocks that were tried on an H100, these came closest to a plain read.
constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlocks = 2;  // Blocks on a multiprocessor.
constexpr int kFragments = 2, kTileRows = 8 * kFragments;

// A block goes through tiles of rows of W, every gridDim.x-th one. Its warps share K, in turns of
// 128 codes; their sums meet at the end of the tile. What is read next, of this tile or the one
// after, is always on its way.
//
// Memory is at its best where 128 bytes of a row are read at once, so 8 threads share a row. In an
// mma that is two groups of 4 threads, which hold different k of the same row: of its 16 rows and 8
// columns, each stands for one half of K of a row of W or X. Half of its 16 x 8 sums are of halves
// that do not belong together; the others, two by two, make 8 x 4.
template <Type x_kind, bool e4m3, int columns>
__global__ void __launch_bounds__(kThreads, kBlocks) gemv_kernel(Product p, int tiles) {
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  constexpr Type mma = x_kind == Type::kBF16 ? Type::kBF16 : Type::kF16;
  constexpr int x_width = x_kind == Type::kE4M3 ? 1 : 2;
  constexpr int kRound = 128 * kWarps;         // Codes of a row that all warps take at once.
  constexpr int depth = columns == 1 ? 2 : 1;  // Rounds on their way; registers suffice for these.
  __shared__ float parts[2][kWarps][kTileRows][4 * columns + 1];

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int k_size = static_cast<int>(p.k), m_size = static_cast<int>(p.m);
  const int n_size = static_cast<int>(p.n);
  const Type w_type = e4m3 ? Type::kE4M3 : p.w.type;
  const Type x_type = e4m3 ? Type::kE4M3 : p.x.type;
  const int column = warp * 128 + lane % 8 * 16, own_row = lane / 8;
  const int rounds = (k_size + kRound * depth - 1) / (kRound * depth) * depth;
  const int tile_step = static_cast<int>(gridDim.x) * kTileRows;
  const uint8_t* const x = p.x.data + (int64_t{b} * m_size + own_row) * k_size * x_width;

  const uint64_t policy = policy_read_once();
  int fetch_n = static_cast<int>(blockIdx.x) * kTileRows + own_row, fetch_k = column;
  const uint8_t* w = p.w.data + (int64_t{b} * n_size + fetch_n) * k_size;
  // For X in 16 bits there are no registers to ask for it as early as for W.
  constexpr bool x_early = x_width == 1;
  uint4 w_ring[depth][2 * kFragments], x_ring[depth][columns][x_width];
  const auto load_x = [&](uint4(&values)[columns][x_width], int k) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const bool exists = own_row + 4 * c < m_size && k < k_size;
      const uint8_t* const source = x + (4 * c * int64_t{k_size} + k) * x_width;
#pragma unroll
      for (int i = 0; i < x_width; ++i) {
        values[c][i] = exists ? load_often(source + 16 * i) : uint4{};
      }
    }
  };
  const auto fetch = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      w_ring[slot][i] = fetch_k < k_size && fetch_n + 4 * i < n_size
                            ? load_once(w + 4 * i * int64_t{k_size} + fetch_k, policy)
                            : uint4{};
    }
    if constexpr (x_early) load_x(x_ring[slot], fetch_k);
    fetch_k += kRound;
    if (fetch_k == column + rounds * kRound) {
      fetch_k = column;
      fetch_n += tile_step;
      w += int64_t{tile_step} * k_size;
    }
  };
#pragma unroll
  for (int d = 0; d < depth; ++d) fetch(d);

  // The element of a tile that a thread finishes, if any.
  const int row = thread % kTileRows, m = thread / kTileRows;
  const float x_scale = m < m_size ? p.x.scale_at(b, m, 0) : 0.0f;
  float largest = 0.0f;
  int parity = 0;  // So that no warp writes what another still adds up.
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += gridDim.x, parity ^= 1) {
    const int n = tile * kTileRows + row;
    const bool finishes = m < m_size && n < n_size;
    // Loaded here, needed at the end of the tile.
    const float w_scale = finishes ? p.w.scale_at(b, n, 0) : 0.0f;
    const float bias = finishes && p.bias != nullptr ? load_as_float(p.bias, p.bias_type, n) : 0.0f;
    float sums[kFragments][columns][4] = {};
    for (int round = 0; round < rounds; round += depth) {
#pragma unroll
      for (int d = 0; d < depth; ++d) {
        const uint4(&codes)[2 * kFragments] = w_ring[d];
        uint4(&x_values)[columns][x_width] = x_ring[d];
        if constexpr (!x_early) load_x(x_values, column + (round + d) * kRound);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint2 values[columns];
#pragma unroll
          for (int c = 0; c < columns; ++c) {
            if constexpr (x_width == 1) {
              values[c] = decode_to_f16(word_of(x_values[c][0], i), x_type);
            } else {
              const uint4 v = x_values[c][i / 2];
              values[c] = {word_of(v, i % 2 * 2), word_of(v, i % 2 * 2 + 1)};
            }
          }
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const uint2 upper = decode_to<mma>(word_of(codes[2 * f], i), w_type);
            const uint2 lower = decode_to<mma>(word_of(codes[2 * f + 1], i), w_type);
            const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
            for (int c = 0; c < columns; ++c) multiply_add<mma>(sums[f][c], a, values[c]);
          }
        }
        fetch(d);
      }
    }

    // Group 2 i has the sums over one half of K in its even columns, group 2 i + 1 those over the
    // other in its odd ones.
    const bool odd = lane / 4 % 2 == 1;
#pragma unroll
    for (int f = 0; f < kFragments; ++f) {
#pragma unroll
      for (int c = 0; c < columns; ++c) {
        const float (&sum)[4] = sums[f][c];
        float upper = odd ? sum[1] : sum[0], lower = odd ? sum[3] : sum[2];
        upper += __shfl_xor_sync(0xffffffffu, upper, 4);
        lower += __shfl_xor_sync(0xffffffffu, lower, 4);
        parts[parity][warp][f * 8 + own_row + (odd ? 4 : 0)][4 * c + lane % 4] =
            odd ? lower : upper;
      }
    }
    __syncthreads();
    if (finishes) {
      float total = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) total += parts[parity][i][row][m];
      float value = apply_scales(total, x_scale, w_scale);
      if (p.bias != nullptr) value += bias;
      value = activate(p.activation, value);
      store(p, value, (int64_t{b} * m_size + m) * n_size + n);
      largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
    }
    __syncwarp();
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
#endif
}

}  // namespace

cudaError_t gemv(const Product& p, int processors, cudaStream_t stream) {
  const auto launch = [&](auto x_kind, auto e4m3, auto columns) {
    const int64_t tiles = ceil_div(p.n, kTileRows);
    const int64_t blocks = std::max<int64_t>(1, processors * kBlocks / p.batch);
    const dim3 grid(static_cast<unsigned>(std::min(tiles, blocks)), static_cast<unsigned>(p.batch));
    gemv_kernel<decltype(x_kind)::value, decltype(e4m3)::value, decltype(columns)::value>
        <<<grid, kThreads, 0, stream>>>(p, static_cast<int>(tiles));
    return cudaGetLastError();
  };
  const auto launch_for_m = [&](auto x_kind, auto e4m3) {
    if (p.m <= 4) return launch(x_kind, e4m3, std::integral_constant<int, 1>());
    return launch(x_kind, e4m3, std::integral_constant<int, 2>());
  };
  // Where all that is FP8 is E4M3; else each decoding asks for the format, which takes time.
  const auto launch_for = [&](auto e4m3) {
    if (p.x.type == Type::kBF16) {
      return launch_for_m(std::integral_constant<Type, Type::kBF16>(), e4m3);
    }
    if (p.x.type == Type::kF16) {
      return launch_for_m(std::integral_constant<Type, Type::kF16>(), e4m3);
    }
    return launch_for_m(std::integral_constant<Type, Type::kE4M3>(), e4m3);
  };
  const bool e4m3 = p.w.type == Type::kE4M3 && p.x.type != Type::kE5M2;
  return e4m3 ? launch_for(std::true_type()) : launch_for(std::false_type());
}

}  // namespace jax_fp8
