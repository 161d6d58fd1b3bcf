#include <algorithm>
#include <type_traits>

#include "ffi/quantize.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256;
constexpr int kBlockCols = 128;  // Columns of a scale block.
constexpr int kMaxBlocks = 132 * 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Magnitudes as bits: they order like the floats, with infinity and then NaN on top.
__device__ uint32_t magnitude(float value) { return float_bits(value) & 0x7fffffffu; }

template <int width>
__device__ uint32_t lanes_max(uint32_t value) {
#pragma unroll
  for (int lane = width / 2; lane > 0; lane /= 2) {
    value = max(value, __shfl_xor_sync(0xffffffffu, value, lane));
  }
  return value;
}

// The maximum over the thread block, in every thread. All threads must call it.
__device__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warps[kThreads / 32];
  value = lanes_max<32>(value);
  __syncthreads();  // The call before has been read.
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = warps[0];
#pragma unroll
  for (int i = 1; i < kThreads / 32; ++i) value = max(value, warps[i]);
  return value;
}

// `width` consecutive values, loaded at once: 16 bytes or more where the addresses allow it.
template <Type type, int width>
struct Pack {
  using T = typename Native<type>::type;
  float values[width];

  __device__ void load(const void* x, int64_t index) {
    const T* source = static_cast<const T*>(x) + index;
    if constexpr (width * sizeof(T) % 16 == 0) {
      __align__(16) T raw[width];
#pragma unroll
      for (int i = 0; i < static_cast<int>(width * sizeof(T) / 16); ++i) {
        reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(source)[i];
      }
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = Native<type>::load(raw[i]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) values[i] = Native<type>::load(source[i]);
    }
  }

  __device__ uint32_t amax() const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < width; ++i) largest = max(largest, magnitude(values[i]));
    return largest;
  }

  template <Type out>
  __device__ void store(uint8_t* data, int64_t index, float inverse) const {
    if constexpr (width == 8) {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        words[i / 4] |= static_cast<uint32_t>(quantize_value<out>(values[i], inverse))
                        << (i % 4 * 8);
      }
      *reinterpret_cast<uint2*>(data + index) = make_uint2(words[0], words[1]);
    } else {
#pragma unroll
      for (int i = 0; i < width; ++i) data[index + i] = quantize_value<out>(values[i], inverse);
    }
  }
};

__device__ void write_scale(const Quantize& q, int64_t index, float scale, uint32_t amax) {
  q.scale[index] = scale;
  if (q.amax != nullptr) q.amax[index] = bits_float(amax);
}

// --- Tensor granularity: a pass for the amax, a pass for the data ---

template <Type in, int width>
__global__ void __launch_bounds__(kThreads) amax_kernel(Quantize q, int64_t size, int64_t blocks) {
  const int64_t entry = blockIdx.x / blocks, start = entry * size;
  const int64_t stride = blocks * kThreads * width;
  uint32_t largest = 0;
  for (int64_t i = (blockIdx.x % blocks * kThreads + threadIdx.x) * width; i < size; i += stride) {
    Pack<in, width> pack;
    pack.load(q.x, start + i);
    largest = max(largest, pack.amax());
  }
  largest = block_max(largest);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<uint32_t*>(q.amax) + entry, largest);
}

template <Type in, Type out, int width>
__global__ void __launch_bounds__(kThreads)
    tensor_kernel(Quantize q, int64_t size, int64_t blocks) {
  const int64_t entry = blockIdx.x / blocks, start = entry * size;
  const float scale =
      q.given != nullptr ? q.given[entry] : dynamic_scale(q.amax[entry], q.data_type);
  const float inverse = inverse_scale(scale);
  if (blockIdx.x % blocks == 0 && threadIdx.x == 0) q.scale[entry] = scale;
  const int64_t stride = blocks * kThreads * width;
  for (int64_t i = (blockIdx.x % blocks * kThreads + threadIdx.x) * width; i < size; i += stride) {
    Pack<in, width> pack;
    pack.load(q.x, start + i);
    pack.template store<out>(q.data, start + i, inverse);
  }
}

// --- Row granularity: a thread block a row, which it finds in the cache the second time ---

template <Type in, Type out, int width>
__global__ void __launch_bounds__(kThreads) row_kernel(Quantize q) {
  const int64_t row = blockIdx.x, start = row * q.cols;
  uint32_t amax = 0;
  if (q.given == nullptr || q.amax != nullptr) {
    for (int64_t i = threadIdx.x * width; i < q.cols; i += kThreads * width) {
      Pack<in, width> pack;
      pack.load(q.x, start + i);
      amax = max(amax, pack.amax());
    }
    amax = block_max(amax);
  }
  const float scale =
      q.given != nullptr ? q.given[row] : dynamic_scale(bits_float(amax), q.data_type);
  if (threadIdx.x == 0) write_scale(q, row, scale, amax);
  const float inverse = inverse_scale(scale);
  for (int64_t i = threadIdx.x * width; i < q.cols; i += kThreads * width) {
    Pack<in, width> pack;
    pack.load(q.x, start + i);
    pack.template store<out>(q.data, start + i, inverse);
  }
}

// --- Blocks of 128 columns, held in registers between the amax and the cast ---

