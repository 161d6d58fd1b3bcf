#include <algorithm>
#include <type_traits>

#include "ffi/finish.h"
#include "ffi/follow.h"
#include "ffi/fused.h"
#include "ffi/gemv.h"
#include "ffi/small_m_device.h"

namespace jax_fp8 {
namespace {

// Of the rows, threads and blocks that were tried on an H100, these came closest to a plain read.
constexpr int kWarps = 8, kThreads = 32 * kWarps, kBlocks = 2;  // Blocks on a multiprocessor.
constexpr int kFragments = 2, kTileRows = 8 * kFragments;
constexpr int64_t kNormBytes = 96 << 10;  // Of shared memory for X, with as many blocks as without.

// What stands around a product. kResidual: nothing else; the others may have one too.
enum class Around { kNone, kResidual, kNorm, kSwiglu, kNormSwiglu };

#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
// X times the norm's weight, in packs of 8, and the weight behind it.
extern __shared__ uint4 x_memory[];

// Where a pack lies in its row: so that 8 threads, of which each reads every other pack, meet no
// bank twice.
__device__ int place_of(int pack) { return pack ^ (pack >> 3 & 1); }

// Asks for X and the weight; a thread gets the packs that it will multiply.
__device__ void copy_x(const Product& p, int thread) {
  const int m_size = static_cast<int>(p.m), packs = static_cast<int>(p.k / 8);
  const auto* const x = reinterpret_cast<const uint4*>(p.x.data) + blockIdx.y * p.m * packs;
  const auto* const weight = reinterpret_cast<const uint4*>(p.norm_weight);
  for (int i = thread; i < packs; i += kThreads) {
    copy_pack(x_memory + m_size * packs + i, weight + i);
    for (int m = 0; m < m_size; ++m) {
      copy_pack(x_memory + m * packs + place_of(i), x + m * packs + i);
    }
  }
}

// Multiplies what copy_x has asked for. The squares of X that the warp has are added up, for each
// row.
template <int rows>
__device__ void multiply_x(const Product& p, int thread, float (&warp_squares)[rows]) {
  const int m_size = static_cast<int>(p.m), packs = static_cast<int>(p.k / 8);
  float squares[rows] = {};
  wait_for_packs();
  for (int i = thread; i < packs; i += kThreads) {
    const uint4 weight = x_memory[m_size * packs + i];
#pragma unroll
    for (int m = 0; m < rows; ++m) {
      if (m >= m_size) break;
      uint4& x = x_memory[m * packs + place_of(i)];
      const uint4 value = x;
      squares[m] += sum_of_squares(value);
      x = multiply_bf16(value, weight);
    }
  }
#pragma unroll
  for (int m = 0; m < rows; ++m) {
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      squares[m] += __shfl_xor_sync(0xffffffffu, squares[m], lanes);
    }
    if (thread % 32 == 0) warp_squares[m] = squares[m];
  }
}
#endif

// A block goes through tiles of rows of W, every gridDim.x-th one. Its warps share K, in turns of
// 128 codes; their sums meet at the end of the tile. What is read next, of this tile or the one
// after, is always on its way.
//
// Memory is at its best where 128 bytes of a row are read at once, so 8 threads share a row. In an
// mma that is two groups of 4 threads, which hold different k of the same row: of its 16 rows and 8
// columns, each stands for one half of K of a row of W or X. Half of its 16 x 8 sums are of halves
// that do not belong together; the others, two by two, make 8 x 4.
//
// What fused_matmul.h puts around a product costs no more than this:
// - Norm: a block has all of X in shared memory, times the norm's weight, before the first of W has
//   come (where it follows: after that); the rows' RMS are needed at the end of a tile.
// - SwiGLU: one half of a tile are gates, the other half the values that go with them.
//
// Where it follows the kernel that writes X or the residual, it starts and reads the first of W on
// what room that one leaves at its end. It lets another follow in the same way.
template <Type x_type, bool e4m3, int columns, Around around>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gemv_kernel(Product p, int tiles, bool follows) {
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  constexpr int kRound = 128 * kWarps;         // Codes of a row that all warps take at once.
  constexpr int depth = columns == 1 ? 2 : 1;  // Rounds on their way; registers suffice for these.
  constexpr bool norm = around == Around::kNorm || around == Around::kNormSwiglu;
  constexpr bool swiglu = around == Around::kSwiglu || around == Around::kNormSwiglu;
  constexpr int tile_rows = swiglu ? kTileRows / 2 : kTileRows;
  __shared__ float parts[2][kWarps][kTileRows][4 * columns + 1];
  __shared__ float row_squares[norm ? kWarps : 1][4 * columns];

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int k_size = static_cast<int>(p.k), m_size = static_cast<int>(p.m);
  const int d_size = static_cast<int>(p.d_columns());
  const int second_half = swiglu ? d_size : kTileRows / 2;  // Rows from the first to the second.
  const Type w_type = e4m3 ? Type::kE4M3 : p.w.type;
  const int column = warp * 128 + lane % 8 * 16, own_row = lane / 8;
  const int rounds = (k_size + kRound * depth - 1) / (kRound * depth) * depth;
  const int tile_step = static_cast<int>(gridDim.x) * tile_rows;
  [[maybe_unused]] const int swapped = lane % 8 / 4;  // place_of
  const uint8_t* const x = p.x.data + (int64_t{b} * m_size + own_row) * k_size * 2;

  let_follow();
  const uint64_t policy = policy_read_once();
  int fetch_n = static_cast<int>(blockIdx.x) * tile_rows + own_row, fetch_k = column;
  const uint8_t* w = p.w.data + (b * p.n + fetch_n) * k_size;
  if constexpr (norm) {
    if (!follows) copy_x(p, thread);  // Ahead of W, whose queue is long.
  }
  uint4 w_ring[depth][2 * kFragments];
  const auto load_x = [&](uint4(&values)[columns][2], int k) {
#pragma unroll
    for (int c = 0; c < columns; ++c) {
      const bool exists = own_row + 4 * c < m_size && k < k_size;
      if constexpr (norm) {
        const uint4* const source = x_memory + (own_row + 4 * c) * (k_size / 8) + k / 8;
        values[c][0] = exists ? source[swapped] : uint4{};
        values[c][1] = exists ? source[swapped ^ 1] : uint4{};
      } else {
        const uint8_t* const source = x + (4 * c * int64_t{k_size} + k) * 2;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          values[c][i] = exists ? load_often(source + 16 * i) : uint4{};
        }
      }
    }
  };
  const auto fetch = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 2 * kFragments; ++i) {
      const int half = i / 2, n = i % 2 * 4;
      w_ring[slot][i] =
          fetch_k < k_size && fetch_n + n + (swiglu ? 0 : half * second_half) < d_size
              ? load_once(w + (half * second_half + n) * int64_t{k_size} + fetch_k, policy)
              : uint4{};
    }
    fetch_k += kRound;
    if (fetch_k == column + rounds * kRound) {
      fetch_k = column;
      fetch_n += tile_step;
      w += int64_t{tile_step} * k_size;
    }
  };
