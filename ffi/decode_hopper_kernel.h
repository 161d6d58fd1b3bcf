// The kernel of decode_hopper, for sm_90a.
#pragma once

#include <algorithm>

#include "ffi/finish.h"
#include "ffi/hopper.h"

namespace jax_fp8::hopper {

// The kernel computes the transpose of D: the rows of W stand where wgmma takes registers. Each of
// the warpgroups that multiply has 64 rows and all tokens (rows of X) of the block's tile, and
// every depth_groups-th stage along K; one more warpgroup keeps a ring of stages filled, kDepth of
// K each.
constexpr int kDepth = 64;
constexpr int kSlices = kDepth / 16;
constexpr int kSharedBytes = 227 * 1024;

template <int row_groups, int depth_groups, int tokens>
struct Shape {
  static constexpr int kRowGroups = row_groups, kDepthGroups = depth_groups, kTokens = tokens;
  static constexpr int kRows = 64 * row_groups;
  static constexpr int kSums = tokens / 2;  // Of a thread.
  static constexpr int kConsumers = row_groups * depth_groups;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  // Of the registers that a block starts with, most go to those that multiply.
  static constexpr int kConsumerRegisters = kConsumers == 2 ? 232 : 112;
  static constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 24;
  // With two, a warpgroup decodes a stage while it multiplies the one before; four do so for each
  // other.
  static constexpr int kBuffers = kConsumers == 2 ? 2 : 1;
  static_assert(kConsumers == 2 || kConsumers == 4);

  static constexpr int kXBytes = tokens * kDepth * 2;
  static constexpr int kWBytes = kRows * kDepth;
  // Of a row group: its part of D in 16 bits or, before, the sums of all depth groups but one.
  static constexpr int kOutBytes = std::max(64 * tokens * 2, (depth_groups - 1) * 64 * tokens * 4);
  // A multiple of depth_groups, as are the steps along K (zeros beyond its end), so that a stage
  // always has the same readers: a barrier's parity tells its last two phases apart and no more,
  // and only who has read the one can wait for the next. 1024 for the alignment of the swizzle, 256
  // for the barriers.
  static constexpr int kStages =
      std::min(16, (kSharedBytes - 1024 - 256 - row_groups * kOutBytes) / (kXBytes + kWBytes)) /
      depth_groups * depth_groups;
  static constexpr int kX = 0;
  static constexpr int kOut = kX + kStages * kXBytes;
  static constexpr int kW = kOut + row_groups * kOutBytes;
  static constexpr int kFull = kW + kStages * kWBytes;
  static constexpr int kEmpty = kFull + kStages * 8;
  static constexpr int kBytes = kEmpty + kStages * 8 + 1024;
  static_assert(kBytes <= kSharedBytes && kStages >= 4);
};

struct Maps {
  CUtensorMap x, w, d;
};

// Which tiles there are. The blocks of a cluster take neighbouring tiles of rows and one of tokens;
// clusters at work at the same time share what they read through L2, so tokens come in bands of
// kBand tiles and within a band before rows.
struct Tiles {
  int token_tiles, row_clusters, count, depth_steps;
  static constexpr int kBand = 8;

