// What a thread block of cast_transpose knows before it casts: its tile, and the scales of it.
#pragma once

#include "ffi/cast_transpose_kernels.h"

namespace jax_fp8 {

constexpr int kEdge = 128, kColumns = 8;        // Of a tile; of a thread.
constexpr int kThreadsARow = kEdge / kColumns;  // Half a warp.

// A thread has 128 bytes in flight, and an SM 1024 threads.
template <Type in>
struct Tile {
  static constexpr int kRows = in == Type::kF32 ? 4 : 8;  // Of a thread.
  static constexpr int kThreads = kThreadsARow * kEdge / kRows;
  static constexpr int kBlocks = 1024 / kThreads;  // On an SM.
};

// Divides numbers below 2^31: Granlund and Montgomery, PLDI 1994.
struct Divisor {
  uint32_t factor = 0;
  int shift = 0;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) {
    int bits = 0;
    while ((uint64_t{1} << bits) < divisor) ++bits;
    shift = 31 + bits;
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
  __device__ uint32_t divide(uint32_t number) const {
    return static_cast<uint32_t>(uint64_t{number} * factor >> shift);
  }
};

// How the tiles are walked: in bands of 2^shift rows of tiles, down each column of a band first. So
// runs of tiles side by side complete the lines of x, and of the transpose as well.
struct Walk {
  uint32_t tile_rows, tile_cols, bands;  // Of a matrix.
  int shift;
  Divisor by_band, by_matrix, by_entry;  // Tiles to bands, bands to matrices, these to entries.
  uint32_t matrices;                     // Of an entry.
  bool reverse;      // What the pass before had last comes first: the cache has it.
  int turned_width;  // Bytes of the transpose that can be stored at once.
  int parts;         // Of the amax of an entry.
};

// The tile of a thread block, and this thread's part of it.
struct Place {
  uint32_t tile_row, tile_col, entry;
  int64_t matrix, first_row, first_col;
  int row, col;    // In the tile.
  int rows, cols;  // That the tile has.
};

__device__ inline Place find_place(const CastTranspose& q, const Walk& walk, int rows_a_thread) {
  const uint32_t tile = walk.reverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const uint32_t band = walk.by_band.divide(tile), matrix = walk.by_matrix.divide(band);
  const uint32_t rest = tile - band * (walk.tile_cols << walk.shift);
  Place at;
  at.tile_col = rest >> walk.shift;
  at.tile_row = ((band - matrix * walk.bands) << walk.shift) + (rest & ((1u << walk.shift) - 1));
  at.entry = walk.by_entry.divide(matrix);
  at.matrix = matrix;
  at.first_row = int64_t{at.tile_row} * kEdge;
  at.first_col = int64_t{at.tile_col} * kEdge;
  at.row = threadIdx.x / kThreadsARow * rows_a_thread;
  at.col = threadIdx.x % kThreadsARow * kColumns;
  at.rows = static_cast<int>(min(q.rows - at.first_row, int64_t{kEdge}));
  at.cols = static_cast<int>(min(q.cols - at.first_col, int64_t{kEdge}));
  return at;
}

// --- Scales --------------------------------------------------------------------------------------

// The inverse of the one scale of a tile: of a tensor or a square.
template <Type in, Type out, typename Packs>
__device__ float shared_inverse(const CastTranspose& q, const Walk& walk, const Place& at,
                                const Packs& packs) {
  const int64_t entry = at.entry;
  const bool squares = q.block_rows != 0;
  uint32_t largest = 0;
  if (walk.parts > 0) {
    for (int i = threadIdx.x; i < walk.parts; i += blockDim.x) {
      largest = max(largest, q.scratch[entry * kMaxParts + i]);
    }
    largest = block_max(largest);
  } else if (squares || q.amax != nullptr) {
    Amax<in> amax;
#pragma unroll
    for (const auto& pack : packs) amax.take(pack);
    largest = block_max(amax.bits());
  }
  const float scale = q.given != nullptr
                          ? q.given[entry]
                          : dynamic_scale(__uint_as_float(largest), out, q.power_of_two);
  if (threadIdx.x == 0) {
    const bool first = at.tile_row == 0 && at.tile_col == 0 && at.matrix == entry * walk.matrices;
    int64_t straight = entry, transposed = entry;
    if (squares) {
      straight = (at.matrix * walk.tile_rows + at.tile_row) * walk.tile_cols + at.tile_col;
      transposed = (at.matrix * walk.tile_cols + at.tile_col) * walk.tile_rows + at.tile_row;
    }
    if (squares || first) {
      if (q.straight_scale != nullptr) q.straight_scale[straight] = scale;
      if (q.transposed_scale != nullptr) q.transposed_scale[transposed] = scale;
    }
    if (q.amax != nullptr && q.given == nullptr && first) {
      q.amax[entry] = __uint_as_float(largest);
    }
    if (q.amax != nullptr && q.given != nullptr) {
      // Most blocks find a larger one there, and an atomic maximum is slower than a look.
      auto* total = reinterpret_cast<uint32_t*>(q.amax) + entry;
      if (largest > *static_cast<volatile uint32_t*>(total)) atomicMax(total, largest);
    }
  }
  return inverse_scale(scale);
}

// The largest magnitudes of a tile's rows and columns, in `memory`: 128 of the rows, then for each
// warp 128 of the columns. Whoever calls synchronizes.
template <Type in, typename Packs>
__device__ void strip_amaxes(const Place& at, const Packs& packs, uint8_t* memory) {
  constexpr int kRows = Tile<in>::kRows, kSize = in == Type::kF32 ? 4 : 2;
  constexpr int kColumnWords = kColumns * kSize / 4;
  uint32_t rows[4], columns[kColumnWords] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < kColumnWords; ++w) {
      const uint32_t word = magnitudes<in>(packs[i].words[w]);
      largest = max_magnitudes<in>(largest, word);
      columns[w] = max_magnitudes<in>(columns[w], word);
    }
    if constexpr (in == Type::kF32) {
      rows[i] = largest;
    } else if (i % 2 == 0) {  // Two rows to a word.
      rows[i / 2] = largest;
    } else {
      rows[i / 2] = __vmaxu2(__byte_perm(rows[i / 2], largest, 0x5410),
                             __byte_perm(rows[i / 2], largest, 0x7632));
    }
  }