#pragma unroll
  for (int d = 0; d < depth; ++d) fetch(d);
  if (follows) {
    wait_for_kernel_in_front();
    if constexpr (norm) copy_x(p, thread);
  }
  if constexpr (norm) multiply_x<4 * columns>(p, thread, row_squares[warp]);

  // The element of a tile that a thread finishes, if any.
  const int row = thread % tile_rows, m = thread / tile_rows;
  float x_scale = m < m_size ? p.x.scale_at(b, m, 0) : 0.0f;
  if constexpr (norm) {
    __syncthreads();
    float total = 0.0f;
    for (int i = 0; i < kWarps && m < m_size; ++i) total += row_squares[i][m];
    x_scale = reciprocal_deviation(total / static_cast<float>(k_size), p.eps);
  }
  float largest = 0.0f;
  int parity = 0;  // So that no warp writes what another still adds up.
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += gridDim.x, parity ^= 1) {
    const int n = tile * tile_rows + row;
    const bool finishes = m < m_size && n < d_size;
    // Loaded here, needed at the end of the tile.
    float w_scale = 0.0f, up_scale = 0.0f, bias = 0.0f, up_bias = 0.0f, residual = 0.0f;
    if (finishes) {
      w_scale = p.w.scale_at(b, n, 0);
      if (p.bias != nullptr) bias = load_as_float(p.bias, p.bias_type, n);
      if (swiglu) {
        up_scale = p.w.scale_at(b, n + d_size, 0);
        if (p.bias != nullptr) up_bias = load_as_float(p.bias, p.bias_type, n + d_size);
      }
      if (around != Around::kNone && p.residual != nullptr) {
        residual = __bfloat162float(p.residual[(int64_t{b} * m_size + m) * d_size + n]);
      }
    }
    float sums[kFragments][columns][4] = {};
    for (int round = 0; round < rounds; round += depth) {
#pragma unroll
      for (int d = 0; d < depth; ++d) {
        const uint4(&codes)[2 * kFragments] = w_ring[d];
        uint4 x_values[columns][2];  // No registers are left to ask for it as early as for W.
        load_x(x_values, column + (round + d) * kRound);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint2 values[columns];
#pragma unroll
          for (int c = 0; c < columns; ++c) {
            const uint4 v = x_values[c][i / 2];
            values[c] = {word_of(v, i % 2 * 2), word_of(v, i % 2 * 2 + 1)};
          }
#pragma unroll
          for (int f = 0; f < kFragments; ++f) {
            const uint2 upper = decode_to<x_type>(word_of(codes[2 * f], i), w_type);
            const uint2 lower = decode_to<x_type>(word_of(codes[2 * f + 1], i), w_type);
            const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
            for (int c = 0; c < columns; ++c) multiply_add<x_type>(sums[f][c], a, values[c]);
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
      float total = 0.0f, up = 0.0f;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        total += parts[parity][i][row][m];
        if (swiglu) up += parts[parity][i][row + kTileRows / 2][m];
      }
      float value = apply_scales(total, x_scale, w_scale);
      if (p.bias != nullptr) value += bias;
      if constexpr (around != Around::kNone) {
        if (swiglu) value = silu(value) * (apply_scales(up, x_scale, up_scale) + up_bias);
        if (p.residual != nullptr) value += residual;
      } else {
        value = activate(p.activation, value);
      }
      store(p, value, (int64_t{b} * m_size + m) * d_size + n);
      largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
    }
    __syncwarp();
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
#endif
}

}  // namespace

