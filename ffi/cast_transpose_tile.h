// What a thread block of cast_transpose knows before it casts: its tile, and the scales of it.
#pragma once

#include "ffi/cast_transpose_kernels.h"

namespace jax_fp8 {

constexpr int kEdge = 128, kColumns = 8;        // Of a tile; of a thread.
constexpr int kThreadsARow = kEdge / kColumns;  // Half a warp.
constexpr int kBandShift = 1;

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
  uint32_t tiles;                        // Of all matrices.
  bool reverse;      // What the pass before had last comes first: the cache has it.
  int turned_width;  // Bytes of the transpose that can be stored at once.
  int parts;         // Of the amax of an entry.
};

// The tile of a thread block, and this thread's part of it.
struct Place {
  uint32_t tile_row, tile_col, entry;
  int64_t matrix, first_row, first_col;
  int thread;      // threadIdx.x
  int row, col;    // In the tile.
  int rows, cols;  // That the tile has.
};

// The walk through q. A band of a matrix that is not full has tiles without rows.
inline Walk walk_of(const CastTranspose& q, int parts) {
  Walk walk;
  walk.tile_rows = static_cast<uint32_t>(ceil_div(q.rows, kEdge));
  walk.tile_cols = static_cast<uint32_t>(ceil_div(q.cols, kEdge));
  walk.shift = 0;
  while (walk.shift < kBandShift && (2u << walk.shift) <= walk.tile_rows) ++walk.shift;
  walk.bands = static_cast<uint32_t>(ceil_div(walk.tile_rows, 1 << walk.shift));
  walk.by_band = Divisor(walk.tile_cols << walk.shift);
  walk.by_matrix = Divisor(walk.bands);
  walk.matrices = static_cast<uint32_t>(q.batch / q.entries);
  walk.by_entry = Divisor(walk.matrices);
  walk.reverse = parts > 0 || (q.block_rows == 1 && q.block_cols == 0);
  walk.parts = parts;
  walk.turned_width = 1;
  for (const int width : {16, 4}) {
    if (walk.turned_width < width && q.rows % width == 0 && is_aligned(q.transposed, width)) {
      walk.turned_width = width;
    }
  }
  walk.tiles =
      static_cast<uint32_t>(q.batch * walk.bands * (int64_t{walk.tile_cols} << walk.shift));
  return walk;
}

// Whether x and the straight result can be loaded and stored 8 values at once.
inline bool loads_vectors(const CastTranspose& q) {
  return q.cols % kColumns == 0 && is_aligned(q.x, 16) && is_aligned(q.straight, kColumns);
}

