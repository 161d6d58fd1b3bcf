// The cast itself: a thread block reads a tile of 128 x 128 once and writes both layouts of it.
//
// A thread has 8 columns of 4 or 8 rows in registers. It stores what it casts as rows; the turned
// tile goes through shared memory, as bytes, so that the transpose is stored as whole lines too.
#include "ffi/cast_transpose_tile.h"
#include "ffi/stochastic.h"

namespace jax_fp8 {
namespace {

constexpr int kBandShift = 1;

// The random bits of the 8 elements that a thread has in a row.
struct Bits {
  uint32_t words[kColumns / 2];
  __device__ uint32_t operator[](int j) const {
    return j % 2 ? words[j / 2] >> 16 : words[j / 2] & 0xffffu;
  }
};

// A kernel has these many times over. Where it is not for its speed they are called: inlined, they
// made up most of the module.
__device__ __noinline__ uint32_t random_bits_called(uint32_t key0, uint32_t key1, uint64_t index) {
  return random_bits(key0, key1, index);
}

template <Type out>
__device__ __noinline__ uint32_t encode_four_called(float a, float b, float c, float d) {
  return encode_pair<out>(a, b) | encode_pair<out>(c, d) << 16;
}

// Rounded with 16 bits each, those of the first in the low half.
template <Type out>
__device__ __noinline__ uint32_t encode_four_random(float a, float b, float c, float d,
                                                    uint32_t bits_ab, uint32_t bits_cd) {
  return encode_pair<out>(round_stochastic<out>(a, bits_ab & 0xffffu),
                          round_stochastic<out>(b, bits_ab >> 16)) |
         encode_pair<out>(round_stochastic<out>(c, bits_cd & 0xffffu),
                          round_stochastic<out>(d, bits_cd >> 16))
             << 16;
}

template <bool vector>
__device__ Bits bits_of_row(uint32_t key0, uint32_t key1, uint64_t index) {
  Bits bits;
  if constexpr (vector) {  // So that a row of threads starts with a new counter.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const RandomWords words = threefry(key0, key1, index / 4 + i);
      bits.words[2 * i] = words.first, bits.words[2 * i + 1] = words.second;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) {
      const uint32_t low = random_bits_called(key0, key1, index + 2 * i);
      bits.words[i] = low | random_bits_called(key0, key1, index + 2 * i + 1) << 16;
    }
  }
  return bits;
}

template <Type out>
__device__ uint32_t encode_four(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
  return encode_pair<out>(a, b) | encode_pair<out>(c, d) << 16;
#else  // Without the instruction for it.
  return encode_four_called<out>(a, b, c, d);
#endif
}

// Four words of four bytes, turned.
__device__ inline void turn(const uint32_t (&rows)[4], uint32_t (&columns)[4]) {
  const uint32_t low01 = __byte_perm(rows[0], rows[1], 0x5140);
  const uint32_t low23 = __byte_perm(rows[2], rows[3], 0x5140);
  const uint32_t high01 = __byte_perm(rows[0], rows[1], 0x7362);
  const uint32_t high23 = __byte_perm(rows[2], rows[3], 0x7362);
  columns[0] = __byte_perm(low01, low23, 0x5410);
  columns[1] = __byte_perm(low01, low23, 0x7632);
  columns[2] = __byte_perm(high01, high23, 0x5410);
  columns[3] = __byte_perm(high01, high23, 0x7632);
}

// Where byte `row` of the turned tile's row `column` is in shared memory. Half a warp that has the
// same rows writes 8 bytes each to 16 columns 8 apart, a quarter of one reads a column of 16 bytes
// each: neither meets a bank twice.
__device__ inline int turned_place(int column, int row) {
  return column * kEdge + (((row / 8) ^ (column / kColumns)) * 8 | row % 8);
}

// --- The kernel ----------------------------------------------------------------------------------

// The turned tile to the transpose, `width` bytes a thread at once.
template <int threads>
__device__ void store_turned(const CastTranspose& q, const Walk& walk, const Place& at,
                             const uint8_t* turned) {
  uint8_t* const target =
      q.transposed + (at.matrix * q.cols + at.first_col) * q.rows + at.first_row;
  if (walk.turned_width == 16) {
    constexpr int kChunks = kEdge / 16;
#pragma unroll
    for (int i = threadIdx.x; i < kEdge * kChunks; i += threads) {
      const int column = i / kChunks, row = i % kChunks * 16;
      if (column >= at.cols || row >= at.rows) continue;
      // Both halves are in the same 16 bytes, in one order or the other.
      const uint4 both =
          *reinterpret_cast<const uint4*>(turned + (turned_place(column, row) & ~15));
      const bool swapped = column / kColumns % 2;
      *reinterpret_cast<uint4*>(target + column * q.rows + row) =
          swapped ? make_uint4(both.z, both.w, both.x, both.y) : both;
    }
    return;
  }
  const auto store_each = [&](auto unit) {
    using Unit = decltype(unit);
    for (int column = threadIdx.x / 32; column < at.cols; column += threads / 32) {
      for (int row = threadIdx.x % 32 * sizeof(Unit); row < at.rows; row += 32 * sizeof(Unit)) {
        *reinterpret_cast<Unit*>(target + column * q.rows + row) =
            *reinterpret_cast<const Unit*>(turned + turned_place(column, row));
      }
    }
  };
  if (walk.turned_width == 4) {
    store_each(uint32_t{});
  } else {
    store_each(uint8_t{});
  }
}

// `split`: rows and columns have scales of their own, so that there are two codes of a value.
// `vector`: x and the straight result are loaded and stored 8 values at once.
template <Type in, Type out, bool split, bool vector, bool stochastic>
__global__ void __launch_bounds__(Tile<in>::kThreads,
                                  // What waits for arithmetic had better have its registers.
                                  Tile<in>::kBlocks / (vector && !stochastic ? 1 : 2))
    cast_kernel(const CastTranspose q, const Walk walk) {
  constexpr int kRows = Tile<in>::kRows, kThreads = Tile<in>::kThreads;
  using P = Pack<in, kColumns>;
  using T = typename Native<in>::type;
  __shared__ alignas(16) uint8_t turned[kEdge * kEdge];
  __shared__ alignas(16) float inverses[split ? 2 * kEdge : 1];
  const Place at = find_place(q, walk, kRows);
  if (at.rows <= 0) return;  // The last band of a matrix may have fewer rows.
  const int64_t start =
      (at.matrix * q.rows + at.first_row + at.row) * q.cols + at.first_col + at.col;
  const T* const source = static_cast<const T*>(q.x) + start;
  P packs[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    packs[i] = {};
    if constexpr (vector) {
      if (at.row + i < at.rows && at.col < at.cols) packs[i].load(source + i * q.cols);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (at.row + i >= at.rows || at.col + j >= at.cols) continue;
        Pack<in, 1> one;
        one.load(source + i * q.cols + j);
        constexpr int kPerWord = in == Type::kF32 ? 1 : 2;
        packs[i].words[j / kPerWord] |= one.words[0] << (j % kPerWord * 16);
      }
    }
  }

