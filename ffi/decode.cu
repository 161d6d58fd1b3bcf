#include <algorithm>
#include <type_traits>

#include "ffi/decode.h"
#include "ffi/device.h"
#include "ffi/finish.h"
#include "ffi/mma.h"

namespace jax_fp8 {
namespace {

constexpr int kStep = 64;   // Of K, that a stage of shared memory holds.
constexpr int kSlice = 16;  // Of K, that one instruction multiplies.
constexpr int kChunk = 16;  // Elements that a thread loads at once.
constexpr int kGroup = 16;  // Rows of tiles whose blocks follow each other, to share L2.
static_assert(kBlock % kStep == 0, "a step lies in one scale block");

// A thread block computes m x n of D, a warp warp_m x warp_n of that.
template <int m, int n, int warp_m, int warp_n, int blocks>
struct Tile {
  static constexpr int kM = m, kN = n, kWarpM = warp_m, kWarpN = warp_n;
  static constexpr int kThreads = m / warp_m * (n / warp_n) * 32;
  static constexpr int kBlocks = blocks;  // On one SM, which the registers limit.
  static constexpr int kFragmentsM = warp_m / 16, kFragmentsN = warp_n / 8;
  static constexpr int kXBytes = m * kStep * 2, kStageBytes = (m + n) * kStep * 2;
  static_assert(warp_m % 16 == 0 && warp_n % 16 == 0, "whole fragments, two of W at once");
};

// Two stages of 16-bit values: while one is multiplied, the other is filled with codes that were
// loaded a step before. So a thread block decodes each code once, and not once for each warp.
constexpr int kStages = 2;

// Where 8 values of a row lie: ldmatrix reads 8 rows of a column of them, and meets no bank twice.
__device__ int place(int row, int column) { return row * kStep * 2 + (column ^ (row % 8)) * 16; }

// --- Stages --------------------------------------------------------------------------------------

// What a thread loads of one operand: chunks that lie kRowStep rows apart, in the same columns.
template <int rows, int threads, int width, bool aligned>
struct Source {
  static constexpr int kChunksOfRow = kStep / kChunk;
  static constexpr int kRowStep = threads / kChunksOfRow;
  static constexpr int kChunks = rows / kRowStep;
  static_assert(rows % kRowStep == 0, "all threads load alike");

  const uint8_t* data;   // Of the operand, or of its batch entry.
  const uint8_t* start;  // Of the first chunk.
  int64_t k;
  int row, column, rows_left;

  // The tile begins at row `first` of `all`.
  __device__ Source(const uint8_t* operand, int64_t first, int64_t all, int64_t columns)
      : data(operand), k(columns) {
    row = threadIdx.x / kChunksOfRow;
    column = threadIdx.x % kChunksOfRow * kChunk;
    rows_left = static_cast<int>(min(all - first, int64_t{rows}));
    start = data + ((first + row) * k + column) * width;
  }

  // How many elements of chunk `i` there are, at step `k0`.
  __device__ int64_t left(int i, int64_t k0) const {
    return row + i * kRowStep < rows_left ? k - k0 - column : 0;
  }
  __device__ const uint8_t* address(int i, int64_t k0) const {
    return start + (k0 + i * kRowStep * k) * width;
  }

  // Codes, zeros where there are none.
  __device__ uint4 load(int i, int64_t k0) const {
    const int64_t count = left(i, k0);
    uint4 codes{};
    if constexpr (aligned) {
      if (count > 0) codes = *reinterpret_cast<const uint4*>(address(i, k0));
    } else {
      uint8_t bytes[kChunk] = {};
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (j < count) bytes[j] = address(i, k0)[j];
      }
      memcpy(&codes, bytes, sizeof bytes);
    }
    return codes;
  }

  template <Type mma>
  __device__ void decode(int i, const uint4& codes, bool e4m3, uint8_t* stage) const {
    const int r = row + i * kRowStep;
    const uint2 a = decode_word<mma>(codes.x, e4m3), b = decode_word<mma>(codes.y, e4m3);
    const uint2 c = decode_word<mma>(codes.z, e4m3), d = decode_word<mma>(codes.w, e4m3);
    *reinterpret_cast<uint4*>(stage + place(r, column / 8)) = make_uint4(a.x, a.y, b.x, b.y);
    *reinterpret_cast<uint4*>(stage + place(r, column / 8 + 1)) = make_uint4(c.x, c.y, d.x, d.y);
  }

