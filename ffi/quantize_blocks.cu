// Blocks of 128 columns: read once, held in registers between the amax and the cast.
#include "ffi/quantize_kernels.h"

namespace jax_fp8 {
namespace {

constexpr int kBlock = 128;  // Columns of a scale block, and rows of a square one.
// Measured on an H200 against 16 lanes a strip, several strips a thread, and squares of 256 and
// 1024 threads: within 3 % of a pass whose scale is known, and squares of 8 million values
// within 9.
constexpr int kStripThreads = 256, kLanes = 8;
constexpr int kSquareThreads = 512;

template <typename V>
__global__ void __launch_bounds__(kStripThreads)
    strip_kernel(Quantize q, uint32_t scale_cols, int64_t strips) {
  constexpr int kPacks = kBlock / kLanes / V::width;
  const int lane = threadIdx.x % kLanes;
  const int64_t strip = int64_t{blockIdx.x} * (kStripThreads / kLanes) + threadIdx.x / kLanes;
  // Memory ends before there are 2^32 strips of more than one to a row.
  const int64_t row = scale_cols == 1 ? strip : static_cast<uint32_t>(strip) / scale_cols;
  const int64_t column = (strip - row * scale_cols) * kBlock;
  const int64_t start = row * q.cols + column;
  const int64_t columns = strip < strips ? q.cols - column : 0;  // To the end of the row.
  typename V::Pack packs[kPacks];
  Amax<V::in> amax;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int offset = (i * kLanes + lane) * V::width;
    if (offset < columns) {
      packs[i].load(V::source(q, start + offset));
    } else {
      packs[i] = {};
    }
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) amax.take(packs[i]);
  const uint32_t largest = lanes_max<kLanes>(amax.bits());
  if (columns == 0) return;
  const float inverse = scale_group(q, strip, largest, lane == 0);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int offset = (i * kLanes + lane) * V::width;
    if (offset < columns) V::store(q, start + offset, packs[i], inverse);
  }
}

// A thread block a square.
template <typename V>
__global__ void __launch_bounds__(kSquareThreads)
    square_kernel(Quantize q, uint32_t scale_rows, uint32_t scale_cols) {
  constexpr int kPacksRow = kBlock / V::width;
  constexpr int kRows = kSquareThreads / kPacksRow;  // That one pack a thread covers.
  constexpr int kPacks = kBlock / kRows;
  const uint32_t block_row = blockIdx.x / scale_cols, entry = block_row / scale_rows;
  const int64_t row = int64_t{block_row - entry * scale_rows} * kBlock + threadIdx.x / kPacksRow;
  const int64_t column =
      int64_t{blockIdx.x - block_row * scale_cols} * kBlock + threadIdx.x % kPacksRow * V::width;
  const int64_t start = (entry * q.rows + row) * q.cols + column;
  const int64_t rows = column < q.cols ? q.rows - row : 0;
  typename V::Pack packs[kPacks];
  Amax<V::in> amax;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (i * kRows < rows) {
      packs[i].load(V::source(q, start + i * kRows * q.cols));
    } else {
      packs[i] = {};
    }
  }
#pragma unroll
  for (int i = 0; i < kPacks; ++i) amax.take(packs[i]);
  const uint32_t largest = block_max(amax.bits());
  const float inverse = scale_group(q, blockIdx.x, largest, threadIdx.x == 0);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (i * kRows < rows) V::store(q, start + i * kRows * q.cols, packs[i], inverse);
  }
}

}  // namespace

cudaError_t quantize_strips(const Quantize& q, cudaStream_t stream) {
  const int64_t scale_cols = scale_extent(q.cols, kBlock), strips = q.batch * q.rows * scale_cols;
  const auto blocks = static_cast<unsigned>(ceil_div(strips, kStripThreads / kLanes));
  return dispatch(q, [&](auto variant) {
    strip_kernel<decltype(variant)>
        <<<blocks, kStripThreads, 0, stream>>>(q, static_cast<uint32_t>(scale_cols), strips);
    return cudaGetLastError();
  });
}

cudaError_t quantize_squares(const Quantize& q, cudaStream_t stream) {
  const auto scale_rows = static_cast<uint32_t>(scale_extent(q.rows, kBlock));
  const auto scale_cols = static_cast<uint32_t>(scale_extent(q.cols, kBlock));
  const auto blocks = static_cast<unsigned>(q.batch * scale_rows * scale_cols);
  return dispatch(q, [&](auto variant) {
    square_kernel<decltype(variant)>
        <<<blocks, kSquareThreads, 0, stream>>>(q, scale_rows, scale_cols);
    return cudaGetLastError();
  });
}

}  // namespace jax_fp8