  __device__ void locate(int index, int* token_tile, int* row_cluster, int* batch) const {
    const int per_batch = token_tiles * row_clusters;
    *batch = index / per_batch;
    index -= *batch * per_batch;
    const int band = index / (kBand * row_clusters);
    index -= band * kBand * row_clusters;
    const int width = min(kBand, token_tiles - band * kBand);
    *token_tile = band * kBand + index % width;
    *row_cluster = index / width;
  }
};

// --- Decoding ------------------------------------------------------------------------------------

// Two codes, next to each other along K.
template <int offset>
__device__ uint32_t load_pair(uint32_t address) {
  uint16_t pair;
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=h"(pair) : "r"(address), "n"(offset));
  return pair;
}

// Both formats are exact in float16, NaN and infinity included, and what they hold in bfloat16.
template <Type w_type, Type x_type>
__device__ uint32_t decode_pair(uint32_t codes) {
  uint32_t halves;
  if constexpr (w_type == Type::kE4M3) {
    asm("{\n.reg .b16 h;\ncvt.u16.u32 h, %1;\ncvt.rn.f16x2.e4m3x2 %0, h;\n}"
        : "=r"(halves)
        : "r"(codes));
  } else {
    halves = __byte_perm(codes, 0, 0x1404);  // A code is the upper byte of a float16.
  }
  if constexpr (x_type == Type::kF16) return halves;
  uint32_t wide;
  asm("{\n"
      ".reg .b16 low, high;\n"
      ".reg .f32 a, b;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.f32.f16 a, low;\n"
      "cvt.f32.f16 b, high;\n"
      "cvt.rn.bf16x2.f32 %0, b, a;\n"
      "}"
      : "=r"(wide)
      : "r"(halves));
  return wide;
}

using Fragments = uint32_t[kSlices][4];

// A thread's part of a stage of W: two rows, eight apart, and of each slice of 16 the pairs 2t and
// 2t + 8. Within 64 bytes of a row the copy engine has exchanged the chunks of 16: `slice[i]` is
// where the i-th of this thread's row begins, plus 2t.
__device__ inline void load_codes(Fragments& codes, uint32_t tile, const int (&slice)[kSlices]) {
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    const uint32_t address = tile + slice[i];
    codes[i][0] = load_pair<0>(address);
    codes[i][1] = load_pair<8 * kDepth>(address);
    codes[i][2] = load_pair<8>(address);
    codes[i][3] = load_pair<8 * kDepth + 8>(address);
  }
}

template <Type w_type, Type x_type>
__device__ void decode_codes(Fragments& a, const Fragments& codes) {
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[i][j] = decode_pair<w_type, x_type>(codes[i][j]);
  }
}

// --- The kernel ----------------------------------------------------------------------------------

// Where a warpgroup is in the ring.
struct Ring {
  int stage, parity;
  template <int stages>
  __device__ void advance(int by) {
    stage += by;
    if (stage >= stages) {
      stage -= stages;
      parity ^= 1;
    }
  }
};

template <class S>
__device__ void produce(const Maps& maps, const Tiles& tiles, uint32_t shared, int cluster,
                        int rank) {
  const int slice = S::kTokens / cluster;  // Of X: each block copies one to all of the cluster.
  const auto everyone = static_cast<uint16_t>((1 << cluster) - 1);
  Ring ring{0, 0};
  for (int index = blockIdx.x / cluster; index < tiles.count; index += gridDim.x / cluster) {
    int token_tile, row_cluster, batch;
    tiles.locate(index, &token_tile, &row_cluster, &batch);
    const int row = (row_cluster * cluster + rank) * S::kRows;
    const int token = token_tile * S::kTokens + rank * slice;
    for (int step = 0; step < tiles.depth_steps; ++step) {
      const uint32_t full = shared + S::kFull + ring.stage * 8;
      barrier_wait(shared + S::kEmpty + ring.stage * 8, ring.parity ^ 1);
      if (elect_lane()) {
        barrier_expect(full, S::kXBytes + S::kWBytes);
        copy_in(shared + S::kW + ring.stage * S::kWBytes, maps.w, full, step * kDepth, row, batch);
        const uint32_t x = shared + S::kX + ring.stage * S::kXBytes + rank * slice * kDepth * 2;
        if (cluster == 1) {
          copy_in(x, maps.x, full, step * kDepth, token, batch);
        } else {
          copy_in(x, maps.x, full, step * kDepth, token, batch, everyone);
        }
      }
      __syncwarp();
      ring.advance<S::kStages>(1);
    }
  }
}

