// The kernel of large_m_hopper, for sm_90a.
#pragma once

#include "ffi/fused.h"
#include "ffi/hopper.h"
#include "ffi/pack.h"

namespace jax_fp8 {
namespace {

// A tile of sums is 128 rows of X by 256 of W, which for a SwiGLU are 128 gates and the 128 rows
// that go with them. Each of two warpgroups has half of the tile's rows; a warp of a third one
// keeps a ring of stages filled.
constexpr int kRows = 128;
constexpr int kWRows = 256;
constexpr int kDepth = 128;  // Codes of a row in a stage.
constexpr int kStages = 4;
constexpr int kCluster = 2;  // Blocks with the same rows of W, of which each copies half to both.
constexpr int kThreads = 3 * 128;
constexpr int kOwnRows = 64;  // Of a warpgroup.
constexpr int kPart = 64;     // Columns of D that leave at once.
constexpr int kOuts = 2;      // Parts of a warpgroup in shared memory.

constexpr int kXBytes = kRows * kDepth;
constexpr int kStageBytes = kXBytes + kWRows * kDepth;
constexpr int kOutBytes = kOwnRows * kPart * 2;
constexpr int kOut = kStages * kStageBytes;
constexpr int kScales = kOut + 2 * kOuts * kOutBytes;
constexpr int kFull = kScales + 2 * kWRows * 4;
constexpr int kEmpty = kFull + kStages * 8;
constexpr int kResidual = kEmpty + kStages * 8;
constexpr int kBytes = kResidual + 2 * kOuts * 8;
static_assert(kBytes <= 227 << 10);

struct Maps {
  CUtensorMap x, w, d, residual;
};

// Clusters at work at the same time share what they read through L2, so tiles of rows come in bands
// of kBand clusters, and within a band before columns.
struct Tiles {
  int row_clusters, column_tiles, count, steps;
  static constexpr int kBand = 8;

  __device__ void locate(int index, int* row_cluster, int* column_tile) const {
    const int band = index / (kBand * column_tiles);
    index -= band * kBand * column_tiles;
    const int width = min(kBand, row_clusters - band * kBand);
    *row_cluster = band * kBand + index % width;
    *column_tile = index / width;
  }
};

template <bool swiglu>
constexpr int kColumns = swiglu ? kWRows / 2 : kWRows;  // Of D in a tile.

#if __CUDA_ARCH__ == 900

// Where one is in the ring.
struct Ring {
  int stage = 0, parity = 0;
  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

template <bool swiglu>
__device__ void produce(const Product& p, const Maps& maps, const Tiles& tiles, uint32_t shared,
                        int rank) {
  const int columns = static_cast<int>(p.d_columns());
  Ring ring;
  for (int index = blockIdx.x / kCluster; index < tiles.count; index += gridDim.x / kCluster) {
    int row_cluster, column_tile;
    tiles.locate(index, &row_cluster, &column_tile);
    const int row = (row_cluster * kCluster + rank) * kRows;
    // Of W: the half of the tile that this block copies.
    const int w_row =
        column_tile * kColumns<swiglu> + rank * (swiglu ? columns : kWRows / kCluster);
    for (int step = 0; step < tiles.steps; ++step) {
      const uint32_t full = shared + kFull + ring.stage * 8;
      const uint32_t x = shared + ring.stage * kStageBytes;
      hopper::barrier_wait(shared + kEmpty + ring.stage * 8, ring.parity ^ 1);
      if (hopper::elect_lane()) {
        hopper::barrier_expect(full, kStageBytes);
        hopper::copy_in(x, maps.x, full, step * kDepth, row, 0);
        hopper::copy_in(x + kXBytes + rank * (kWRows / kCluster * kDepth), maps.w, full,
                        step * kDepth, w_row, 0, static_cast<uint16_t>((1 << kCluster) - 1));
      }
      __syncwarp();
      ring.advance();
    }
  }
}

__device__ float2 unpack(uint32_t pair) {
  return {bits_float(pair << 16), bits_float(pair & 0xffff0000u)};
}

__device__ float2 load_floats(uint32_t address) {
  float2 pair;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(pair.x), "=f"(pair.y)
               : "r"(address)
               : "memory");
  return pair;
}
__device__ uint32_t load_word(uint32_t address) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
  return word;
}
__device__ void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Of the tile's row of W, the one in all of W.
template <bool swiglu>
__device__ int w_row(const Product& p, int column0, int i) {
  const int columns = static_cast<int>(p.d_columns());
  if (!swiglu) return min(column0 + i, columns - 1);
  return min(column0 + i % (kWRows / 2), columns - 1) + (i < kWRows / 2 ? 0 : columns);
}

// Where a tile of sums goes, and what a thread reads of its scales while they come about: those of
// its two rows of X, and of two rows of W, which all threads get to see later on.
struct NextScales {
  int row0, column0;
  float of_x[2], of_w[2];
};
template <bool swiglu>
__device__ NextScales next_scales(const Product& p, int row0, int column0) {
  const int thread = threadIdx.x % 128, last = static_cast<int>(p.m) - 1;
  NextScales next{row0, column0};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    next.of_x[i] = p.x.scale_at(0, min(row0 + thread / 32 * 16 + i * 8 + thread % 32 / 4, last), 0);
    next.of_w[i] = p.w.scale_at(0, w_row<swiglu>(p, column0, thread + i * 128), 0);
  }
  return next;
}

