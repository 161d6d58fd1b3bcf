// Dynamic scales of whole tensors, of rows and of columns in one launch: amaxes first, then the
// cast.
//
// All thread blocks run at once and wait for each other in between. What they read last stays on
// the chip: a tile of each in registers, one in shared memory. The others are read again, the
// latest first, of which the cache still has some.
#include <cooperative_groups.h>

#include <algorithm>
#include <utility>

#include "ffi/cast_transpose_cast.h"

namespace jax_fp8 {
namespace {

constexpr Type kIn = Type::kBF16;  // What models have: each type more takes room in the library.
using Packs = Pack<kIn, kColumns>[Tile<kIn>::kRows];
constexpr int kThreads = Tile<kIn>::kThreads, kRows = Tile<kIn>::kRows;
constexpr int kTileBytes = kEdge * kEdge * 2;

extern __shared__ uint4 kept_tile[];  // Each thread has its own packs there.

// Of how many tiles shared memory has the columns' amaxes, before they go to the scratch.
constexpr int kTurns = kEdge * kEdge / (kEdge * sizeof(uint32_t));

// Adds a tile's amaxes: of rows to those in the scratch, of columns to `totals`, in an order of
// which no bank is met twice. No warp waits for another.
__device__ void add_strips(const CastTranspose& q, const Place& at, const Packs& packs,
                           uint32_t* totals) {
  const Strips<kIn> found(packs);
  const int lane = static_cast<int>(threadIdx.x % kThreadsARow);
  const int half = lane % found.kShare, row = at.row + 2 * found.of_row() + half;
  if (q.straight_scale != nullptr && half < 2 && row < at.rows) {
    const uint32_t amax = magnitude_bits<kIn>(half == 0 ? found.row & 0xffffu : found.row >> 16);
    atomicMax(q.scratch + line_index(q, at, false, row), amax);
  }
  if (q.transposed_scale == nullptr) return;
  const bool second = threadIdx.x % 32 >= kThreadsARow;  // Half of the columns each.
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t word = second ? found.columns[2 + i] : found.columns[i];
    uint32_t* const total = totals + ((second ? 4 : 0) + 2 * i) * kThreadsARow + lane;
    atomicMax(total, word & 0xffffu);
    atomicMax(total + kThreadsARow, word >> 16);
  }
}

// The amaxes of columns to the scratch, of the turns from `first` on.
template <typename PlaceOf>
__device__ void flush_columns(const CastTranspose& q, const PlaceOf& place, int first, int turns,
                              uint32_t* totals) {
  __syncthreads();
  for (int i = threadIdx.x; i < turns * kEdge; i += kThreads) {
    const Place at = place(first + i / kEdge);
    const int column = i % kThreadsARow * kColumns + i % kEdge / kThreadsARow;
    if (at.rows > 0 && column < at.cols) {
      atomicMax(q.scratch + line_index(q, at, true, column), magnitude_bits<kIn>(totals[i]));
    }
    totals[i] = 0;
  }
  __syncthreads();
}

// `split` and a tile's cast are as in cast_tile.
template <Type out, bool split>
__global__ void __launch_bounds__(kThreads, Tile<kIn>::kBlocks)
    held_kernel(const CastTranspose q, const Walk walk, bool keeps) {
  __shared__ alignas(16) uint8_t turned[kEdge * kEdge];
  __shared__ alignas(16) float inverses[split ? 2 * kEdge : 1];
  auto* const totals = reinterpret_cast<uint32_t*>(turned);
  const auto grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token zeroed{};
  if constexpr (split) {
    const int64_t words = q.batch * (q.rows + q.cols), step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += step) {
      q.scratch[i] = 0;
    }
    zeroed = grid.barrier_arrive();
    for (int i = threadIdx.x; i < kTurns * kEdge; i += kThreads) totals[i] = 0;
    __syncthreads();
  }
  const int turns = static_cast<int>((walk.tiles - 1 - blockIdx.x) / gridDim.x) + 1;
  const auto place = [&](int turn) {
    return find_place(q, walk, kRows, blockIdx.x + static_cast<uint32_t>(turn) * gridDim.x);
  };
  const auto kept = [&](int i) -> uint4& { return kept_tile[i * kThreads + threadIdx.x]; };

