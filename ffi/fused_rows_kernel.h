// The kernel of fused_rows.cu: rows in registers, each read once, while the one before is worked
// on.
#pragma once

#include <cooperative_groups.h>

#include <type_traits>
#include <utility>

#include "ffi/follow.h"
#include "ffi/fused_kernels.h"

namespace jax_fp8::fused {
namespace {

// Threads of a block at most, so that the registers suffice.
template <typename Producer>
constexpr int most_threads(int packs) {
  return packs < 4 ? 1024 : Producer::kCentered ? 768 : 896;
}

// A value that stays in its register: the compiler would rather compute it again than keep it.
__device__ inline float in_register(float value) {
  asm volatile("" : "+f"(value));
  return value;
}

// What a thread block keeps of its rows in shared memory while a tensor's amax comes about, one row
// a turn: of each the (mean, factor) of its norm, and of the first `turns` of them what was read.
struct Kept {
  int turns, packs_at;  // The packs begin at that byte.

  __device__ static unsigned char* memory() {
    extern __shared__ __align__(16) unsigned char bytes[];
    return bytes;
  }
  __device__ float2& norm_of(int turn) const { return reinterpret_cast<float2*>(memory())[turn]; }
  // For each 16 bytes of a thread's `count` packs. Threads lie side by side, to meet no bank twice.
  template <typename Packs, typename Body>
  __device__ void each(int turn, int part, int parts, Packs& packs, Body body) const {
    constexpr int count = sizeof(packs) / sizeof(uint4);
    auto* const slots = reinterpret_cast<uint4*>(memory() + packs_at) +
                        (turn * parts + part) * count * blockDim.x + threadIdx.x;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      body(reinterpret_cast<uint4*>(&packs)[i], slots[i * blockDim.x]);
    }
  }
};

// blockDim = (threads of a row, rows of a block), the threads being whole warps. Column c of the
// result is in pack c / 8, which thread pack % blockDim.x has. The blocks along x share the rows;
// those along y, each with columns of its own, are for passes that need not know a row whole.
// While one row is worked on, the next one is on its way into registers.
//
// Regular: one batch entry, threads * packs packs in each row, a row for each block, weights of x's
// type, and E4M3 of the `known` pass. To know this takes a third of the instructions away. Other
// kernels are told the pass, but for kHeld; kTwice, with kAmax in it, is of regular rows alone.
template <typename Producer, Type in, int packs, bool regular, Pass known>
__device__ __forceinline__ void run_rows(const Fused& f, Pass asked,
                                         [[maybe_unused]] const Kept& kept) {
  constexpr bool of_tensor = known == Pass::kAmax || known == Pass::kHeld;
  const Pass pass = regular || of_tensor ? known : asked;
  using T = typename Native<in>::type;
  const int rows = static_cast<int>(f.batch * f.rows), cols = static_cast<int>(f.cols);
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = (blockIdx.y * packs * blockDim.x + threadIdx.x) * kWidth;
  const int reach = blockDim.x * kWidth;  // From one pack of a thread to its next.
  const auto has = [&](int p) { return regular || column + p * reach < cols; };
  const float share = 1.0f / static_cast<float>(cols);
  const Type data_type = regular ? Type::kE4M3 : f.data_type;
  const bool of_row = !of_tensor && (pass == Pass::kRow || pass == Pass::kAmax);
  // Twice, so that a warp may begin with the next row while another still reads.
  __shared__ float sum_parts[2][2][kMaxGroups];
  __shared__ uint32_t amax_parts[2][kWarp];

  const int rows_grid = gridDim.x * (regular ? 1 : blockDim.y);  // Of all blocks together.
  const int own_row = regular ? 0 : threadIdx.y;                 // Of those of the block.
  const int turn = blockIdx.x * (regular ? 1 : blockDim.y) + own_row;
  int row = turn;
  int64_t at = int64_t{row} * cols + column;
  const int64_t step_at = int64_t{rows_grid} * cols;

  Pack<in, kWidth> first[packs] = {}, second[packs] = {};
  const auto fetch = [&](int64_t at) {
    const T* x = static_cast<const T*>(f.x) + Producer::kParts * at;
    if constexpr (Producer::kParts == 2) x -= column;
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if (!has(p)) continue;
      first[p].load(x + p * reach);
      if constexpr (Producer::kParts == 2) second[p].load(x + cols + p * reach);
      if constexpr (Producer::kResidual) {
        second[p].load(static_cast<const T*>(f.residual) + at + p * reach);
      }
    }
  };
  const auto is_row = [&](int row) {
    return static_cast<unsigned>(row) < static_cast<unsigned>(rows);
  };
  wait_for_kernel_in_front();
  if (is_row(row)) fetch(at);
  let_follow();  // Not before: what follows would read ahead of these.