// The sums of a warpgroup's rows of a tile on their way to D, while it multiplies those of the next
// one. They wait in bfloat16, as there are registers for no more. A thread has two rows, eight
// apart, and pairs of columns, eight apart.
template <bool swiglu>
struct Finish {
  static constexpr int kParts = kColumns<swiglu> / kPart;
  static constexpr int kGroups = 8;  // In which the columns are finished.

  const Product& p;
  const Maps& maps;
  const uint32_t out, scales, residual_barrier;  // In shared memory.
  const int barrier;                             // For the warpgroup's threads.
  const int thread, lane, warp;
  int row0, column0;
  float x_scales[2];  // Of the thread's rows.
  uint32_t sums[kWRows / 4];
  int residual_parity = 0;

  __device__ Finish(const Product& p, const Maps& maps, uint32_t shared, int group)
      : p(p),
        maps(maps),
        out(shared + kOut + group * (kOuts * kOutBytes)),
        scales(shared + kScales + group * (kWRows * 4)),
        residual_barrier(shared + kResidual + group * (kOuts * 8)),
        barrier(1 + group),
        thread(threadIdx.x % 128),
        lane(thread % 32),
        warp(thread / 32) {}

  __device__ void fetch_residual(int part) {
    const uint32_t own = residual_barrier + part % kOuts * 8;
    hopper::barrier_expect(own, kOutBytes);
    hopper::copy_in(out + part % kOuts * kOutBytes, maps.residual, own, column0 + part * kPart,
                    row0, 0);
  }

