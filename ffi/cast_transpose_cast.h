// The cast of a tile that a thread block has in registers: 8 columns of 4 or 8 rows a thread. What
// is cast is stored as rows; the turned tile goes through shared memory, as bytes, so that the
// transpose is stored as whole lines too.
#pragma once

#include "ffi/cast_transpose_tile.h"
#include "ffi/stochastic.h"

namespace jax_fp8 {

// The random bits of the 8 elements that a thread has in a row.
struct Bits {
  uint32_t words[kColumns / 2];
  __device__ uint32_t operator[](int j) const {
    return j % 2 ? words[j / 2] >> 16 : words[j / 2] & 0xffffu;
  }
};

// A kernel has these many times over. Where it is not for its speed they are called: inlined, they
// made up most of the module.
static __device__ __noinline__ uint32_t random_bits_called(uint32_t key0, uint32_t key1,
                                                           uint64_t index) {
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

// The turned tile to the transpose, `width` bytes a thread at once.
template <int threads>
__device__ void store_turned(const CastTranspose& q, const Walk& walk, const Place& at,
                             const uint8_t* turned) {
  uint8_t* const target =
      q.transposed + (at.matrix * q.cols + at.first_col) * q.rows + at.first_row;
  if (walk.turned_width == 16) {
    constexpr int kChunks = kEdge / 16;
#pragma unroll
    for (int i = at.thread; i < kEdge * kChunks; i += threads) {
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
    for (int column = at.thread / 32; column < at.cols; column += threads / 32) {
      for (int row = at.thread % 32 * sizeof(Unit); row < at.rows; row += 32 * sizeof(Unit)) {
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

// Where a thread's part of a tile starts, in x and in the straight result.
__device__ inline int64_t start_of(const CastTranspose& q, const Place& at) {
  return (at.matrix * q.rows + at.first_row + at.row) * q.cols + at.first_col + at.col;
}

// `vector`: x and the straight result are loaded and stored 8 values at once.
template <Type in, bool vector>
__device__ void load_tile(const CastTranspose& q, const Place& at,
                          Pack<in, kColumns> (&packs)[Tile<in>::kRows]) {
  using T = typename Native<in>::type;
  const T* const source = static_cast<const T*>(q.x) + start_of(q, at);
#pragma unroll
  for (int i = 0; i < Tile<in>::kRows; ++i) {
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
}

// `split`: rows and columns have scales of their own, so that there are two codes of a value; their
// inverses are in `inverses`, 128 of the rows and 128 of the columns. Else `inverse` is everyone's.
template <Type in, Type out, bool split, bool vector, bool stochastic>
__device__ void cast_tile(const CastTranspose& q, const Walk& walk, const Place& at,
                          const Pack<in, kColumns> (&packs)[Tile<in>::kRows], float inverse,
                          const float* inverses, uint8_t* turned) {
  constexpr int kRows = Tile<in>::kRows;
  const int64_t start = start_of(q, at);
  // Makes NaN of an infinity under a static scale: as in store_quantized. A dynamic one is NaN.
  const float zero = inverse * 0.0f;
  uint32_t key0 = 0, key1 = 0;
  uint64_t index = 0;
  if constexpr (stochastic) {
    key0 = q.keys[2 * int64_t{at.entry}], key1 = q.keys[2 * int64_t{at.entry} + 1];
    index = start - int64_t{at.entry} * walk.matrices * q.rows * q.cols;
  }

  const auto bits_of = [&](int row) {
    if constexpr (stochastic) {
      return bits_of_row<vector>(key0, key1, index + row * q.cols);
    } else {
      return Bits{};
    }
  };
  // Four codes; each of two words of random bits is for two of them.
  const auto encode = [](float a, float b, float c, float d, uint32_t ab, uint32_t cd) {
    if constexpr (stochastic) {
      return encode_four_random<out>(a, b, c, d, ab, cd);
    } else {
      return encode_four<out>(a, b, c, d);
    }
  };
  const auto value = [&](int row, int j, float factor) {
    const float wide = packs[row][j];
    return split ? wide * factor : fmaf(wide, factor, wide * zero);
  };
  const auto encode_row = [&](int row, int j, float factor, const Bits& bits) {
    return encode(value(row, j, factor), value(row, j + 1, factor), value(row, j + 2, factor),
                  value(row, j + 3, factor), bits.words[j / 2], bits.words[j / 2 + 1]);
  };
  const auto store_row = [&](int row, uint32_t low, uint32_t high) {
    if (at.row + row >= at.rows || at.col >= at.cols) return;
    uint8_t* const target = q.straight + start + row * q.cols;
    if constexpr (vector) {
      *reinterpret_cast<uint2*>(target) = make_uint2(low, high);
    } else {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (at.col + j < at.cols) target[j] = (j < 4 ? low : high) >> (j % 4 * 8) & 0xffu;
      }
    }
  };
  const auto turn_column = [&](int j, const uint32_t (&codes)[kRows / 4]) {
    uint8_t* const place = turned + turned_place(at.col + j, at.row);
    if constexpr (kRows == 8) {
      *reinterpret_cast<uint2*>(place) = make_uint2(codes[0], codes[1]);
    } else {
      *reinterpret_cast<uint32_t*>(place) = codes[0];
    }
  };

  if constexpr (split) {
    Bits bits[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) bits[i] = bits_of(i);
    if (q.transposed != nullptr) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float factor = inverses[kEdge + at.col + j];
        uint32_t codes[kRows / 4];
#pragma unroll
        for (int k = 0; k < kRows / 4; ++k) {
          const int i = 4 * k;
          codes[k] = encode(value(i, j, factor), value(i + 1, j, factor), value(i + 2, j, factor),
                            value(i + 3, j, factor), bits[i][j] | bits[i + 1][j] << 16,
                            bits[i + 2][j] | bits[i + 3][j] << 16);
        }
        turn_column(j, codes);
      }
    }
    if (q.straight != nullptr) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float factor = inverses[at.row + i];
        store_row(i, encode_row(i, 0, factor, bits[i]), encode_row(i, 4, factor, bits[i]));
      }
    }
  } else {
    uint32_t columns[kColumns][kRows / 4];
#pragma unroll
    for (int k = 0; k < kRows / 4; ++k) {
      uint32_t codes[kColumns / 4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * k + i;
        const Bits bits = bits_of(row);
#pragma unroll
        for (int h = 0; h < kColumns / 4; ++h) {
          codes[h][i] = encode_row(row, 4 * h, inverse, bits);
        }
        if (q.straight != nullptr) store_row(row, codes[0][i], codes[1][i]);
      }
#pragma unroll
      for (int h = 0; h < kColumns / 4; ++h) {
        uint32_t four[4];
        turn(codes[h], four);
#pragma unroll
        for (int j = 0; j < 4; ++j) columns[4 * h + j][k] = four[j];
      }
    }
    if (q.transposed != nullptr) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) turn_column(j, columns[j]);
    }
  }
  if (q.transposed == nullptr) return;
  __syncthreads();
  store_turned<Tile<in>::kThreads>(q, walk, at, turned);
}

}  // namespace jax_fp8
