#include "ffi/decode.h"
#include "ffi/finish.h"

namespace jax_fp8 {
namespace {

// A thread block computes kTileM x kTileN of D, a warp kWarpM x kWarpN of that, in steps of kTileK.
constexpr int kTileM = 128, kTileN = 128, kTileK = 64;
constexpr int kWarpM = 64, kWarpN = 32;
constexpr int kThreads = 256;
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
constexpr int kChunk = 16;  // Codes that a thread loads at once.
constexpr int kChunks = kTileM * kTileK / kChunk / kThreads;
// Rows of shared memory start 16 bytes apart modulo 128, so that ldmatrix meets no bank twice.
constexpr int kPitch = kTileK + 8;
static_assert(kTileM == kTileN, "one loader serves both operands");
static_assert(kBlock % kTileK == 0, "a step lies in one scale block");

struct Chunk {
  uint4 codes;
};

// Loads 16 codes, zeros from the `left`-th on.
template <bool aligned>
__device__ Chunk load_chunk(const uint8_t* source, int64_t left) {
  Chunk chunk{};
  if constexpr (aligned) {
    if (left > 0) chunk.codes = *reinterpret_cast<const uint4*>(source);
  } else {
    uint8_t bytes[kChunk] = {};
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < left) bytes[i] = source[i];
    }
    memcpy(&chunk.codes, bytes, sizeof bytes);
  }
  return chunk;
}

template <Type type>
__device__ uint32_t decode_pair(uint32_t codes) {
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(
      static_cast<__nv_fp8x2_storage_t>(codes), type == Type::kE4M3 ? __NV_E4M3 : __NV_E5M2);
  return static_cast<uint32_t>(halves.x) | static_cast<uint32_t>(halves.y) << 16;
}

// The format is a run-time value: the branch is the same for all threads, and a quarter of the
// kernels is left to compile.
__device__ void store_chunk(const Chunk& chunk, Type type, __half* target) {
  const uint32_t words[4] = {chunk.codes.x, chunk.codes.y, chunk.codes.z, chunk.codes.w};
  uint32_t halves[8];
  if (type == Type::kE4M3) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      halves[i] = decode_pair<Type::kE4M3>(words[i / 2] >> (i % 2 * 16) & 0xffffu);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      halves[i] = decode_pair<Type::kE5M2>(words[i / 2] >> (i % 2 * 16) & 0xffffu);
    }
  }
  auto* out = reinterpret_cast<uint4*>(target);
  out[0] = make_uint4(halves[0], halves[1], halves[2], halves[3]);
  out[1] = make_uint4(halves[4], halves[5], halves[6], halves[7]);
}

__device__ void load_matrices(uint32_t (&r)[4], const __half* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7},"
      " {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  // Turing has half of it: the registers of the two halves along K are the same.
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6},"
      " {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

using Sums = float[kFragmentsM][kFragmentsN][4];

// Row and column, within the warp's tile, of element `i` of a fragment, as mma lays them out.
__device__ int fragment_row(int fragment, int i, int lane) {
  return fragment * 16 + lane / 4 + (i / 2) * 8;
}
__device__ int fragment_column(int fragment, int i, int lane) {
  return fragment * 8 + (lane % 4) * 2 + i % 2;
}

// The scales of the rows and columns that a thread has sums of, as indices of their first block.
struct ScaleIndices {
  int64_t x[kFragmentsM * 2], w[kFragmentsN * 2];

  __device__ ScaleIndices(const Product& p, int64_t b, int64_t row0, int64_t column0, int lane) {
#pragma unroll
    for (int i = 0; i < kFragmentsM * 2; ++i) {
      x[i] = p.x.scale_index(b, min(row0 + fragment_row(i / 2, i % 2 * 2, lane), p.m - 1));
    }
#pragma unroll
    for (int i = 0; i < kFragmentsN * 2; ++i) {
      w[i] = p.w.scale_index(b, min(column0 + fragment_column(i / 2, i % 2, lane), p.n - 1));
    }
  }
};

// total += sums * scales of block `k_block`, and clears the sums.
__device__ void promote(const Product& p, Sums& total, Sums& sums, int64_t b, int64_t row0,
                        int64_t column0, int64_t k_block, int lane) {
  const ScaleIndices indices(p, b, row0, column0, lane);
  const int64_t x_block = p.x.block_cols ? k_block : 0, w_block = p.w.block_cols ? k_block : 0;
  float x[kFragmentsM * 2], w[kFragmentsN * 2];
#pragma unroll
  for (int i = 0; i < kFragmentsM * 2; ++i) x[i] = p.x.scale[indices.x[i] + x_block];
#pragma unroll
  for (int i = 0; i < kFragmentsN * 2; ++i) w[i] = p.w.scale[indices.w[i] + w_block];
#pragma unroll
  for (int fm = 0; fm < kFragmentsM; ++fm) {
#pragma unroll
    for (int fn = 0; fn < kFragmentsN; ++fn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[fm][fn][i] += sums[fm][fn][i] * x[fm * 2 + i / 2] * w[fn * 2 + i % 2];
        sums[fm][fn][i] = 0.0f;
      }
    }
  }
}