// Adds up the sums of the depth groups in those of the first, always in the same order. `out` is
// free when all have met: the first thread has waited for the copy of the tile before.
template <class S>
__device__ void add_depth_groups(float (&d)[S::kSums], uint32_t out, int row_group,
                                 int depth_group) {
  const int thread = threadIdx.x % 128, barrier = 1 + row_group;
  constexpr int kAll = S::kDepthGroups * 128;
  threads_sync(barrier, kAll);
  if (depth_group > 0) {
#pragma unroll
    for (int i = 0; i < S::kSums; i += 4) {
      store_shared(out + (((depth_group - 1) * S::kSums + i) * 128 + thread * 4) * 4, d + i);
    }
    threads_arrive(barrier, kAll);
    return;
  }
  threads_sync(barrier, kAll);
#pragma unroll
  for (int group = 1; group < S::kDepthGroups; ++group) {
#pragma unroll
    for (int i = 0; i < S::kSums; i += 4) {
      add_shared(d + i, out + (((group - 1) * S::kSums + i) * 128 + thread * 4) * 4);
    }
  }
}

// Scales, bias, activation, and the way out of a warpgroup's 64 rows: a float32 result directly,
// since eight threads hold the 32 bytes of a sector, a 16-bit one through shared memory.
template <class S>
__device__ void write_tile(const Product& p, const Maps& maps, float (&d)[S::kSums], uint32_t out,
                           int barrier, int row0, int token0, int batch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  float scale[2], bias[2] = {};
  int64_t row[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    row[i] = row0 + warp * 16 + i * 8 + lane / 4;
    const int64_t inside = min(row[i], p.n - 1);
    scale[i] = p.w.scale_at(batch, inside, 0);
    if (p.bias != nullptr) bias[i] = load_as_float(p.bias, p.bias_type, inside);
  }
  // What apply_scales gives for an x scale of 1. Not fused with the bias: it rounds on its own.
#pragma unroll
  for (int i = 0; i < S::kSums; ++i) d[i] = __fmul_rn(d[i], scale[i / 2 % 2]);
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) d[i] += bias[i / 2 % 2];
  }
  if (p.activation == Activation::kRelu) {
#pragma unroll
    for (float& value : d) value = activate(Activation::kRelu, value);
  } else if (p.activation == Activation::kGelu) {
#pragma unroll
    for (float& value : d) value = activate(Activation::kGelu, value);
  }
  if (p.d_type == Type::kF32) {
    auto* target = static_cast<float*>(p.d) + batch * p.m * p.n;
#pragma unroll
    for (int i = 0; i < S::kSums; ++i) {
      const int64_t token = token0 + i / 4 * 8 + lane % 4 * 2 + i % 2;
      const int64_t r = row[i / 2 % 2];
      if (token < p.m && r < p.n) target[token * p.n + r] = d[i];
    }
    return;
  }
  threads_sync(barrier, 128);  // `out` is free: see consume and add_depth_groups.
  const int chunk = warp * 2 + lane / 8 % 2;
#pragma unroll
  for (int i = 0; i < S::kTokens / 16; ++i) {
    const int token = i * 16 + lane / 16 * 8 + lane % 8;
    const uint32_t address = out + token * 128 + (chunk ^ lane % 8) * 16;
    const float* s = d + i * 8;
    store_transposed(address, pack(p.d_type, s[0], s[1]), pack(p.d_type, s[2], s[3]),
                     pack(p.d_type, s[4], s[5]), pack(p.d_type, s[6], s[7]));
  }
  copy_out_fence();
  threads_sync(barrier, 128);
  if (threadIdx.x % 128 == 0) copy_out(maps.d, out, row0, token0, batch);
}