  // Takes the sums of a tile over.
  __device__ void take(const float (&d)[kWRows / 2], const NextScales& next) {
    row0 = next.row0, column0 = next.column0;
    // What is copied here may still be on its way into codes.
    if (p.residual != nullptr && p.codes != nullptr) hopper::threads_sync(barrier, 128);
    if (p.residual != nullptr && thread == 0) {
      hopper::copy_out_wait();  // What was there before has left.
      for (int part = 0; part < kOuts; ++part) fetch_residual(part);
    }
#pragma unroll
    for (int i = 0; i < kWRows / 4; ++i)
      sums[i] = hopper::pack(Type::kBF16, d[2 * i], d[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x_scales[i] = next.of_x[i];
      store_word(scales + (thread + i * 128) * 4, float_bits(next.of_w[i]));
    }
  }

  __device__ float2 scaled(int pair, float x_scale, const float2& w_scale,
                           const float2& bias) const {
    const float2 sum = unpack(sums[pair]);
    float2 value = {__fmul_rn(__fmul_rn(sum.x, x_scale), w_scale.x),
                    __fmul_rn(__fmul_rn(sum.y, x_scale), w_scale.y)};
    if (p.bias != nullptr) value.x += bias.x, value.y += bias.y;
    return value;
  }
  __device__ float2 load_bias(int i) const {
    if (p.bias == nullptr) return {};
    return {load_as_float(p.bias, p.bias_type, w_row<swiglu>(p, column0, i)),
            load_as_float(p.bias, p.bias_type, w_row<swiglu>(p, column0, i + 1))};
  }

  // Of a part as it is in shared memory, by eight threads a row.
  __device__ void write_codes(uint32_t own_out, int part0) const {
    const float inverse = inverse_scale(*p.codes_scale);
    const int column = part0 + thread % 8 * 8;
    for (int own = thread / 8; own < kOwnRows; own += 128 / 8) {
      if (row0 + own >= p.m || column >= p.d_columns()) continue;
      Pack<Type::kBF16, 8> values;
      hopper::load_words(values.words, own_out + own * (kPart * 2) + (thread % 8 ^ own % 8) * 16);
      store_quantized<Type::kE4M3, 8>(p.codes + (row0 + own) * p.d_columns() + column, values,
                                      inverse);
    }
  }

  // Of the groups, one after the other. `group` must be known to the compiler.
  __device__ void finish(int group) {
    constexpr int kEights = kColumns<swiglu> / 8 / kGroups;
    constexpr int kGroupsOfPart = kGroups / kParts;
    const int part = group / kGroupsOfPart, buffer = part % kOuts;
    const uint32_t own_out = out + buffer * kOutBytes;
    if (group % kGroupsOfPart == 0) {
      if (p.residual != nullptr) {
        hopper::barrier_wait(residual_barrier + buffer * 8, residual_parity);
        if (buffer == kOuts - 1) residual_parity ^= 1;
      } else if (thread == 0) {
        hopper::copy_out_wait<kOuts - 1>();
      }
      hopper::threads_sync(barrier, 128);
    }
#pragma unroll
    for (int j = group * kEights; j < (group + 1) * kEights; ++j) {
      const int column = j * 8 + lane % 4 * 2;  // In the tile.
      const float2 w_scale = load_floats(scales + column * 4), bias = load_bias(column);
      float2 up_scale{}, up_bias{};
      if constexpr (swiglu) {
        up_scale = load_floats(scales + (kWRows / 2 + column) * 4);
        up_bias = load_bias(kWRows / 2 + column);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float2 value = scaled(j * 2 + i, x_scales[i], w_scale, bias);
        if constexpr (swiglu) {
          const float2 up = scaled(kWRows / 8 + j * 2 + i, x_scales[i], up_scale, up_bias);
          value = {silu(value.x) * up.x, silu(value.y) * up.y};
        }
        const int row = warp * 16 + i * 8 + lane / 4, pack8 = j % (kPart / 8);
        const uint32_t address =
            own_out + row * (kPart * 2) + (pack8 ^ row % 8) * 16 + lane % 4 * 4;
        if (p.residual != nullptr) {
          const float2 more = unpack(load_word(address));
          value.x += more.x, value.y += more.y;
        }
        store_word(address, hopper::pack(Type::kBF16, value.x, value.y));
      }
    }
    if (group % kGroupsOfPart == kGroupsOfPart - 1) {
      hopper::copy_out_fence();
      hopper::threads_sync(barrier, 128);
      if (thread == 0) hopper::copy_out(maps.d, own_out, column0 + part * kPart, row0, 0);
      if (p.codes != nullptr) write_codes(own_out, column0 + part * kPart);
    } else if (group % kGroupsOfPart == 0 && part > 0 && part - 1 + kOuts < kParts) {
      if (p.residual != nullptr && thread == 0) {
        hopper::copy_out_wait();  // Of the part before, whose place the next one gets.
        fetch_residual(part - 1 + kOuts);
      }
    }
  }
};

template <bool swiglu>
__device__ void consume(const Product& p, const Maps& maps, const Tiles& tiles, uint32_t shared,
                        int rank) {
  // From a shuffle, so that the compiler knows it to be the same in all lanes.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int lane = threadIdx.x % 32;
  const uint64_t matrix = hopper::matrix_descriptor(shared);
  Finish<swiglu> before(p, maps, shared, group);
  constexpr int kGroups = Finish<swiglu>::kGroups;
  bool is_first = true;
  Ring ring;
  for (int index = blockIdx.x / kCluster; index < tiles.count; index += gridDim.x / kCluster) {
    int row_cluster, column_tile;
    tiles.locate(index, &row_cluster, &column_tile);
    const NextScales next =
        next_scales<swiglu>(p, (row_cluster * kCluster + rank) * kRows + group * kOwnRows,
                            column_tile * kColumns<swiglu>);
    float d[kWRows / 2];
    int previous = -1, step = 0;
    const auto release = [&] {
      if (previous >= 0 && lane < kCluster) {
        hopper::barrier_arrive(shared + kEmpty + previous * 8, lane);
      }
    };
    const auto multiply = [&] {
      hopper::barrier_wait(shared + kFull + ring.stage * 8, ring.parity);
      // In units of 16 bytes.
      const uint64_t stage = matrix + ring.stage * (kStageBytes / 16);
      const uint64_t x = stage + group * (kOwnRows * kDepth / 16), w = stage + kXBytes / 16;
      hopper::multiply_fence();
#pragma unroll
      for (int i = 0; i < kDepth / 32; ++i) {
        hopper::multiply_codes(d, x + 2 * i, w + 2 * i, step + i > 0);
      }
      hopper::multiply_commit();
      hopper::multiply_wait<1>();
      release();
      previous = ring.stage;
      ring.advance();
    };
    if (!is_first) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        for (; step < tiles.steps * (g + 1) / kGroups; ++step) multiply();
        before.finish(g);
      }
    }
    for (; step < tiles.steps; ++step) multiply();
    hopper::multiply_wait<0>();
#pragma unroll
    for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");  // Not to be read before.
    release();
    before.take(d, next);
    is_first = false;
  }