  // The columns of a thread are the same in all rows.
  constexpr bool holds_weights =
      regular && Producer::kNorm && !Producer::kCentered && !Producer::kResidual && !of_tensor;
  [[maybe_unused]] Pack<in, kWidth> weight_packs[holds_weights ? packs : 1];
  if constexpr (holds_weights) {
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      weight_packs[p].load(static_cast<const T*>(f.weight) + column + p * reach);
    }
  }

  // All amaxes begin at zero. That this is so is not waited for before the first one is known.
  const auto grid = cooperative_groups::this_grid();
  cooperative_groups::grid_group::arrival_token zeroed{};
  [[maybe_unused]] float largest = 0.0f;  // Of this thread's values, in all rows.
  [[maybe_unused]] int done = 0;          // Turns.
  if constexpr (of_tensor) {
    const int own = threadIdx.y * blockDim.x + threadIdx.x;
    for (int64_t i = own; i < f.batch && blockIdx.x + blockIdx.y == 0;
         i += blockDim.x * blockDim.y) {
      f.amax[i] = 0.0f;
    }
    zeroed = grid.barrier_arrive();
  }
  // Of all that the row's threads have seen so far. All threads of the block call.
  const auto tell_amax = [&](int entry, int parity, bool tells) {
    put_amax(largest, amax_parts[parity] + own_row * warps);
    __syncthreads();
    largest = get_amax(amax_parts[parity] + own_row * warps);
    if (tells && threadIdx.x == 0) amax_to_memory(f, entry, largest);
    largest = 0.0f;
  };

  // All rows of a block take as many turns.
  int turns = (rows - 1 - static_cast<int>(blockIdx.x * blockDim.y)) / rows_grid + 1;
  for (int parity = 0; turns > 0; --turns, row += rows_grid, at += step_at, parity ^= 1) {
    const bool inside = regular || is_row(row);
    const int entry = regular || f.batch == 1 || !inside ? 0 : row / static_cast<int>(f.rows);

    float values[packs][kWidth];
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      if constexpr (Producer::kResidual) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[p][e] = first[p][e] + second[p][e];
        first[p] = make_pack<in>(values[p]);
        if (inside && has(p)) store_pack(static_cast<T*>(f.sum) + at + p * reach, first[p]);
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[p][e] = Producer::value(first[p][e], Producer::kParts == 2 ? second[p][e] : 0.0f);
      }
    }
    constexpr bool by_order = known == Pass::kAmax && std::is_same_v<Producer, Gelu>;
    if constexpr (by_order) largest = gelu_amax(first, largest);  // Without `values`.
    if constexpr (known == Pass::kAmax) {
      if (done < kept.turns) {
        const auto put = [](const uint4& own, uint4& slot) { slot = own; };
        kept.each(done, 0, Producer::kParts, first, put);
        if constexpr (Producer::kParts == 2) kept.each(done, 1, 2, second, put);
      }
    }
    if (known != Pass::kHeld && is_row(row + rows_grid)) fetch(at + step_at);

    // What is reduced before the factor of a norm is known: a factor that is not negative, and
    // rounding, leave the order of magnitudes as it is.
    float mean = 0.0f, factor = 1.0f, amax = 0.0f;
    const auto take_amax = [&] {
      amax = pack_amax(values[0]);
#pragma unroll
      for (int p = 1; p < packs; ++p) amax = Larger()(amax, pack_amax(values[p]));
      if (!of_tensor) put_amax(amax, amax_parts[parity] + own_row * warps);
    };
    if constexpr (Producer::kNorm) {
      const auto row_sum = [&](int which, const float (&of_packs)[packs]) {
        float sums[packs];
#pragma unroll
        for (int p = 0; p < packs; ++p) sums[p] = of_packs[p];
        const float sum = lanes_combine<kWarp>(sums, Add());
        float* parts = sum_parts[parity][which] + own_row * packs * warps;
        if (lane % (kWarp / packs) == 0) parts[lane / (kWarp / packs) * warps + warp] = sum;
        __syncthreads();
        return combine_groups<packs>(parts, packs * warps);
      };
      float sums[packs];
      if constexpr (Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) sums[p] = pack_total(values[p]);
        mean = __fmul_rn(share, row_sum(0, sums));
#pragma unroll
        for (int p = 0; p < packs; ++p) {
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
            values[p][e] = has(p) ? in_register(values[p][e] - mean) : 0.0f;
          }
        }
      }
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        sums[p] = has(p) ? pack_moment<Producer>(values[p], 0.0f, kWidth) : 0.0f;
      }
      const int64_t place = int64_t{entry} * f.weight_stride + column;
      if constexpr (!Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) {
          if (!has(p)) continue;
          float weights[kWidth];
          if constexpr (holds_weights) {
#pragma unroll
            for (int e = 0; e < kWidth; ++e) weights[e] = weight_packs[p][e];
          } else {
            load_weights<true, regular, in>(f.weight, f.weight_type, place + p * reach, kWidth,
                                            weights);
          }
#pragma unroll
          for (int e = 0; e < kWidth; ++e)
            values[p][e] = in_register(__fmul_rn(values[p][e], weights[e]));
        }
        if (of_row || of_tensor) take_amax();
      }
      factor = reciprocal_deviation(__fmul_rn(share, row_sum(1, sums)), f.eps);
      if constexpr (Producer::kCentered) {
#pragma unroll
        for (int p = 0; p < packs; ++p) {
          if (!has(p)) continue;
          shift_and_scale<true, regular, in>(f, place + p * reach, kWidth, 0.0f, factor, values[p]);
        }
        if constexpr (known != Pass::kAmax) factor = 1.0f;
      }
    }
    constexpr bool late = !Producer::kNorm || Producer::kCentered;
    const auto store = [&](int p, float inverse) {
      if (!late) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) values[p][e] = __fmul_rn(values[p][e], factor);
      }
      if constexpr (regular) {
        store_codes<Type::kE4M3, known == Pass::kGiven>(f.data + at + p * reach, values[p],
                                                        inverse);
      } else if (inside && has(p)) {
        store_codes(f, at + p * reach, values[p], inverse);
      }
    };

    const bool strips = pass == Pass::kStrips || (pass == Pass::kGiven && f.block_cols != 0);
    if (strips) {
      constexpr int share_lanes = kStrip / packs;  // Lanes with the scale of one pack.
      const int own = column + lane % kStrip / share_lanes * reach;  // In the strip of that pack.
      const bool has_own = inside && own - lane % kStrip * kWidth < cols;
      const int64_t place = int64_t{row} * ((cols + 127) / 128) + own / 128;
      float scale = 0.0f;
      if (pass == Pass::kStrips) {
        float amaxes[packs];
#pragma unroll
        for (int p = 0; p < packs; ++p) amaxes[p] = pack_amax(values[p]);
        scale = dynamic_scale(lanes_combine<kStrip>(amaxes, Larger()) * factor, data_type);
      } else if (has_own) {
        scale = f.given[place];
      }
      if (has_own && lane % share_lanes == 0) f.scale[place] = scale;
      const float inverse = inverse_scale(scale);
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        store(p, __shfl_sync(0xffffffffu, inverse, p * share_lanes, kStrip));
      }
      continue;
    }

    if constexpr (of_tensor) {
      if constexpr (late && !by_order) take_amax();
      if (!by_order && inside) largest = Larger()(largest, late ? amax : amax * factor);
      if constexpr (known == Pass::kAmax) {
        if (Producer::kNorm && threadIdx.x == 0) kept.norm_of(done) = {mean, factor};
        ++done;
        continue;
      }
      grid.barrier_wait(std::move(zeroed));  // There is one turn.
      tell_amax(entry, parity, inside);
      grid.sync();
    }
    float scale = 0.0f;
    if (of_row) {
      if constexpr (late) {
        take_amax();
        __syncthreads();
      }
      amax = get_amax(amax_parts[parity] + own_row * warps) * factor;
      if (!regular && pass == Pass::kAmax) {
        if (inside && threadIdx.x == 0) amax_to_memory(f, entry, amax);
        continue;
      }
      scale = dynamic_scale(amax, data_type);
    } else if (inside) {
      scale = known_scale(f, of_tensor ? Pass::kTensor : pass, entry, row);
    }
    if (inside && threadIdx.x == 0 && blockIdx.y == 0) store_scale(f, entry, row, scale);
    const float inverse = inverse_scale(scale);
