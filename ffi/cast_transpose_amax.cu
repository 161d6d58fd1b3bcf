// The amaxes that a cast needs before it starts: of whole tensors, and of rows and columns.
#include <algorithm>

#include "ffi/cast_transpose_kernels.h"
#include "ffi/follow.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// --- Tensors -------------------------------------------------------------------------------------

constexpr int kUnroll = 4;      // Loads of a thread in flight, which with
constexpr int kBlocksAnSm = 8;  // takes 32 registers a thread.

// What an SM holds, which differs by generation.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int kThreadsAnSm = 1024;
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kThreadsAnSm = 1536;
#else
constexpr int kThreadsAnSm = 2048;
#endif

// All blocks of an entry go through it side by side, so that its end is what the cache has last.
template <Type in, int width>
__global__ void __launch_bounds__(kThreads, kThreadsAnSm / kThreads)
    tensor_kernel(const void* x, uint32_t* scratch, int64_t size, unsigned parts) {
  using P = Pack<in, width>;
  const unsigned entry = blockIdx.x / parts, part = blockIdx.x - entry * parts;
  const auto* source = static_cast<const typename P::T*>(x) + entry * size;
  const int64_t step = int64_t{parts} * kThreads * kUnroll * width;
  Amax<in> amax;
  for (int64_t first = (int64_t{part} * kThreads * kUnroll + threadIdx.x) * width; first < size;
       first += step) {
    P packs[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int64_t place = first + i * kThreads * width;
      if (place < size) {
        packs[i].load(source + place);
      } else {
        packs[i] = {};
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) amax.take(packs[i]);
  }
  let_follow();
  const uint32_t largest = block_max(amax.bits());
  if (threadIdx.x == 0) scratch[int64_t{entry} * kMaxParts + part] = largest;
}

// --- Rows and columns ----------------------------------------------------------------------------

constexpr int kTileRows = 128, kRowsAWarp = kTileRows / kWarps;

// A warp has whole rows of a tile as wide as it loads at once: lane i keeps the amax of row i, each
// lane those of its columns.
template <Type in, int width>
__global__ void __launch_bounds__(kThreads)
    row_and_column_kernel(CastTranspose q, bool wants_rows, bool wants_columns, uint32_t tile_rows,
                          uint32_t tile_cols) {
  using P = Pack<in, width>;
  constexpr int kWords = sizeof(P::words) / 4;
  constexpr int kPerWord = width == 1 ? 1 : width / kWords;
  __shared__ alignas(16) uint32_t found[kWarps][32][kWords];
  const uint32_t band = blockIdx.x / tile_cols, entry = band / tile_rows;
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = int64_t{band - entry * tile_rows} * kTileRows + warp * kRowsAWarp;
  const int64_t tile_column = int64_t{blockIdx.x - band * tile_cols} * (32 * width);
  const int64_t column = tile_column + lane * width;
  const int64_t rows = q.rows - row;
  const auto* source =
      static_cast<const typename P::T*>(q.x) + (entry * q.rows + row) * q.cols + column;
  uint32_t columns[kWords] = {};
  uint32_t own = 0;
  constexpr int kUnrolled = 8;
#pragma unroll
  for (int first = 0; first < kRowsAWarp; first += kUnrolled) {
    P packs[kUnrolled];
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      if (first + i < rows && column < q.cols) {
        packs[i].load(source + (first + i) * q.cols);
      } else {
        packs[i] = {};
      }
    }
#pragma unroll
    for (int i = 0; i < kUnrolled; ++i) {
      Amax<in> amax;
      amax.take(packs[i]);
      const uint32_t largest = lanes_max<32>(amax.bits());
      if (lane == static_cast<unsigned>(first + i)) own = largest;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        columns[w] = max_magnitudes<in>(columns[w], magnitudes<in>(packs[i].words[w]));
      }
    }
  }
  let_follow();
  wait_for_kernel_in_front();  // Which zeroes the scratch.
  if (wants_rows && lane < kRowsAWarp && lane < rows) {
    atomicMax(q.scratch + entry * q.rows + row + lane, own);
  }
  if (!wants_columns) return;
#pragma unroll
  for (int w = 0; w < kWords; ++w) found[warp][lane][w] = columns[w];
  __syncthreads();
  uint32_t* const totals = q.scratch + q.batch * q.rows + entry * q.cols;
  const auto* halves = reinterpret_cast<const uint16_t*>(found);
  const auto* words = &found[0][0][0];
  for (int i = threadIdx.x; i < 32 * width && tile_column + i < q.cols; i += kThreads) {
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int place = w * 32 * kWords * kPerWord + i;
      largest = max(largest, kPerWord == 2 ? halves[place] : words[place]);
    }
    atomicMax(totals + tile_column + i, magnitude_bits<in>(largest));
  }
}

// The most values that a thread can load at once from runs of `run` values.
template <Type in>
bool loads_packs(const CastTranspose& q, int64_t run) {
  constexpr int width = 16 / sizeof(typename Native<in>::type);
  return run % width == 0 && is_aligned(q.x, 16);
}

}  // namespace

cudaError_t tensor_amaxes(const CastTranspose& q, int* parts, cudaStream_t stream) {
  int sms = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &sms);
  if (error != cudaSuccess) return error;
  const int64_t size = q.batch / q.entries * q.rows * q.cols;
  return with_type(q.x_type, [&](auto type) {
    constexpr Type in = decltype(type)::value;
    const auto launch = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      // Each SM has as many blocks as any other.
      const int most = std::max(std::min(kBlocksAnSm, kMaxParts / sms) * sms, 1);
      const int64_t needed = ceil_div(size, int64_t{kThreads} * kUnroll * kWidth);
      *parts = static_cast<int>(std::min<int64_t>({needed, most, kMaxParts}));
      tensor_kernel<in, kWidth><<<static_cast<unsigned>(*parts * q.entries), kThreads, 0, stream>>>(
          q.x, q.scratch, size, static_cast<unsigned>(*parts));
      return cudaGetLastError();
    };
    constexpr int width = 16 / sizeof(typename Native<in>::type);
    return loads_packs<in>(q, size) ? launch(std::integral_constant<int, width>{})
                                    : launch(std::integral_constant<int, 1>{});
  });
}

cudaError_t row_and_column_amaxes(const CastTranspose& q, bool rows, bool columns,
                                  cudaStream_t stream) {
  const cudaError_t error = zero_words(q.scratch, scratch_words(q), stream);
  if (error != cudaSuccess || q.rows * q.cols == 0) return error;
  return with_type(q.x_type, [&](auto type) {
    constexpr Type in = decltype(type)::value;
    const auto launch = [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const auto tile_rows = static_cast<uint32_t>(ceil_div(q.rows, kTileRows));
      const auto tile_cols = static_cast<uint32_t>(ceil_div(q.cols, 32 * kWidth));
      const auto blocks = static_cast<unsigned>(q.batch * tile_rows * tile_cols);
      return launch_kernel(row_and_column_kernel<in, kWidth>, true, blocks, kThreads, 0, stream, q,
                           rows, columns, tile_rows, tile_cols);
    };
    constexpr int width = 16 / sizeof(typename Native<in>::type);
    return loads_packs<in>(q, q.cols) ? launch(std::integral_constant<int, width>{})
                                      : launch(std::integral_constant<int, 1>{});
  });
}

}  // namespace jax_fp8