  // Wide values go straight into the stage.
  __device__ void copy(int i, int64_t k0, uint8_t* stage) const {
    const int64_t count = left(i, k0);
    const uint8_t* source = address(i, k0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint8_t* target = stage + place(row + i * kRowStep, column / 8 + half);
      if constexpr (aligned) {
        const bool zero = count <= half * 8;
        copy_bytes(target, zero ? data : source + half * 16, zero);
      } else {
        for (int j = 0; j < 8; ++j) {
          const int element = half * 8 + j;
          reinterpret_cast<uint16_t*>(target)[j] =
              element < count ? reinterpret_cast<const uint16_t*>(source)[element] : 0;
        }
      }
    }
  }
};

template <typename Tile>
using Sums = float[Tile::kFragmentsM][Tile::kFragmentsN][4];

// What a warp multiplies of one slice of a stage.
template <typename Tile>
struct Fragments {
  uint32_t x[Tile::kFragmentsM][4], w[Tile::kFragmentsN / 2][4];

  __device__ void load(const uint8_t* stage, int slice, int warp_m, int warp_n, int lane) {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
      load_matrices(x[i], stage + place(warp_m + i * 16 + lane % 16, slice * 2 + lane / 16));
    }
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN / 2; ++i) {
      const int row = Tile::kM + warp_n + i * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(w[i], stage + place(row, slice * 2 + lane / 8 % 2));
    }
  }

  template <Type mma>
  __device__ void multiply(Sums<Tile>& sums) const {
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kFragmentsN; ++j) {
        multiply_add<mma>(sums[i][j], x[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
};

// --- Scales --------------------------------------------------------------------------------------

// Row and column, within the warp's tile, of element `i` of a fragment, as mma lays them out.
__device__ int fragment_row(int fragment, int i, int lane) {
  return fragment * 16 + lane / 4 + (i / 2) * 8;
}
__device__ int fragment_column(int fragment, int i, int lane) {
  return fragment * 8 + (lane % 4) * 2 + i % 2;
}

// The scales of the rows and columns that a thread has sums of.
template <typename Tile>
struct Scales {
  float x[Tile::kFragmentsM * 2], w[Tile::kFragmentsN * 2];

  __device__ void load(const Product& p, int64_t b, int64_t row0, int64_t column0, int64_t k_block,
                       int lane) {
    const int64_t x_block = p.x.block_cols ? k_block : 0, w_block = p.w.block_cols ? k_block : 0;
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsM * 2; ++i) {
      const int64_t row = min(row0 + fragment_row(i / 2, i % 2 * 2, lane), p.m - 1);
      x[i] = p.x.scale_at(b, row, x_block);
    }
#pragma unroll
    for (int i = 0; i < Tile::kFragmentsN * 2; ++i) {
      const int64_t column = min(column0 + fragment_column(i / 2, i % 2, lane), p.n - 1);
      w[i] = p.w.scale_at(b, column, w_block);
    }
  }

  // total += sums * scales, and clears the sums.
  __device__ void promote(Sums<Tile>& total, Sums<Tile>& sums) const {
#pragma unroll
    for (int fm = 0; fm < Tile::kFragmentsM; ++fm) {
#pragma unroll
      for (int fn = 0; fn < Tile::kFragmentsN; ++fn) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[fm][fn][i] += sums[fm][fn][i] * x[fm * 2 + i / 2] * w[fn * 2 + i % 2];
          sums[fm][fn][i] = 0.0f;
        }
      }
    }
  }
};

// --- Results -------------------------------------------------------------------------------------

// 16 rows of a warp's sums in shared memory, from where they are finished row by row: what a warp
// stores at once lies side by side, and the code of an epilogue is there once and not 128 times.
template <typename Tile>
struct Patch {
  static constexpr int kPitch = Tile::kWarpN + 8;  // Four rows meet no bank twice.
  static constexpr int kSize = 16 * kPitch;
  static constexpr int kWarps = Tile::kThreads / 32;
  static_assert(kWarps * kSize * sizeof(float) <= kStages * Tile::kStageBytes, "it fits");
  static_assert(Tile::kWarpN % 32 == 0, "a warp finishes 32 columns at once");