template <bool aligned, bool blocks>
__global__ void __launch_bounds__(kThreads, blocks ? 1 : 2)
    decode_kernel(Product p, int64_t tiles_m, int64_t tiles_n) {
  __shared__ __align__(16) __half x_tile[kTileM * kPitch];
  __shared__ __align__(16) __half w_tile[kTileN * kPitch];
  // Tiles of one column of D follow each other: they share the rows of W, the larger operand.
  const int64_t tile_m = blockIdx.x % tiles_m * kTileM;
  const int64_t tile_n = blockIdx.x / tiles_m % tiles_n * kTileN;
  const int64_t b = blockIdx.x / tiles_m / tiles_n;
  const uint8_t* x = p.x.data + b * p.m * p.k;
  const uint8_t* w = p.w.data + b * p.n * p.k;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp % (kTileM / kWarpM) * kWarpM;
  const int warp_n = warp / (kTileM / kWarpM) * kWarpN;

  // The chunks of a thread lie kRowStep rows apart, in the same columns.
  constexpr int kRowStep = kThreads * kChunk / kTileK;
  const int chunk_row = threadIdx.x / (kTileK / kChunk);
  const int chunk_column = threadIdx.x % (kTileK / kChunk) * kChunk;
  const uint8_t* x_source = x + (tile_m + chunk_row) * p.k + chunk_column;
  const uint8_t* w_source = w + (tile_n + chunk_row) * p.k + chunk_column;
  Chunk x_next[kChunks], w_next[kChunks];
  const auto fetch = [&](int64_t k) {
    const int64_t left = p.k - k - chunk_column;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int row = chunk_row + i * kRowStep;
      const int64_t offset = k + i * kRowStep * p.k;
      x_next[i] = load_chunk<aligned>(x_source + offset, tile_m + row < p.m ? left : 0);
      w_next[i] = load_chunk<aligned>(w_source + offset, tile_n + row < p.n ? left : 0);
    }
  };

  Sums sums = {}, total = {};
  fetch(0);
  for (int64_t k = 0; k < p.k; k += kTileK) {
    __syncthreads();  // The tiles of the step before have been read.
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int offset = (chunk_row + i * kRowStep) * kPitch + chunk_column;
      store_chunk(x_next[i], p.x.type, x_tile + offset);
      store_chunk(w_next[i], p.w.type, w_tile + offset);
    }
    __syncthreads();
    if (k + kTileK < p.k) fetch(k + kTileK);  // In flight while the tensor cores work.
#pragma unroll
    for (int kk = 0; kk < kTileK; kk += 16) {
      uint32_t a[kFragmentsM][4], bb[kFragmentsN / 2][4];
#pragma unroll
      for (int fm = 0; fm < kFragmentsM; ++fm) {
        load_matrices(a[fm], x_tile + (warp_m + fm * 16 + lane % 16) * kPitch + kk + lane / 16 * 8);
      }
#pragma unroll
      for (int fn = 0; fn < kFragmentsN / 2; ++fn) {
        load_matrices(bb[fn], w_tile + (warp_n + fn * 16 + lane % 8 + lane / 16 * 8) * kPitch + kk +
                                  lane / 8 % 2 * 8);
      }
#pragma unroll
      for (int fm = 0; fm < kFragmentsM; ++fm) {
#pragma unroll
        for (int fn = 0; fn < kFragmentsN; ++fn) {
          multiply_add(sums[fm][fn], a[fm], bb[fn / 2][fn % 2 * 2], bb[fn / 2][fn % 2 * 2 + 1]);
        }
      }
    }
    if constexpr (blocks) {
      const int64_t end = k + kTileK;
      if (end % kBlock == 0 || end >= p.k) {
        promote(p, total, sums, b, tile_m + warp_m, tile_n + warp_n, k / kBlock, lane);
      }
    }
  }

  const ScaleIndices indices(p, b, tile_m + warp_m, tile_n + warp_n, lane);
  float largest = 0.0f;
#pragma unroll
  for (int fm = 0; fm < kFragmentsM; ++fm) {
#pragma unroll
    for (int fn = 0; fn < kFragmentsN; ++fn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = tile_m + warp_m + fragment_row(fm, i, lane);
        const int64_t n = tile_n + warp_n + fragment_column(fn, i, lane);
        if (m >= p.m || n >= p.n) continue;
        float value = total[fm][fn][i];
        if constexpr (!blocks) {
          value = apply_scales(sums[fm][fn][i], p.x.scale[indices.x[fm * 2 + i / 2]],
                               p.w.scale[indices.w[fn * 2 + i % 2]]);
        }
        value = finish(p, value, n);
        store(p, value, (b * p.m + m) * p.n + n);
        largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
      }
    }
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
}

template <bool aligned>
void launch(const Product& p, cudaStream_t stream) {
  const int64_t tiles_m = ceil_div(p.m, kTileM), tiles_n = ceil_div(p.n, kTileN);
  const auto grid = static_cast<unsigned>(tiles_m * tiles_n * p.batch);
  if (p.x.per_block() || p.w.per_block()) {
    decode_kernel<aligned, true><<<grid, kThreads, 0, stream>>>(p, tiles_m, tiles_n);
  } else {
    decode_kernel<aligned, false><<<grid, kThreads, 0, stream>>>(p, tiles_m, tiles_n);
  }
}

}  // namespace

cudaError_t decode_matmul(const Product& p, cudaStream_t stream) {
  const auto address =
      reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.w.data);
  if (p.k % kChunk == 0 && address % kChunk == 0) {
    launch<true>(p, stream);
  } else {
    launch<false>(p, stream);
  }
  return cudaGetLastError();
}

}  // namespace jax_fp8