#pragma unroll
    for (int p = 0; p < packs; ++p) store(p, inverse);
  }
  if constexpr (known == Pass::kAmax) {
    grid.barrier_wait(std::move(zeroed));
    tell_amax(0, 0, true);
  }
}

// The second pass of a dynamic tensor scale, over the rows that run_rows has measured. Those that
// were read last come first: what is not kept may still be in the L2 cache.
template <typename Producer, Type in, int packs>
__device__ __forceinline__ void cast_rows(const Fused& f, const Kept& kept) {
  using T = typename Native<in>::type;
  const int rows = static_cast<int>(f.rows), cols = static_cast<int>(f.cols);
  const int column = (blockIdx.y * packs * blockDim.x + threadIdx.x) * kWidth;
  const int reach = blockDim.x * kWidth;
  const int first_row = blockIdx.x, rows_grid = gridDim.x;
  const T* const source = static_cast<const T*>(Producer::kResidual ? f.sum : f.x);

  const float scale = known_scale(f, Pass::kTensor, 0, 0), inverse = inverse_scale(scale);
  if (first_row == 0 && threadIdx.x == 0 && blockIdx.y == 0) store_scale(f, 0, 0, scale);
  for (int turn = (rows - 1 - first_row) / rows_grid; turn >= 0; --turn) {
    const int row = first_row + turn * rows_grid;
    const int64_t at = int64_t{row} * cols + column;
    Pack<in, kWidth> first[packs] = {}, second[packs] = {};
    if (turn < kept.turns) {
      const auto get = [](uint4& own, const uint4& slot) { own = slot; };
      kept.each(turn, 0, Producer::kParts, first, get);
      if constexpr (Producer::kParts == 2) kept.each(turn, 1, 2, second, get);
    } else {
      const T* const x = source + at + (Producer::kParts == 2 ? int64_t{row} * cols : 0);
#pragma unroll
      for (int p = 0; p < packs; ++p) {
        first[p].load(x + p * reach);
        if constexpr (Producer::kParts == 2) second[p].load(x + cols + p * reach);
      }
    }
    const float2 norm = Producer::kNorm ? kept.norm_of(turn) : float2{};
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      float values[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        values[e] = Producer::value(first[p][e], Producer::kParts == 2 ? second[p][e] : 0.0f);
      }
      if constexpr (Producer::kNorm && Producer::kCentered) {
        shift_and_scale<true, true, in>(f, column + p * reach, kWidth, norm.x, norm.y, values);
      } else if constexpr (Producer::kNorm) {
        float weights[kWidth];
        load_weights<true, true, in>(f.weight, f.weight_type, column + p * reach, kWidth, weights);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          values[e] = __fmul_rn(__fmul_rn(values[e], weights[e]), norm.y);
        }
      }
      store_codes<Type::kE4M3, false>(f.data + at + p * reach, values, inverse);
    }
  }
}

template <typename Producer, Type in, int packs, bool regular, Pass known>
__global__ void __launch_bounds__(most_threads<Producer>(packs))
    row_kernel(Fused f, Pass pass, Kept kept) {
  if constexpr (known == Pass::kTwice) {
    run_rows<Producer, in, packs, regular, Pass::kAmax>(f, pass, kept);
    cooperative_groups::this_grid().sync();
    cast_rows<Producer, in, packs>(f, kept);
  } else {
    run_rows<Producer, in, packs, regular, known>(f, pass, kept);
  }
}

}  // namespace
}  // namespace jax_fp8::fused