// (1, 128): kBlockCols / width lanes a block, so that one load a lane covers it.
template <Type in, Type out, int width>
__global__ void __launch_bounds__(kThreads)
    strip_kernel(Quantize q, int64_t scale_cols, int64_t strips) {
  constexpr int kLanes = width == 8 ? 16 : 32;
  constexpr int kPacks = kBlockCols / kLanes / width;
  const int64_t strip = int64_t{blockIdx.x} * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const bool inside = strip < strips;
  const int64_t row = inside ? strip / scale_cols : 0;
  const int64_t column0 = inside ? strip % scale_cols * kBlockCols : q.cols;
  Pack<in, width> packs[kPacks];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t column = column0 + (i * kLanes + lane) * width;
    if (column >= q.cols) continue;
    packs[i].load(q.x, row * q.cols + column);
    amax = max(amax, packs[i].amax());
  }
  amax = lanes_max<kLanes>(amax);
  if (!inside) return;
  const float scale =
      q.given != nullptr ? q.given[strip] : dynamic_scale(bits_float(amax), q.data_type);
  if (lane == 0) write_scale(q, strip, scale, amax);
  const float inverse = inverse_scale(scale);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int64_t column = column0 + (i * kLanes + lane) * width;
    if (column < q.cols) {
      packs[i].template store<out>(q.data, row * q.cols + column, inverse);
    }
  }
}

// (128, 128): a thread block a block.
template <Type in, Type out, int width>
__global__ void __launch_bounds__(kThreads)
    square_kernel(Quantize q, int64_t scale_rows, int64_t scale_cols) {
  constexpr int kPacksRow = kBlockCols / width;
  constexpr int kPacks = kBlockCols * kPacksRow / kThreads;
  const int64_t block = blockIdx.x;
  const int64_t column0 = block % scale_cols * kBlockCols;
  const int64_t row0 = block / scale_cols % scale_rows * kBlockCols;
  const int64_t start = block / scale_cols / scale_rows * q.rows * q.cols;
  Pack<in, width> packs[kPacks];
  const auto place = [&](int i, int64_t& row, int64_t& column) {
    const int pack = i * kThreads + threadIdx.x;
    row = row0 + pack / kPacksRow;
    column = column0 + pack % kPacksRow * width;
    return row < q.rows && column < q.cols;
  };
  uint32_t amax = 0;
  int64_t row, column;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (!place(i, row, column)) continue;
    packs[i].load(q.x, start + row * q.cols + column);
    amax = max(amax, packs[i].amax());
  }
  amax = block_max(amax);
  const float scale =
      q.given != nullptr ? q.given[block] : dynamic_scale(bits_float(amax), q.data_type);
  if (threadIdx.x == 0) write_scale(q, block, scale, amax);
  const float inverse = inverse_scale(scale);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    if (place(i, row, column)) {
      packs[i].template store<out>(q.data, start + row * q.cols + column, inverse);
    }
  }
}

template <Type in, Type out, int width>
cudaError_t launch(const Quantize& q, cudaStream_t stream) {
  if (q.block_rows == 0) {
    const int64_t size = q.rows * q.cols;
    const int64_t blocks = std::clamp<int64_t>(ceil_div(size, kThreads * width), 1, kMaxBlocks);
    const auto grid = static_cast<unsigned>(blocks * q.batch);
    if (q.amax != nullptr) {
      const cudaError_t error = cudaMemsetAsync(q.amax, 0, q.batch * sizeof(float), stream);
      if (error != cudaSuccess) return error;
      amax_kernel<in, width><<<grid, kThreads, 0, stream>>>(q, size, blocks);
    }
    tensor_kernel<in, out, width><<<grid, kThreads, 0, stream>>>(q, size, blocks);
    return cudaGetLastError();
  }
  const int64_t scale_cols = scale_extent(q.cols, q.block_cols);
  if (q.block_cols == 0) {
    row_kernel<in, out, width><<<static_cast<unsigned>(q.batch * q.rows), kThreads, 0, stream>>>(q);
  } else if (q.block_rows == 1) {
    const int64_t strips = q.batch * q.rows * scale_cols;
    const int64_t per_block = kThreads / (width == 8 ? 16 : 32);
    strip_kernel<in, out, width>
        <<<static_cast<unsigned>(ceil_div(strips, per_block)), kThreads, 0, stream>>>(q, scale_cols,
                                                                                      strips);
  } else {
    const int64_t scale_rows = scale_extent(q.rows, q.block_rows);
    const auto blocks = static_cast<unsigned>(q.batch * scale_rows * scale_cols);
    square_kernel<in, out, width><<<blocks, kThreads, 0, stream>>>(q, scale_rows, scale_cols);
  }
  return cudaGetLastError();
}

template <Type in>
cudaError_t choose(const Quantize& q, cudaStream_t stream) {
  // Runs of 8 need aligned addresses, and every row (for tensor granularity, every batch entry)
  // to start and end at a multiple of 8.
  const int64_t run = q.block_rows == 0 ? q.rows * q.cols : q.cols;
  const bool wide = run % 8 == 0 && reinterpret_cast<uintptr_t>(q.x) % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(q.data) % 8 == 0;
  if (q.data_type == Type::kE4M3) {
    return wide ? launch<in, Type::kE4M3, 8>(q, stream) : launch<in, Type::kE4M3, 1>(q, stream);
  }
  return wide ? launch<in, Type::kE5M2, 8>(q, stream) : launch<in, Type::kE5M2, 1>(q, stream);
}

}  // namespace

cudaError_t quantize_device(const Quantize& q, cudaStream_t stream) {
  switch (q.x_type) {
    case Type::kBF16:
      return choose<Type::kBF16>(q, stream);
    case Type::kF16:
      return choose<Type::kF16>(q, stream);
    default:
      return choose<Type::kF32>(q, stream);
  }
}

}  // namespace jax_fp8
