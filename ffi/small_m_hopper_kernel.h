// The kernel of small_m_hopper.h, its sizes, and the copies and products that it is made of.
#pragma once

#include "ffi/finish.h"
#include "ffi/follow.h"
#include "ffi/fused.h"
#include "ffi/hopper.h"
#include "ffi/small_m_device.h"
#include "ffi/small_m_hopper_row.h"

namespace jax_fp8 {
namespace {

// Of what was tried on an H100, these sizes came closest to a plain read of W.
constexpr int kGroups = 4;  // Warpgroups that multiply; one more finishes.
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kTileRows = 32;  // Of W.
constexpr int kChunk = 256;    // Codes of a row that a group takes at once.
constexpr int kSlot = kTileRows * kChunk;
constexpr int kStride = kTileRows + 4;  // Between columns of sums, so that no bank is met twice.
constexpr int kBuffers = 2;             // For the sums of tiles.
// Of shared memory; the rest is for barriers and, where the kernel quantizes X, for that.
constexpr int kMostBytes = (227 << 10) - 1024, kMostBytesQuantizing = kMostBytes - 1024;
constexpr int kMostSplits = 4;        // Thread blocks that share the K of a tile.
constexpr int kMostXQuantizing = 14;  // Slots of X there, for K up to 14336, which was tried.

// Chunks of W that a group has on their way, bytes of X that belong to one, and floats of a group's
// sums, for so many columns of X.
__host__ __device__ constexpr int depth_of(int columns) { return columns == 8 ? 3 : 2; }
__host__ __device__ constexpr int x_chunk(int columns) { return kChunk * columns; }
__host__ __device__ constexpr int sums_of_group(int columns) { return columns * kStride; }

// Bytes of shared memory without X, and the chunks of X that each group can have beside them.
__host__ __device__ constexpr int bytes_without_x(int columns) {
  return kGroups * (depth_of(columns) * kSlot + kBuffers * sums_of_group(columns) * 4);
}
__host__ __device__ constexpr int most_x_slots(int columns) {
  return (kMostBytes - bytes_without_x(columns)) / (kGroups * x_chunk(columns));
}

#if __CUDA_ARCH__ == 900
// --- Copies and products -------------------------------------------------------------------------

// 16 bytes into shared memory, or as many zeros.
__device__ void copy_pack(uint32_t target, const uint8_t* source, bool exists, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(target),
               "l"(source), "r"(exists ? 16 : 0), "l"(policy)
               : "memory");
}
__device__ void commit_packs() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `pending` of this thread's committed groups are still on their way.
template <int pending>
__device__ void wait_for_packs() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Where a pack of 16 codes lies in a slot, so that neither copies nor fragments meet a bank twice.
__device__ int place(int row, int pack) { return row * kChunk + (pack ^ row % 8) * 16; }

// As `store`, of what leaves the L2 cache as early as W. D of many calls would fill it otherwise,
// and what streams through would be left with little of it: 3 % at 16 rows.
__device__ void store_for_once(const Product& p, float value, int64_t index, uint64_t policy) {
  if (p.d_type != Type::kBF16) {
    store(p, value, index);
    return;
  }
  const __nv_bfloat16 rounded = __float2bfloat16(value);
  asm volatile(
      "st.global.L2::cache_hint.u16 [%0], %1, %2;" ::"l"(static_cast<__nv_bfloat16*>(p.d) + index),
      "h"(__bfloat16_as_ushort(rounded)), "l"(policy)
      : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, whose rows of 16 bytes are where the lanes say.
__device__ void load_matrices(uint32_t (&a)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(address)
               : "memory");
}

// d (64 x 2 * size of d, f32) = [d +] a (64 x 32 codes, in registers) times b (32 codes x the
// columns of d, described). Asynchronous, as those of hopper.h.
template <bool add>
__device__ void multiply(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %13, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3"
      " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, p, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0));
}
template <bool add>
__device__ void multiply(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3"
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15},"
      " {%16, %17, %18, %19}, %20, p, 1, 1;\n}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
        "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(add ? 1 : 0));
}

#endif

// --- The kernel ----------------------------------------------------------------------------------

// Blocks go through tiles of rows, every so many-th one. Within a block, groups take the chunks of
// K in turns. W streams through a ring of each group's own, whose warps wait for nobody but the
// memory. So does X, but that it stays where the ring has room for all that its group takes; where
// it does not, one warp waits for the others before it copies into what they have read. The sums of
// a tile meet in shared memory, where the last group adds them up while the others are in the tiles
// after it.
//
// Memory is at its best where 256 bytes of a row are read at once. An mma has 64 rows: these are 32
// rows of W, twice, each half of a chunk for itself; likewise its columns are the columns of X, for
// the first half and for the second. A half of its sums are of halves that do not belong together.
// A warp has 8 rows of W. Rows i and i + 8 of its mma are the halves of row i, so that one thread
// gets the sums of both; the first half comes first where i < 4, so that loads meet no bank twice.
//
// The tensor cores' sums have few bits: a thread adds them up in float32 after 128 products.
//
// Where there are few tiles, the blocks of a cluster share the K of one: their groups take its
// chunks in turns, and the first block gets the sums of the others and finishes.
//
// For a SwiGLU a tile is 16 rows of gates and the 16 that go with them, 16 columns of D.
//
// Where it `follows` the kernel that writes X, it starts and copies the first of W while that one
// runs. It lets another follow in the same way. What it `quantizes` is a row of bfloat16.
template <int columns, bool x_stays, bool quantizes, bool shares>
__global__ void __launch_bounds__(kThreads)
    small_m_hopper_kernel(Product p, bool follows, int blocks_of_tile, int x_slots,
                          const __grid_constant__ CUtensorMap x_map) {
#if __CUDA_ARCH__ == 900
  constexpr int kDepth = depth_of(columns), kXChunk = x_chunk(columns),
                kSums = sums_of_group(columns);
  extern __shared__ __align__(1024) uint8_t memory[];
  constexpr int kMostSlots = most_x_slots(columns);
  __shared__ uint64_t x_full_barriers[kGroups][kMostSlots], x_read_barriers[kGroups][kMostSlots];
  __shared__ uint64_t sums_read_barriers[kBuffers];
  static_assert((kMostSplits - 1) * columns / 4 * 128 <= kGroups * kSums && kBuffers > 1);
  static_assert(sizeof(x_full_barriers) + sizeof(x_read_barriers) + sizeof(sums_read_barriers) <=
                (227 << 10) - kMostBytes);

  const int thread = static_cast<int>(threadIdx.x), group = thread / 128, lane = thread % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int k_size = static_cast<int>(p.k), m_size = static_cast<int>(p.m);
  const int d_columns = static_cast<int>(p.d_columns());
  const int tile_columns = p.swiglu ? kTileRows / 2 : kTileRows;
  const int splits = shares ? blocks_of_tile : 1;  // Else known when it is compiled.
  const int split = static_cast<int>(blockIdx.x) % splits, takers = kGroups * splits;
  const int first_n = static_cast<int>(blockIdx.x) / splits * tile_columns;
  const int step_n = static_cast<int>(gridDim.x) / splits * tile_columns;
  const int chunks = (k_size + kChunk - 1) / kChunk;
  const uint32_t x_memory = hopper::shared_address(memory);
  const uint32_t ring = x_memory + kGroups * x_slots * kXChunk;
  float* const sums_memory =
      reinterpret_cast<float*>(memory + kGroups * (x_slots * kXChunk + kDepth * kSlot));
  const uint32_t sums_read = hopper::shared_address(sums_read_barriers);

  // The chunks of K that a group takes, one a round.
  const int taker = group < kGroups ? group : thread / 32 % 4;
  const int first_chunk = split * kGroups + taker;
  const int own_rounds = chunks > first_chunk ? (chunks - first_chunk + takers - 1) / takers : 0;

  // W: 16 threads copy the chunk of a row, and of every second row after it.
  const int warp_row = thread % 128 / 32 * 8, own_row = warp_row + lane / 16;
  const int own_k = first_chunk * kChunk + lane % 16 * 16;
  const uint32_t own_ring = ring + taker * (kDepth * kSlot);
  const uint64_t policy = policy_read_once();
  const bool is_up_row = p.swiglu && warp_row >= kTileRows / 2;  // What goes with the gates.
  int fetch_n = first_n + own_row - (is_up_row ? kTileRows / 2 : 0), fetch_k = own_k;
  const uint8_t* w = p.w.data + (b * p.n + fetch_n + (is_up_row ? d_columns : 0)) * k_size;
  const auto fetch = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = fetch_k < k_size && fetch_n + 2 * i < d_columns;
      const uint8_t* const source = w + 2 * i * int64_t{k_size} + fetch_k;
      copy_pack(own_ring + slot * kSlot + place(own_row + 2 * i, lane % 16),
                exists ? source : p.w.data, exists, policy);
    }
    commit_packs();
    fetch_k += takers * kChunk;
    if (fetch_k >= own_k + own_rounds * takers * kChunk) {
      fetch_k = own_k;
      fetch_n += step_n;
      w += step_n * int64_t{k_size};
    }
  };

  // X: a group has slots for so many of its chunks.
  const int own_x = taker * x_slots;  // The first of its slots.
  const uint32_t x_full = hopper::shared_address(x_full_barriers[taker]);
  const uint32_t x_read = hopper::shared_address(x_read_barriers[taker]);
  const auto copy_x = [&](int slot, int round) {
    hopper::barrier_expect(x_full + 8 * slot, kXChunk);
    for (int half = 0; half < 2; ++half) {
      hopper::copy_in(x_memory + (own_x + slot) * kXChunk + half * (kXChunk / 2), x_map,
                      x_full + 8 * slot,
                      (round * takers + first_chunk) * kChunk + half * (kChunk / 2), 0, b);
    }
  };

  // X goes behind the first of W, but not behind all, whose queue is long. The last group asks for
  // it, a warp for each of the others, which go on with W meanwhile.
  let_follow();
  if (shares) hopper::cluster_arrive();
  constexpr int all_packs = kGroups * kMostXQuantizing * kChunk / fused::kWidth;
  [[maybe_unused]] RowOfBlock<kThreads, (all_packs + kThreads - 1) / kThreads> own_x_row;
  if (quantizes && !follows) {  // Ahead of all of W, for it is there already.
    own_x_row.load_row(p);
    own_x_row.load_weights(p);
  }
  const int first_slots = quantizes ? 0 : min(own_rounds, x_slots);
  const int early_slots = min(first_slots, 2);
  if (group < kGroups) {
#pragma unroll
    for (int slot = 0; slot < kDepth - 1; ++slot) fetch(slot);
  } else {
    if (lane == 0) {
      if (taker == 0) {
        if (!quantizes) hopper::prefetch_map(x_map);
        for (int i = 0; i < kBuffers; ++i) hopper::barrier_init(sums_read + 8 * i, 128);
      }
      for (int slot = 0; slot < x_slots; ++slot) {
        hopper::barrier_init(x_full + 8 * slot, 1);
        hopper::barrier_init(x_read + 8 * slot, 4);  // Warps.
      }
      hopper::barrier_init_fence();
    }
    if (!quantizes) wait_for_kernel_in_front();
    if (lane == 0) {
      hopper::copy_out_fence();
      for (int slot = 0; slot < early_slots; ++slot) copy_x(slot, slot);
    }
  }
  [[maybe_unused]] float own_scale = 0.0f;
  if constexpr (quantizes) {
    // As copies would have left it: the first of each eight rows, whose order no swizzle changes.
    const auto codes_at = [&](int k) {
      const int chunk = k / kChunk, half = k % kChunk / (kChunk / 2);
      return memory + (chunk % kGroups * x_slots + chunk / kGroups) * kXChunk +
             half * (kXChunk / 2) + k % (kChunk / 2);
    };
    if (follows) {
      own_x_row.load_weights(p);
      wait_for_kernel_in_front();
      own_x_row.load_row(p);
    }
    own_scale = own_x_row.template quantize<kChunk>(p, codes_at);
    hopper::copy_out_fence();  // The tensor cores read as the copy engine does.
  }
  __syncthreads();

  // The tile of a turn has one of the buffers.
  if (group == kGroups) {
    const int row = thread % kTileRows, first_m = thread % 128 / kTileRows;
    const bool is_up = p.swiglu && row >= kTileRows / 2;
    float x_scales[columns / 4], largest = 0.0f;
    if (lane == 0) {
      for (int slot = early_slots; slot < first_slots; ++slot) copy_x(slot, slot);
    }
    __syncwarp();
    const float codes_inverse = p.codes != nullptr ? inverse_scale(*p.codes_scale) : 0.0f;
#pragma unroll
    for (int i = 0; i < columns / 4; ++i) {
      const int m = first_m + 4 * i;
      x_scales[i] = quantizes ? own_scale : m < m_size ? p.x.scale_at(b, m, 0) : 0.0f;
    }
    int turn = 0;
    for (int tile_n = first_n; tile_n < d_columns; tile_n += step_n, ++turn) {
      const int buffer = turn % kBuffers;
      const int column = tile_n + row - (is_up ? kTileRows / 2 : 0);  // Of D.
      const int n = column + (is_up ? d_columns : 0);
      const float w_scale = column < d_columns ? p.w.scale_at(b, n, 0) : 0.0f;
      const float* const sums = sums_memory + buffer * kGroups * kSums + first_m * kStride + row;
      float totals[columns / 4] = {};
      hopper::threads_sync(1 + buffer, kThreads);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
#pragma unroll
        for (int i = 0; i < columns / 4; ++i) totals[i] += sums[g * kSums + 4 * i * kStride];
      }
      hopper::barrier_arrive(sums_read + 8 * buffer);
      if (shares) {  // The only tile: the other buffer is free.
        float* const others = sums_memory + kGroups * kSums + thread % 128;
        hopper::cluster_wait();  // All blocks run: their memory can be written.
#pragma unroll
        for (int i = 0; i < columns / 4; ++i) {
          if (split == 0) break;
          float* const place = others + ((split - 1) * (columns / 4) + i) * 128;
          hopper::store_remote(hopper::shared_address(place), 0, totals[i]);
        }
        hopper::cluster_sync();
        if (split > 0) break;
        for (int other = 0; other < splits - 1; ++other) {
#pragma unroll
          for (int i = 0; i < columns / 4; ++i) {
            totals[i] += others[(other * (columns / 4) + i) * 128];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < columns / 4; ++i) {
        const int m = first_m + 4 * i;
        const bool exists = m < m_size && column < d_columns;
        float value = apply_scales(totals[i], x_scales[i], w_scale);
        if (exists) value = finish(p, value, n);
        if (p.swiglu) value = silu(value) * __shfl_down_sync(0xffffffffu, value, kTileRows / 2);
        if (!exists || is_up) continue;
        const int64_t index = (int64_t{b} * m_size + m) * d_columns + column;
        if (p.residual != nullptr) value += __bfloat162float(p.residual[index]);
        store_for_once(p, value, index, policy);
        if (p.codes != nullptr) {
          const float rounded = __bfloat162float(__float2bfloat16(value));
          p.codes[index] = quantize_value<Type::kE4M3>(rounded, codes_inverse);
        }
        largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
      }
    }
    if (p.amax != nullptr) amax_to_memory(p.amax, largest);
  } else {
    fetch(kDepth - 1);
    const uint64_t x_matrix = hopper::matrix_descriptor(x_memory);
    // The row of 16 bytes that this lane tells of the first matrices.
    const int row = lane % 8, half = row / 4 ^ lane / 8 % 2;
    const uint32_t fragment = own_ring + place(warp_row + row, half * 8 + lane / 16);
    const bool is_swapped = lane >= 16;  // Its rows of an mma are second half and first.
    int turn = 0, slot = 0;
    [[maybe_unused]] int x_slot = 0, x_parity = 0;
    // The round that X is copied for next, and how often, from here on.
    [[maybe_unused]] int refill = x_slots < own_rounds ? x_slots : 0;
    [[maybe_unused]] int refills = ((d_columns - 1 - first_n) / step_n + 1) * own_rounds - x_slots;
    for (int tile_n = first_n; tile_n < d_columns; tile_n += step_n, ++turn) {
      float sums[columns / 4] = {};
      for (int round = 0; round < own_rounds; ++round) {
        wait_for_packs<kDepth - 1>();
        __syncwarp();
        if constexpr (x_stays) x_slot = round;
        if (!quantizes && (turn == 0 || !x_stays)) {
          hopper::barrier_wait(x_full + 8 * x_slot, x_parity);
        }
        uint32_t a[4][4];
#pragma unroll
        for (int i = 0; i < 4; ++i) load_matrices(a[i], (fragment + slot * kSlot) ^ i * 32);
        // In units of 16 bytes.
        const uint64_t matrix = x_matrix + (own_x + x_slot) * (kXChunk / 16);
        float products[columns];
        hopper::multiply_fence();
        multiply<false>(products, a[0], matrix);
#pragma unroll
        for (int i = 1; i < 4; ++i) multiply<true>(products, a[i], matrix + 2 * i);
        hopper::multiply_commit();
        __syncwarp();
        fetch(slot);
        if (++slot == kDepth) slot = 0;
        hopper::multiply_wait<0>();
#pragma unroll
        for (int i = 0; i < columns / 8; ++i) {
          const float* const first = products + 4 * i;  // Sums of the columns of the first half.
          const float* const second = first + columns / 2;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            sums[2 * i + j] += is_swapped ? first[2 + j] : first[j];
            sums[2 * i + j] += is_swapped ? second[j] : second[2 + j];
          }
        }
        if constexpr (!x_stays) {
          if (lane == 0) hopper::barrier_arrive(x_read + 8 * x_slot);
          // The slot of the round before, which the other warps will have read.
          const int before = x_slot > 0 ? x_slot - 1 : x_slots - 1;
          if (thread % 128 == 0 && refills > 0 && turn + round > 0) {
            hopper::barrier_wait(x_read + 8 * before, x_parity ^ (x_slot == 0));
            copy_x(before, refill);
            --refills;
            if (++refill == own_rounds) refill = 0;
          }
          if (++x_slot == x_slots) x_slot = 0, x_parity ^= 1;
        }
      }

      const int buffer = turn % kBuffers;
      hopper::barrier_wait(sums_read + 8 * buffer, turn / kBuffers % 2 ^ 1);
      float* const own = sums_memory + (buffer * kGroups + group) * kSums + lane % 4 * 2 * kStride +
                         warp_row + lane / 4;
#pragma unroll
      for (int i = 0; i < columns / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) own[(8 * i + j) * kStride] = sums[2 * i + j];
      }
      hopper::threads_arrive(1 + buffer, kThreads);
    }
    wait_for_packs<0>();  // Zeros, of tiles that do not exist.
    if (shares) {
      hopper::cluster_wait();
      hopper::cluster_sync();
    }
  }
#endif
}

}  // namespace
}  // namespace jax_fp8