template <Type w_type, Type x_type, class S>
__device__ void consume(const Product& p, const Maps& maps, const Tiles& tiles, uint32_t shared,
                        int cluster, int rank) {
  // From a shuffle, so that the compiler knows it to be the same in all lanes.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int row_group = group % S::kRowGroups, depth_group = group / S::kRowGroups;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  int slice[kSlices];
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    slice[i] =
        (row_group * 64 + warp * 16 + lane / 4) * kDepth + (i ^ (lane / 8)) * 16 + lane % 4 * 2;
  }
  const uint32_t out = shared + S::kOut + row_group * S::kOutBytes;
  Ring ring{0, 0};  // At the first stage of the tile; the group's own is `depth_group` on.
  for (int index = blockIdx.x / cluster; index < tiles.count; index += gridDim.x / cluster) {
    float d[S::kSums];
#pragma unroll
    for (float& sum : d) sum = 0.0f;
    Fragments a[S::kBuffers];
    int previous = -1;
    const auto release = [&] {
      if (previous >= 0 && lane < cluster) {
        barrier_arrive(shared + S::kEmpty + previous * 8, lane);
      }
    };
    Ring mine = ring;
    mine.advance<S::kStages>(depth_group);
    const auto advance = [&](Fragments& a) {
      barrier_wait(shared + S::kFull + mine.stage * 8, mine.parity);
      Fragments codes;
      load_codes(codes, shared + S::kW + mine.stage * S::kWBytes, slice);
      if constexpr (S::kBuffers == 1) {
        multiply_wait<0>();
        release();
      }
      decode_codes<w_type, x_type>(a, codes);
      const uint64_t b = matrix_descriptor(shared + S::kX + mine.stage * S::kXBytes);
      multiply_fence();
#pragma unroll
      for (int i = 0; i < kSlices; ++i) multiply_add<x_type>(d, a[i], b + i * 2);
      multiply_commit();
      if constexpr (S::kBuffers == 2) {
        multiply_wait<1>();
        release();
      }
      previous = mine.stage;
      mine.advance<S::kStages>(S::kDepthGroups);
    };
    int step = depth_group;
    if constexpr (S::kBuffers == 2) {
      for (; step + S::kDepthGroups < tiles.depth_steps; step += 2 * S::kDepthGroups) {
        advance(a[0]);
        advance(a[1]);
      }
      if (step < tiles.depth_steps) advance(a[0]);
    } else {
      for (; step < tiles.depth_steps; step += S::kDepthGroups) advance(a[0]);
    }
    multiply_wait<0>();
    release();
    // On to the first stage of the next tile, which may be several turns of the ring away.
    const int steps = ring.stage + tiles.depth_steps;
    ring.parity ^= steps / S::kStages % 2;
    ring.stage = steps % S::kStages;

    int token_tile, row_cluster, batch;
    tiles.locate(index, &token_tile, &row_cluster, &batch);
    // The copy of the tile before, started by this thread, has read `out`.
    if (threadIdx.x % 128 == 0 && depth_group == 0) copy_out_wait();
    if constexpr (S::kDepthGroups > 1) {
      add_depth_groups<S>(d, out, row_group, depth_group);
      if (depth_group > 0) continue;
    }
    write_tile<S>(p, maps, d, out, 1 + S::kRowGroups + row_group,
                  (row_cluster * cluster + rank) * S::kRows + row_group * 64,
                  token_tile * S::kTokens, batch);
  }
  // Shared memory must live until it has been read.
  if (threadIdx.x % 128 == 0) copy_out_wait();
}

template <Type w_type, Type x_type, class S>
__global__ void __launch_bounds__(S::kThreads, 1)
    decode_kernel(const __grid_constant__ Product p, const __grid_constant__ Maps maps,
                  const __grid_constant__ Tiles tiles) {
  extern __shared__ uint8_t dynamic[];
  const uint32_t shared = (shared_address(dynamic) + 1023) / 1024 * 1024;
  const int cluster = cluster_size(), rank = cluster_rank();
  constexpr int kConsumerThreads = S::kConsumers * 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(shared + S::kFull + i * 8, 1);
      barrier_init(shared + S::kEmpty + i * 8, S::kRowGroups * 4 * cluster);
    }
    barrier_init_fence();
  }
  cluster_sync();
  if (threadIdx.x < kConsumerThreads) {
    more_registers<S::kConsumerRegisters>();
    consume<w_type, x_type, S>(p, maps, tiles, shared, cluster, rank);
  } else {
    fewer_registers<S::kProducerRegisters>();
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == kConsumerThreads / 32) produce<S>(maps, tiles, shared, cluster, rank);
  }
  cluster_sync();  // The others of the cluster may still write here.
}

}  // namespace jax_fp8::hopper