  __device__ static void write(float* patch, const float (&sums)[Tile::kFragmentsN][4], int lane) {
#pragma unroll
    for (int fn = 0; fn < Tile::kFragmentsN; ++fn) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        float* target = patch + fragment_row(0, i, lane) * kPitch + fragment_column(fn, i, lane);
        *reinterpret_cast<float2*>(target) = make_float2(sums[fn][i], sums[fn][i + 1]);
      }
    }
  }

  // Returns the largest magnitude.
  template <bool scale>
  __device__ static float finish(const Product& p, const float* patch, int64_t b, int64_t row0,
                                 int64_t column0, int lane) {
    float largest = 0.0f;
#pragma unroll 1
    for (int column = lane; column < Tile::kWarpN; column += 32) {
      const int64_t n = column0 + column;
      if (n >= p.n) break;
      const float w_scale = scale ? p.w.scale_at(b, n, 0) : 1.0f;
#pragma unroll 4
      for (int row = 0; row < 16; ++row) {
        const int64_t m = row0 + row;
        if (m >= p.m) break;
        float value = patch[row * kPitch + column];
        if (scale) value = apply_scales(value, p.x.scale_at(b, m, 0), w_scale);
        value = jax_fp8::finish(p, value, n);
        store(p, value, (b * p.m + m) * p.n + n);
        largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
      }
    }
    return largest;
  }
};

// --- The kernel ----------------------------------------------------------------------------------

// `wide`: X is of the type `mma`, and not FP8. `e4m3`: all codes are E4M3, which spares the common
// case the choice between the formats; otherwise they are known at run time.
template <typename Tile, Type mma, bool wide, bool blocks, bool aligned, bool e4m3>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    decode_kernel(Product p, int64_t tiles_m, int64_t tiles_n) {
  extern __shared__ __align__(128) uint8_t memory[];
  const int64_t tile = blockIdx.x % (tiles_m * tiles_n), b = blockIdx.x / (tiles_m * tiles_n);
  const int64_t group0 = tile / (kGroup * tiles_n) * kGroup;
  const int64_t group = min(tiles_m - group0, int64_t{kGroup});
  const int64_t tile_m = (group0 + tile % (kGroup * tiles_n) % group) * Tile::kM;
  const int64_t tile_n = tile % (kGroup * tiles_n) / group * Tile::kN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;
  const int warp_n = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;

  using SourceOfX = Source<Tile::kM, Tile::kThreads, wide ? 2 : 1, aligned>;
  using SourceOfW = Source<Tile::kN, Tile::kThreads, 1, aligned>;
  const SourceOfX x(p.x.at(b * p.m * p.k), tile_m, p.m, p.k);
  const SourceOfW w(p.w.at(b * p.n * p.k), tile_n, p.n, p.k);
  const bool x_e4m3 = e4m3 || p.x.type == Type::kE4M3;
  const bool w_e4m3 = e4m3 || p.w.type == Type::kE4M3;
  constexpr int kXChunks = wide ? 0 : SourceOfX::kChunks;
  constexpr int kChunks = kXChunks + SourceOfW::kChunks;
  uint4 codes[kChunks];
  const auto load = [&](int i, int64_t k) {
    codes[i] = i < kXChunks ? x.load(i, k) : w.load(i - kXChunks, k);
  };
  const auto decode = [&](int i, uint8_t* stage) {
    if (i < kXChunks) {
      x.template decode<mma>(i, codes[i], x_e4m3, stage);
    } else {
      w.template decode<mma>(i - kXChunks, codes[i], w_e4m3, stage + Tile::kXBytes);
    }
  };
  const auto copy = [&](int64_t k, uint8_t* stage) {
    if constexpr (wide) {
#pragma unroll
      for (int i = 0; i < SourceOfX::kChunks; ++i) x.copy(i, k, stage);
    }
  };

  copy(0, memory);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) load(i, 0);
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    decode(i, memory);
    load(i, kStep);
  }
  wait_for_copies();
  __syncthreads();

  Sums<Tile> sums = {}, total = {};
  Scales<Tile> scales;
  int slot = 0;
  for (int64_t k = 0; k < p.k; k += kStep, slot ^= 1) {
    if (blocks && k % kBlock == 0) {  // In flight while the tensor cores work.
      scales.load(p, b, tile_m + warp_m, tile_n + warp_n, k / kBlock, lane);
    }
    const uint8_t* stage = memory + slot * Tile::kStageBytes;
    uint8_t* next = memory + (slot ^ 1) * Tile::kStageBytes;
    copy(k + kStep, next);
    constexpr int kSlices = kStep / kSlice;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
      Fragments<Tile> fragments;
      fragments.load(stage, slice, warp_m, warp_n, lane);
      fragments.template multiply<mma>(sums);
      if (slice != 0) continue;
      // All at once, as the compiler lets no load of fragments pass a store.
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        decode(i, next);
        load(i, k + 2 * kStep);
      }
    }
    wait_for_copies();
    __syncthreads();  // This stage has been read, and the next one is there.
    if constexpr (blocks) {
      const int64_t end = k + kStep;
      if (end % kBlock == 0 || end >= p.k) scales.promote(total, sums);
    }
  }

  float largest = 0.0f;
  auto* const patch = reinterpret_cast<float*>(memory) + warp * Patch<Tile>::kSize;