#pragma unroll
  for (int w = 0; w < 4; ++w) {
#pragma unroll
    for (int lane = kThreadsARow / 2; lane > 0; lane /= 2) {
      rows[w] = max_magnitudes<in>(rows[w], __shfl_xor_sync(0xffffffffu, rows[w], lane));
    }
  }
#pragma unroll
  for (int w = 0; w < kColumnWords; ++w) {
    columns[w] =
        max_magnitudes<in>(columns[w], __shfl_xor_sync(0xffffffffu, columns[w], kThreadsARow));
  }
  if (threadIdx.x % kThreadsARow == 0) {
    *reinterpret_cast<uint4*>(memory + at.row * kSize) =
        make_uint4(rows[0], rows[1], rows[2], rows[3]);
  }
  if (threadIdx.x % 32 < kThreadsARow) {
    uint8_t* target = memory + (threadIdx.x / 32 + 1) * kEdge * kSize + at.col * kSize;
#pragma unroll
    for (int w = 0; w < kColumnWords; w += 4) {
      reinterpret_cast<uint4*>(target)[w / 4] =
          make_uint4(columns[w], columns[w + 1], columns[w + 2], columns[w + 3]);
    }
  }
}

// The inverses of the scales of a tile's rows, and then of its columns: a thread each. In tiles of
// (1, 128), `memory` has what strip_amaxes left there.
template <Type in, Type out>
__device__ void split_inverses(const CastTranspose& q, const Walk& walk, const Place& at,
                               const uint8_t* memory, float* inverses) {
  using Magnitude = std::conditional_t<in == Type::kF32, uint32_t, uint16_t>;
  static_assert(Tile<in>::kThreads >= 2 * kEdge);
  if (threadIdx.x >= 2 * kEdge) return;
  const bool of_columns = threadIdx.x >= kEdge;
  const int i = threadIdx.x % kEdge;
  float* const scales = of_columns ? q.transposed_scale : q.straight_scale;
  if (scales == nullptr || i >= (of_columns ? at.cols : at.rows)) return;
  const int64_t lines = of_columns ? q.cols : q.rows;
  const int64_t line = at.matrix * lines + (of_columns ? at.first_col : at.first_row) + i;
  uint32_t amax;
  bool writes = true;
  int64_t index = line;
  if (q.block_cols == 0) {
    const uint32_t* const amaxes = q.known != nullptr ? q.known : q.scratch;
    amax = amaxes[(of_columns ? q.batch * q.rows : 0) + line];
    writes = (of_columns ? at.tile_row : at.tile_col) == 0;
  } else {
    const auto* found = reinterpret_cast<const Magnitude*>(memory) + i;
    uint32_t largest = found[0];
    if (of_columns) {
      largest = 0;
#pragma unroll
      for (int w = 1; w <= Tile<in>::kThreads / 32; ++w) {
        largest = max(largest, uint32_t{found[w * kEdge]});
      }
    }
    amax = magnitude_bits<in>(largest);
    index = of_columns ? line * walk.tile_rows + at.tile_row : line * walk.tile_cols + at.tile_col;
  }
  const float scale = dynamic_scale(__uint_as_float(amax), out, q.power_of_two);
  if (writes) scales[index] = scale;
  inverses[threadIdx.x] = inverse_scale(scale);
}

}  // namespace jax_fp8