__device__ inline Place find_place(const CastTranspose& q, const Walk& walk, int rows_a_thread,
                                   uint32_t index, int thread) {
  const uint32_t tile = walk.reverse ? walk.tiles - 1 - index : index;
  const uint32_t band = walk.by_band.divide(tile), matrix = walk.by_matrix.divide(band);
  const uint32_t rest = tile - band * (walk.tile_cols << walk.shift);
  Place at;
  at.tile_col = rest >> walk.shift;
  at.tile_row = ((band - matrix * walk.bands) << walk.shift) + (rest & ((1u << walk.shift) - 1));
  at.entry = walk.by_entry.divide(matrix);
  at.matrix = matrix;
  at.first_row = int64_t{at.tile_row} * kEdge;
  at.first_col = int64_t{at.tile_col} * kEdge;
  at.thread = thread;
  at.row = thread / kThreadsARow * rows_a_thread;
  at.col = thread % kThreadsARow * kColumns;
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

// The largest magnitudes among the columns that half a warp has and the rows that a warp has, one
// to a word or two, as in memory: of the half warp's 4 or 8 rows those in word `of_row`, and of the
// thread's 8 columns.
template <Type in>
struct Strips {
  static constexpr int kSize = in == Type::kF32 ? 4 : 2, kColumnWords = kColumns * kSize / 4;
  static constexpr int kShare = kThreadsARow / 4;  // Threads that know the same rows.
  uint32_t row, columns[kColumnWords];

  __device__ static int of_row() { return threadIdx.x % kThreadsARow / kShare; }

  template <typename Packs>
  __device__ explicit Strips(const Packs& packs) : columns{} {
    uint32_t rows[4];
#pragma unroll
    for (int i = 0; i < Tile<in>::kRows; ++i) {
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
    row = lanes_combine<kThreadsARow>(
        rows, [](uint32_t a, uint32_t b) { return max_magnitudes<in>(a, b); });
#pragma unroll
    for (uint32_t& word : columns) {
      word = max_magnitudes<in>(word, __shfl_xor_sync(0xffffffffu, word, kThreadsARow));
    }
  }
};

// The largest magnitudes of a tile's rows and columns, in `memory`: 128 of the rows, then for each
// warp 128 of the columns. Whoever calls synchronizes.
template <Type in, typename Packs>
__device__ void strip_amaxes(const Place& at, const Packs& packs, uint8_t* memory) {
  const Strips<in> found(packs);
  const auto& columns = found.columns;
  constexpr int kSize = Strips<in>::kSize;
  if (threadIdx.x % found.kShare == 0) {
    reinterpret_cast<uint32_t*>(memory + at.row * kSize)[found.of_row()] = found.row;
  }
  if (threadIdx.x % 32 < kThreadsARow) {
    uint8_t* target = memory + (threadIdx.x / 32 + 1) * kEdge * kSize + at.col * kSize;
#pragma unroll
    for (int w = 0; w < Strips<in>::kColumnWords; w += 4) {
      reinterpret_cast<uint4*>(target)[w / 4] =
          make_uint4(columns[w], columns[w + 1], columns[w + 2], columns[w + 3]);
    }
  }
}

// Where the scratch has the amax of a row or column of a tile.
__device__ inline int64_t line_index(const CastTranspose& q, const Place& at, bool of_columns,
                                     int i) {
  return of_columns ? q.batch * q.rows + at.matrix * q.cols + at.first_col + i
                    : at.matrix * q.rows + at.first_row + i;
}

// A thread each has a row or, the second 128, a column of a tile.
__device__ inline bool has_line(const CastTranspose& q, const Place& at) {
  const bool of_columns = at.thread >= kEdge;
  const int i = at.thread % kEdge;
  return at.thread < 2 * kEdge && (of_columns ? q.transposed_scale != nullptr && i < at.cols
                                              : q.straight_scale != nullptr && i < at.rows);
}

// The amax of its line, as was found before the cast; bits of a float.
__device__ inline uint32_t known_amax(const CastTranspose& q, const Place& at) {
  if (!has_line(q, at)) return 0;
  const uint32_t* const amaxes = q.known != nullptr ? q.known : q.scratch;
  // From L2: of atomics, maybe of this kernel.
  return __ldcg(amaxes + line_index(q, at, at.thread >= kEdge, at.thread % kEdge));
}

// The amax of its line within the tile, of what strip_amaxes left in `memory`.
template <Type in>
__device__ uint32_t strip_amax(const uint8_t* memory) {
  using Magnitude = std::conditional_t<in == Type::kF32, uint32_t, uint16_t>;
  static_assert(Tile<in>::kThreads >= 2 * kEdge);
  const auto* found = reinterpret_cast<const Magnitude*>(memory) + threadIdx.x % kEdge;
  uint32_t largest = found[0];
  if (threadIdx.x >= kEdge) {
    largest = 0;
#pragma unroll
    for (int w = 1; w <= Tile<in>::kThreads / 32; ++w) {
      largest = max(largest, uint32_t{found[w * kEdge]});
    }
  }
  return magnitude_bits<in>(largest);
}

// The inverses of the scales of a tile's rows, and then of its columns, from each thread's amax.
template <Type out>
__device__ void split_inverses(const CastTranspose& q, const Walk& walk, const Place& at,
                               uint32_t amax, float* inverses) {
  if (!has_line(q, at)) return;
  const bool of_columns = at.thread >= kEdge;
  const int64_t lines = of_columns ? q.cols : q.rows;
  const int64_t line =
      at.matrix * lines + (of_columns ? at.first_col : at.first_row) + at.thread % kEdge;
  const float scale = dynamic_scale(__uint_as_float(amax), out, q.power_of_two);
  float* const scales = of_columns ? q.transposed_scale : q.straight_scale;
  const uint32_t along = of_columns ? at.tile_row : at.tile_col;
  if (q.block_cols != 0) {
    scales[line * (of_columns ? walk.tile_rows : walk.tile_cols) + along] = scale;
  } else if (along == 0) {
    scales[line] = scale;
  }
  inverses[at.thread] = inverse_scale(scale);
}

}  // namespace jax_fp8