  float inverse = 0.0f, column_inverses[kColumns] = {};
  if constexpr (split) {
    if (q.block_cols != 0) strip_amaxes<in>(at, packs, turned);
    __syncthreads();
    split_inverses<in, out>(q, walk, at, turned, inverses);
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kColumns; ++j) column_inverses[j] = inverses[kEdge + at.col + j];
  } else {
    inverse = shared_inverse<in, out>(q, walk, at, packs);
  }
  // Makes NaN of an infinity under a static scale: as in store_quantized. A dynamic one is NaN.
  const float zero = inverse * 0.0f;
  uint32_t key0 = 0, key1 = 0;
  uint64_t index = 0;
  if constexpr (stochastic) {
    key0 = q.keys[2 * int64_t{at.entry}], key1 = q.keys[2 * int64_t{at.entry} + 1];
    index = start - int64_t{at.entry} * walk.matrices * q.rows * q.cols;
  }

  uint32_t columns[kColumns][kRows / 4];
#pragma unroll
  for (int k = 0; k < kRows / 4; ++k) {
    Bits bits[stochastic ? 4 : 1];
    if constexpr (stochastic) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bits[i] = bits_of_row<vector>(key0, key1, index + (4 * k + i) * q.cols);
      }
    }
    const auto value = [&](int i, int j, float factor) {
      const float wide = packs[4 * k + i][j];
      return split ? wide * factor : fmaf(wide, factor, wide * zero);
    };
    if (!split || q.straight != nullptr) {
      uint32_t codes[kColumns / 4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float factor = split ? inverses[at.row + 4 * k + i] : inverse;
#pragma unroll
        for (int h = 0; h < kColumns / 4; ++h) {
          const float a = value(i, 4 * h, factor), b = value(i, 4 * h + 1, factor);
          const float c = value(i, 4 * h + 2, factor), d = value(i, 4 * h + 3, factor);
          if constexpr (stochastic) {
            const uint32_t* const words = bits[i].words + 2 * h;
            codes[h][i] = encode_four_random<out>(a, b, c, d, words[0], words[1]);
          } else {
            codes[h][i] = encode_four<out>(a, b, c, d);
          }
        }
      }
      if (q.straight != nullptr) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at.row + 4 * k + i >= at.rows || at.col >= at.cols) continue;
          uint8_t* const target = q.straight + start + (4 * k + i) * q.cols;
          if constexpr (vector) {
            *reinterpret_cast<uint2*>(target) = make_uint2(codes[0][i], codes[1][i]);
          } else {
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
              if (at.col + j < at.cols) target[j] = codes[j / 4][i] >> (j % 4 * 8) & 0xffu;
            }
          }
        }
      }
      if constexpr (!split) {
#pragma unroll
        for (int h = 0; h < kColumns / 4; ++h) {
          uint32_t four[4];
          turn(codes[h], four);
#pragma unroll
          for (int j = 0; j < 4; ++j) columns[4 * h + j][k] = four[j];
        }
      }
    }
    if (split && q.transposed != nullptr) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float factor = column_inverses[j];
        const float a = value(0, j, factor), b = value(1, j, factor);
        const float c = value(2, j, factor), d = value(3, j, factor);
        if constexpr (stochastic) {
          columns[j][k] = encode_four_random<out>(a, b, c, d, bits[0][j] | bits[1][j] << 16,
                                                  bits[2][j] | bits[3][j] << 16);
        } else {
          columns[j][k] = encode_four<out>(a, b, c, d);
        }
      }
    }
  }
  if (q.transposed == nullptr) return;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    uint8_t* const place = turned + turned_place(at.col + j, at.row);
    if constexpr (kRows == 8) {
      *reinterpret_cast<uint2*>(place) = make_uint2(columns[j][0], columns[j][1]);
    } else {
      *reinterpret_cast<uint32_t*>(place) = columns[j][0];
    }
  }
  __syncthreads();
  store_turned<kThreads>(q, walk, at, turned);
}