  Packs packs;
  Amax<kIn> amax;
  for (int turn = 0; turn < turns; ++turn) {
    const Place at = place(turn);
    load_tile<kIn, true>(q, at, packs);
    if constexpr (split) {
      if (turn == 0) grid.barrier_wait(std::move(zeroed));
      add_strips(q, at, packs, totals + turn % kTurns * kEdge);
      if (q.transposed_scale != nullptr && (turn % kTurns == kTurns - 1 || turn == turns - 1)) {
        flush_columns(q, place, turn / kTurns * kTurns, turn % kTurns + 1, totals);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) amax.take(packs[i]);
    }
    if (keeps && turn == turns - 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const auto& w = packs[i].words;
        kept(i) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
  float inverse = 0.0f;
  if constexpr (split) {
    grid.sync();
  } else {
    const uint32_t own = block_max(amax.bits());
    if (threadIdx.x == 0) q.scratch[blockIdx.x] = own;
    grid.sync();
    uint32_t largest = 0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
      largest = max(largest, __ldcg(q.scratch + i));
    }
    largest = block_max(largest);
    const float scale = dynamic_scale(__uint_as_float(largest), out, q.power_of_two);
    if (blockIdx.x == 0 && threadIdx.x == 0) {
      if (q.straight_scale != nullptr) *q.straight_scale = scale;
      if (q.transposed_scale != nullptr) *q.transposed_scale = scale;
      if (q.amax != nullptr) *q.amax = __uint_as_float(largest);
    }
    inverse = inverse_scale(scale);
  }
  for (int turn = turns - 1; turn >= 0; --turn) {
    const Place at = place(turn);
    if (keeps && turn == turns - 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const uint4 w = kept(i);
        packs[i].words[0] = w.x, packs[i].words[1] = w.y;
        packs[i].words[2] = w.z, packs[i].words[3] = w.w;
      }
    } else if (turn < turns - 1) {
      load_tile<kIn, true>(q, at, packs);
    }
    if (at.rows <= 0) continue;
    __syncthreads();  // The tile before has been stored.
    if constexpr (split) {
      split_inverses<kIn, out>(q, walk, at, turned, inverses);
      __syncthreads();
    }
    cast_tile<kIn, out, split, true, false>(q, walk, at, packs, inverse, inverses, turned);
  }
}

using Kernel = void (*)(CastTranspose, Walk, bool);

// Thread blocks on a multiprocessor.
cudaError_t resident(Kernel kernel, int bytes, int* blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, bytes);
}

}  // namespace

cudaError_t cast_held(const CastTranspose& q, cudaStream_t stream) {
  const bool split = has_row_scales(q);
  if (q.x_type != kIn || q.keys != nullptr || !loads_vectors(q) || (!split && q.entries != 1)) {
    return cudaErrorNotSupported;
  }
  const Kernel kernels[2][2] = {{held_kernel<Type::kE4M3, false>, held_kernel<Type::kE4M3, true>},
                                {held_kernel<Type::kE5M2, false>, held_kernel<Type::kE5M2, true>}};
  const Kernel kernel = kernels[q.data_type == Type::kE4M3 ? 0 : 1][split ? 1 : 0];
  int sms = 0, room = 0, blocks = 0, keeping = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &sms);
  if (error == cudaSuccess) {
    error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &room);
  }
  if (error == cudaSuccess) error = resident(kernel, 0, &blocks);
  if (error != cudaSuccess) return error;
  Walk walk = walk_of(q, 0);
  walk.reverse = false;
  bool keeps = walk.tiles > static_cast<uint32_t>(blocks * sms);
  if (keeps && room >= kTileBytes + kEdge * kEdge + 4096) {
    // The same for all calls, which several threads may make at once.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileBytes);
    if (error == cudaSuccess) error = resident(kernel, kTileBytes, &keeping);
    if (error != cudaSuccess) return error;
  }
  keeps = keeps && keeping == blocks;  // More of them are worth more than what they keep.
  const auto most = static_cast<uint32_t>(std::min(blocks * sms, kMaxParts));
  if (most == 0) return cudaErrorNotSupported;
  CastTranspose copy = q;
  void* arguments[] = {&copy, &walk, &keeps};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(std::min(walk.tiles, most)), dim3(kThreads), arguments,
                                     keeps ? kTileBytes : 0, stream);
}

}  // namespace jax_fp8