#pragma unroll
  for (int g = 0; g < kGroups; ++g) before.finish(g);
  // Shared memory must live until it has been read.
  if (threadIdx.x % 128 == 0) hopper::copy_out_wait();
}

#endif

template <bool swiglu>
__global__ void __launch_bounds__(kThreads, 1) __cluster_dims__(kCluster)
    large_m_hopper_kernel(const __grid_constant__ Product p, const __grid_constant__ Maps maps,
                          const __grid_constant__ Tiles tiles) {
#if __CUDA_ARCH__ == 900
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = hopper::shared_address(memory);
  const int rank = hopper::cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      hopper::barrier_init(shared + kFull + i * 8, 1);
      hopper::barrier_init(shared + kEmpty + i * 8, 8 * kCluster);  // Warps.
    }
    for (int i = 0; i < 2 * kOuts; ++i) hopper::barrier_init(shared + kResidual + i * 8, 1);
    hopper::barrier_init_fence();
  }
  hopper::cluster_sync();
  if (threadIdx.x < 256) {
    hopper::more_registers<240>();
    consume<swiglu>(p, maps, tiles, shared, rank);
  } else {
    hopper::fewer_registers<24>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 8) produce<swiglu>(p, maps, tiles, shared, rank);
  }
  hopper::cluster_sync();  // The other block may still write here.
#endif
}

}  // namespace
}  // namespace jax_fp8
