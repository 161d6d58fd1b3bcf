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
using P = Pack<kIn, kColumns>;
using Packs = P[Tile<kIn>::kRows];
constexpr int kThreads = Tile<kIn>::kThreads, kRows = Tile<kIn>::kRows;
constexpr int kTileBytes = kEdge * kEdge * 2;

// Of more turns too little stays on the chip to make up for blocks that wait for each other.
constexpr int kMostTurns = 4, kMostSplitTurns = 2;

extern __shared__ uint4 kept_tile[];

// A thread's own packs of a tile that is kept in shared memory.
struct Kept {
  int thread;
  __device__ uint4* slot(int i) const { return kept_tile + i * kThreads + thread; }

  __device__ void put(int i, const P& pack) const {
    const auto& w = pack.words;
    *slot(i) = make_uint4(w[0], w[1], w[2], w[3]);
  }
  __device__ P operator[](int i) const {
    const uint4 w = *slot(i);
    return {{w.x, w.y, w.z, w.w}};
  }
};

// Adds a tile's amaxes: of rows to those in the scratch, of columns to `totals`, in an order in
// which the threads of half a warp lie side by side. No warp waits for another.
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

// `split` and a tile's cast are as in cast_tile.
template <Type out, bool split>
__global__ void __launch_bounds__(kThreads, Tile<kIn>::kBlocks)
    held_kernel(const CastTranspose q, const Walk walk, bool keeps) {
  __shared__ alignas(16) uint8_t turned[kEdge * kEdge];
  __shared__ alignas(16) float inverses[split ? kMostSplitTurns : 1][2 * kEdge];
  auto* const totals = reinterpret_cast<uint32_t*>(turned);
  const auto grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token zeroed{};
  if constexpr (split) {
    const int64_t words = q.batch * (q.rows + q.cols), step = int64_t{gridDim.x} * kThreads;
    for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words; i += step) {
      q.scratch[i] = 0;
    }
    zeroed = grid.barrier_arrive();
    for (int i = threadIdx.x; i < kMostSplitTurns * kEdge; i += kThreads) totals[i] = 0;
    __syncthreads();
  }
  const int turns = static_cast<int>((walk.tiles - 1 - blockIdx.x) / gridDim.x) + 1;
  const auto place = [&](int turn) {
    // Unknown to the compiler, or it takes all that follows from it out of the loops over turns,
    // for which there are no registers.
    int thread = static_cast<int>(threadIdx.x);
    asm volatile("" : "+r"(thread));
    return find_place(q, walk, kRows, blockIdx.x + static_cast<uint32_t>(turn) * gridDim.x, thread);
  };
  Amax<kIn> amax;
  const int kept_turn = keeps ? turns - 2 : -1;
  Packs packs;
  for (int turn = 0; turn < turns; ++turn) {
    const Place at = place(turn);
    load_tile<kIn, true>(q, at, packs);
    if constexpr (split) {
      if (turn == 0) grid.barrier_wait(std::move(zeroed));
      add_strips(q, at, packs, totals + turn * kEdge);
    } else {
#pragma unroll
      for (int i = 0; i < kRows; ++i) amax.take(packs[i]);
    }
    if (turn == kept_turn) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) Kept{at.thread}.put(i, packs[i]);
    }
  }
  float inverse = 0.0f;
  if constexpr (split) {
    __syncthreads();
    for (int i = threadIdx.x; i < turns * kEdge && q.transposed_scale != nullptr; i += kThreads) {
      const Place at = place(i / kEdge);
      const int column = i % kThreadsARow * kColumns + i % kEdge / kThreadsARow;
      if (at.rows > 0 && column < at.cols) {
        atomicMax(q.scratch + line_index(q, at, true, column), magnitude_bits<kIn>(totals[i]));
      }
    }
    grid.sync();
    uint32_t amaxes[kMostSplitTurns];
#pragma unroll
    for (int turn = 0; turn < kMostSplitTurns; ++turn) {
      amaxes[turn] = turn < turns ? known_amax(q, place(turn)) : 0;
    }
#pragma unroll
    for (int turn = 0; turn < kMostSplitTurns; ++turn) {
      if (turn < turns) split_inverses<out>(q, walk, place(turn), amaxes[turn], inverses[turn]);
    }
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
    if (turn == kept_turn) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) packs[i] = Kept{at.thread}[i];
    } else if (turn < turns - 1) {
      load_tile<kIn, true>(q, at, packs);
    }
    __syncthreads();  // The tile before has been stored, and inverses are known.
    if (at.rows > 0) {
      cast_tile<kIn, out, split, true, false>(q, walk, at, packs, inverse,
                                              inverses[split ? turn : 0], turned);
    }
  }
}

using Kernel = void (*)(CastTranspose, Walk, bool);

// Thread blocks on a multiprocessor.
cudaError_t resident(Kernel kernel, int bytes, int* blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, kThreads, bytes);
}

}  // namespace

cudaError_t cast_held(const CastTranspose& q, cudaStream_t stream) {
  // Each kernel takes room in the library: E5M2 is what gradients have, with tensor scales.
  const bool split = has_row_scales(q), e4m3 = q.data_type == Type::kE4M3;
  if (q.x_type != kIn || q.keys != nullptr || !loads_vectors(q) ||
      (split ? !e4m3 : q.entries != 1)) {
    return cudaErrorNotSupported;
  }
  const Kernel kernel = split  ? held_kernel<Type::kE4M3, true>
                        : e4m3 ? held_kernel<Type::kE4M3, false>
                               : held_kernel<Type::kE5M2, false>;
  int sms = 0, room = 0, blocks = 0, keeping = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &sms);
  if (error == cudaSuccess) {
    error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &room);
  }
  if (error == cudaSuccess) error = resident(kernel, 0, &blocks);
  if (error != cudaSuccess) return error;
  Walk walk = walk_of(q, 0);
  walk.reverse = false;
  const auto most = static_cast<uint32_t>(std::min(blocks * sms, kMaxParts));
  // Nor do the two waits for rows and columns pay where there are few tiles.
  const uint32_t least = split ? most / 2 : 1, turns = split ? kMostSplitTurns : kMostTurns;
  if (walk.tiles < least || walk.tiles > turns * most) return cudaErrorNotSupported;
  if (walk.tiles > most && room >= kTileBytes + kEdge * kEdge + 4096) {
    // The same for all calls, which several threads may make at once.
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTileBytes);
    if (error == cudaSuccess) error = resident(kernel, kTileBytes, &keeping);
    if (error != cudaSuccess) return error;
  }
  bool keeps = keeping == blocks;  // More of them are worth more than what they keep.
  CastTranspose copy = q;
  void* arguments[] = {&copy, &walk, &keeps};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel),
                                     dim3(std::min(walk.tiles, most)), dim3(kThreads), arguments,
                                     keeps ? kTileBytes : 0, stream);
}

}  // namespace jax_fp8