bool gemv_takes_norm(const Product& p) {
  return p.m <= kGemvM && (p.m + 1) * p.k * 2 <= kNormBytes;
}

cudaError_t gemv(const Product& p, int processors, cudaStream_t stream, bool follows) {
  const auto launch = [&](auto x_type, auto e4m3, auto columns, auto around) {
    const auto kernel = gemv_kernel<decltype(x_type)::value, decltype(e4m3)::value,
                                    decltype(columns)::value, decltype(around)::value>;
    const int bytes = p.norm_weight == nullptr ? 0 : static_cast<int>((p.m + 1) * p.k * 2);
    if (bytes > 0) {  // The same for all calls, which several threads may make at once.
      const cudaError_t error = cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kNormBytes));
      if (error != cudaSuccess) return error;
    }
    const int64_t tiles = ceil_div(p.d_columns(), p.swiglu ? kTileRows / 2 : kTileRows);
    const int64_t blocks = std::max<int64_t>(1, processors * kBlocks / p.batch);
    const dim3 grid(static_cast<unsigned>(std::min(tiles, blocks)), static_cast<unsigned>(p.batch));
    return launch_kernel(kernel, follows, grid, kThreads, bytes, stream, p, static_cast<int>(tiles),
                         follows);
  };
  const auto launch_for_m = [&](auto x_type, auto e4m3, auto around) {
    if (p.m <= 4) return launch(x_type, e4m3, std::integral_constant<int, 1>(), around);
    return launch(x_type, e4m3, std::integral_constant<int, 2>(), around);
  };
  using None = std::integral_constant<Around, Around::kNone>;
  using Bf16 = std::integral_constant<Type, Type::kBF16>;
  const auto launch_around = [&](auto around) {
    return launch_for_m(Bf16(), std::true_type(), around);
  };
  if (p.norm_weight != nullptr && p.swiglu) {
    return launch_around(std::integral_constant<Around, Around::kNormSwiglu>());
  }
  if (p.norm_weight != nullptr) {
    return launch_around(std::integral_constant<Around, Around::kNorm>());
  }
  if (p.swiglu) return launch_around(std::integral_constant<Around, Around::kSwiglu>());
  if (p.residual != nullptr) {
    return launch_around(std::integral_constant<Around, Around::kResidual>());
  }
  const auto launch_for = [&](auto e4m3) {
    if (p.x.type == Type::kBF16) return launch_for_m(Bf16(), e4m3, None());
    return launch_for_m(std::integral_constant<Type, Type::kF16>(), e4m3, None());
  };
  // With E5M2, each decoding asks for the format, which takes time.
  return p.w.type == Type::kE4M3 ? launch_for(std::true_type()) : launch_for(std::false_type());
}

}  // namespace jax_fp8