template <Type in, Type out, bool split, bool vector>
cudaError_t launch(const CastTranspose& q, const Walk& walk, cudaStream_t stream) {
  const auto blocks =
      static_cast<unsigned>(q.batch * walk.bands * (int64_t{walk.tile_cols} << walk.shift));
  if (q.keys != nullptr) {
    cast_kernel<in, out, split, vector, true><<<blocks, Tile<in>::kThreads, 0, stream>>>(q, walk);
  } else {
    cast_kernel<in, out, split, vector, false><<<blocks, Tile<in>::kThreads, 0, stream>>>(q, walk);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t cast_tiles(const CastTranspose& q, int parts, cudaStream_t stream) {
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
  const bool vector =
      q.cols % kColumns == 0 && is_aligned(q.x, 16) && is_aligned(q.straight, kColumns);
  return with_type(q.x_type, [&](auto type) {
    constexpr Type in = decltype(type)::value;
    const auto with_format = [&](auto format) {
      constexpr Type out = decltype(format)::value;
      if (q.block_rows == 1) {
        return vector ? launch<in, out, true, true>(q, walk, stream)
                      : launch<in, out, true, false>(q, walk, stream);
      }
      return vector ? launch<in, out, false, true>(q, walk, stream)
                    : launch<in, out, false, false>(q, walk, stream);
    };
    return q.data_type == Type::kE4M3 ? with_format(std::integral_constant<Type, Type::kE4M3>{})
                                      : with_format(std::integral_constant<Type, Type::kE5M2>{});
  });
}

}  // namespace jax_fp8