#pragma unroll
  for (int fm = 0; fm < Tile::kFragmentsM; ++fm) {
    Patch<Tile>::write(patch, blocks ? total[fm] : sums[fm], lane);
    __syncwarp();
    const float amax = Patch<Tile>::template finish<!blocks>(p, patch, b, tile_m + warp_m + fm * 16,
                                                             tile_n + warp_n, lane);
    largest = bits_float(max(float_bits(largest), float_bits(amax)));
    __syncwarp();
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
}

// --- Which tile ----------------------------------------------------------------------------------

struct Device {
  int processors, shared_memory;
};

cudaError_t describe_device(Device* device) {
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &device->processors);
  if (error != cudaSuccess) return error;
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_memory);
}

// What a product takes with this tile: the waves of thread blocks, each as long as its tiles are
// large. Infinite where a block does not fit.
template <typename Tile>
double cost(const Product& p, const Device& device) {
  if (Tile::kStageBytes * kStages > device.shared_memory) return INFINITY;
  const int64_t tiles = ceil_div(p.m, Tile::kM) * ceil_div(p.n, Tile::kN) * p.batch;
  const int64_t waves = ceil_div(tiles, int64_t{device.processors} * Tile::kBlocks);
  // Smaller tiles read more of shared memory and of L2 for as many products.
  const double overhead = 1.0 + 24.0 / Tile::kM + 24.0 / Tile::kN;
  return static_cast<double>(waves) * Tile::kBlocks * Tile::kM * Tile::kN * overhead;
}

template <typename Tile, Type mma, bool wide, bool blocks, bool aligned, bool e4m3>
cudaError_t launch(const Product& p, cudaStream_t stream) {
  const int64_t tiles_m = ceil_div(p.m, Tile::kM), tiles_n = ceil_div(p.n, Tile::kN);
  const auto kernel = decode_kernel<Tile, mma, wide, blocks, aligned, e4m3>;
  constexpr int kBytes = Tile::kStageBytes * kStages;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(tiles_m * tiles_n * p.batch);
  kernel<<<grid, Tile::kThreads, kBytes, stream>>>(p, tiles_m, tiles_n);
  return cudaGetLastError();
}

// 16 warps on an SM, which hide each other's waiting. Block scales need a second set of sums, for
// which only the smallest leaves registers.
using Large = Tile<128, 256, 64, 32, 1>;
using Middle = Tile<128, 128, 64, 32, 2>;
using Small = Tile<64, 128, 32, 32, 2>;

template <Type mma, bool wide, bool e4m3>
cudaError_t choose_tile(const Product& p, cudaStream_t stream) {
  if (p.blocks()) return launch<Small, mma, wide, true, true, e4m3>(p, stream);
  Device device{};
  if (const cudaError_t error = describe_device(&device); error != cudaSuccess) return error;
  const double large = cost<Large>(p, device), middle = cost<Middle>(p, device),
               small = cost<Small>(p, device);
  if (large <= std::min(middle, small)) {
    return launch<Large, mma, wide, false, true, e4m3>(p, stream);
  }
  return middle <= small ? launch<Middle, mma, wide, false, true, e4m3>(p, stream)
                         : launch<Small, mma, wide, false, true, e4m3>(p, stream);
}

template <Type mma, bool wide>
cudaError_t choose(const Product& p, cudaStream_t stream) {
  const auto address =
      reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.w.data);
  if (p.k % kChunk != 0 || address % 16 != 0) {
    return p.blocks() ? launch<Small, mma, wide, true, false, false>(p, stream)
                      : launch<Small, mma, wide, false, false, false>(p, stream);
  }
  const bool e4m3 = p.w.type == Type::kE4M3 && (wide || p.x.type == Type::kE4M3);
  return e4m3 ? choose_tile<mma, wide, true>(p, stream) : choose_tile<mma, wide, false>(p, stream);
}

}  // namespace

std::string decode_refusal(const Product& p, int capability) {
  if (capability < 75) return "its kernels begin with compute capability 7.5";
  if (p.x.type == Type::kBF16 && capability < 80) {
    return "bfloat16 tensor cores begin with compute capability 8.0";
  }
  return "";
}

cudaError_t decode_matmul(const Product& p, cudaStream_t stream) {
  if (p.x.type == Type::kBF16) return choose<Type::kBF16, true>(p, stream);
  if (p.x.type == Type::kF16) return choose<Type::kF16, true>(p, stream);
  return choose<Type::kF16, false>(p, stream);
}

}  // namespace jax_fp8
