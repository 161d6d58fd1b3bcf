#include <algorithm>

#include "ffi/finish.h"
#include "ffi/hopper.h"
#include "ffi/small_m_device.h"
#include "ffi/small_m_hopper.h"
#include "ffi/tensor_map.h"

namespace jax_fp8 {
namespace {

// Of what was tried on an H100, these sizes came closest to a plain read of W.
constexpr int kGroups = 4;  // Warpgroups that multiply; one more finishes.
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kTileRows = 32;  // Of W.
constexpr int kChunk = 256;    // Codes of a row that a group takes at once.
constexpr int kSlot = kTileRows * kChunk;
constexpr int kMaxRounds = 16;          // Of chunks, in a tile.
constexpr int kStride = kTileRows + 4;  // Between columns of sums, so that no bank is met twice.
constexpr int kMaxRanks = 4;            // Blocks of a cluster.
constexpr int kMostBytes = (227 << 10) - 1024;  // Of shared memory; the rest is for barriers.

// Chunks of W that a group has on their way, bytes of X that belong to one, and floats of a group's
// sums, for so many columns of X.
__host__ __device__ constexpr int depth_of(int columns) { return columns == 8 ? 3 : 2; }
__host__ __device__ constexpr int x_chunk(int columns) { return kChunk * columns; }
__host__ __device__ constexpr int sums_of_group(int columns) { return columns * kStride; }

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
__device__ int place(int row, int pack) {
  return row * kChunk + (pack / 8 * 8 + (pack % 8 ^ (row % 4 * 2 + pack / 8))) * 16;
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

// --- Between the blocks of a cluster -------------------------------------------------------------

// In the shared memory of block `rank`, what is at `address` in this one's.
__device__ uint32_t address_in(uint32_t address, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Counts as 4 bytes at a barrier of the block that it stores to.
__device__ void store_in(uint32_t remote, float value, uint32_t remote_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
          remote),
      "r"(float_bits(value)), "r"(remote_barrier)
      : "memory");
}
#endif

// --- The kernel ----------------------------------------------------------------------------------

struct Split {
  int tiles;   // Of rows of W.
  int chunks;  // Of K, in each block of a cluster.
};

// The blocks of a cluster share K; clusters go through tiles of rows, every so many-th one. Within
// a block, groups take the chunks of K in turns. A group keeps the X that its chunks need, which
// comes but once, and W streams through a ring of its own: its warps wait for nobody but the
// memory. The sums of a tile meet in the shared memory of one block, where the last group adds them
// up while the others are in the tiles after it.
//
// Memory is at its best where 256 bytes of a row are read at once. An mma has 64 rows: these are 32
// rows of W, twice, each half of a chunk for itself; likewise its columns are the columns of X, for
// the first half and for the second. A half of its sums are of halves that do not belong together.
//
// The tensor cores' sums have few bits: a thread adds them up in float32 after 128 products.
template <int columns, bool clustered>
__global__ void __launch_bounds__(kThreads)
    small_m_hopper_kernel(Product p, Split split, const __grid_constant__ CUtensorMap x_map) {
#if __CUDA_ARCH__ == 900
  constexpr int kBuffers = clustered ? 1 : 2;  // For the sums of tiles, in each block.
  constexpr int kDepth = depth_of(columns), kXChunk = x_chunk(columns),
                kSums = sums_of_group(columns);
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ uint64_t x_barriers[kGroups][kMaxRounds], full_barrier;
  __shared__ uint64_t empty_barriers[clustered ? kMaxRanks : kBuffers];

  const int thread = static_cast<int>(threadIdx.x), group = thread / 128, lane = thread % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int k_size = static_cast<int>(p.k), m_size = static_cast<int>(p.m);
  const int n_size = static_cast<int>(p.n);
  const int rank = clustered ? hopper::cluster_rank() : 0;
  const int ranks = clustered ? hopper::cluster_size() : 1;
  const int first_n = static_cast<int>(blockIdx.x) / ranks * kTileRows;
  const int step_n = static_cast<int>(gridDim.x) / ranks * kTileRows;
  const int first_k = rank * split.chunks * kChunk;
  const int last_k = min(k_size, first_k + split.chunks * kChunk);
  const int rounds = (split.chunks + kGroups - 1) / kGroups;
  const uint32_t x_memory = hopper::shared_address(memory);
  const uint32_t ring = x_memory + split.chunks * kXChunk;
  float* const sums_memory =
      reinterpret_cast<float*>(memory + split.chunks * kXChunk + kDepth * kGroups * kSlot);
  const uint32_t full = hopper::shared_address(&full_barrier);
  const uint32_t empty = hopper::shared_address(empty_barriers);

  // W: 16 threads copy the chunk of a row, and of every second row after it.
  const int warp_row = thread % 128 / 32 * 8, own_row = warp_row + lane / 16;
  const int own_k = first_k + group * kChunk + lane % 16 * 16;
  const uint32_t own_ring = ring + group * (kDepth * kSlot);
  const uint64_t policy = policy_read_once();
  int fetch_n = first_n + own_row, fetch_k = own_k;
  const uint8_t* w = p.w.data + (b * p.n + fetch_n) * k_size;
  const auto fetch = [&](int slot) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = fetch_k < last_k && fetch_n + 2 * i < n_size;
      const uint8_t* const source = w + 2 * i * int64_t{k_size} + fetch_k;
      copy_pack(own_ring + slot * kSlot + place(own_row + 2 * i, lane % 16),
                exists ? source : p.w.data, exists, policy);
    }
    commit_packs();
    fetch_k += kGroups * kChunk;
    if (fetch_k >= own_k + rounds * kGroups * kChunk) {
      fetch_k = own_k;
      fetch_n += step_n;
      w += step_n * int64_t{k_size};
    }
  };

  // X goes behind the first of W, but not behind all, whose queue is long.
  if (group < kGroups) {
#pragma unroll
    for (int slot = 0; slot < kDepth - 1; ++slot) fetch(slot);
  }
  if (thread == 0) {
    if constexpr (clustered) hopper::barrier_init(full, 1);
    for (int i = 0; i < kBuffers * ranks; ++i) {
      hopper::barrier_init(empty + 8 * i, clustered ? 1 : 128);
    }
  }
  const uint32_t x_full = hopper::shared_address(x_barriers[group % kGroups]);
  if (group < kGroups && thread % 128 == 0) {
    for (int round = 0; round < rounds; ++round) hopper::barrier_init(x_full + 8 * round, 1);
    hopper::barrier_init_fence();
    hopper::copy_out_fence();
    for (int round = 0; round < rounds; ++round) {
      const int chunk = round * kGroups + group;
      if (chunk >= split.chunks) break;
      hopper::barrier_expect(x_full + 8 * round, kXChunk);
      for (int half = 0; half < 2; ++half) {
        hopper::copy_in(x_memory + chunk * kXChunk + half * (kXChunk / 2), x_map,
                        x_full + 8 * round, first_k + chunk * kChunk + half * (kChunk / 2), 0, b);
      }
    }
  }
  __syncthreads();
  if constexpr (clustered) hopper::cluster_arrive();

  // The tile of a turn is finished by block turn % ranks, in one of its buffers.
  if (group == kGroups) {
    const int row = thread % kTileRows, first_m = thread % 128 / kTileRows;
    float x_scales[columns / 4], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < columns / 4; ++i) {
      x_scales[i] = first_m + 4 * i < m_size ? p.x.scale_at(b, first_m + 4 * i, 0) : 0.0f;
    }
    if constexpr (clustered) hopper::cluster_wait();
    int turn = 0;
    for (int tile_n = first_n; tile_n < n_size; tile_n += step_n, ++turn) {
      if (turn % ranks != rank) continue;
      const int use = turn / ranks, buffer = use % kBuffers;
      if (clustered && thread % 128 == 0) {
        hopper::barrier_expect(full, ranks * kGroups * columns * kTileRows * 4);
      }
      const int n = tile_n + row;
      const float w_scale = n < n_size ? p.w.scale_at(b, n, 0) : 0.0f;
      const float* const sums =
          sums_memory + buffer * ranks * kGroups * kSums + first_m * kStride + row;
      float totals[columns / 4] = {};
      if constexpr (clustered) {
        hopper::barrier_wait(full, use % 2);
      } else {
        hopper::threads_sync(1 + buffer, kThreads);
      }
      for (int r = 0; r < ranks; ++r) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
#pragma unroll
          for (int i = 0; i < columns / 4; ++i) {
            totals[i] += sums[(r * kGroups + g) * kSums + 4 * i * kStride];
          }
        }
      }
      const uint32_t read = empty + turn % (kBuffers * ranks) * 8;
      if constexpr (clustered) {
        hopper::threads_sync(1, 128);
        if (thread % 128 < ranks) hopper::barrier_arrive(read, thread % 128);
      } else {
        hopper::barrier_arrive(read);
      }
#pragma unroll
      for (int i = 0; i < columns / 4; ++i) {
        const int m = first_m + 4 * i;
        if (m >= m_size || n >= n_size) continue;
        const float value = finish(p, apply_scales(totals[i], x_scales[i], w_scale), n);
        store(p, value, (int64_t{b} * m_size + m) * n_size + n);
        largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
      }
    }
    if (p.amax != nullptr) amax_to_memory(p.amax, largest);
  } else {
    fetch(kDepth - 1);
    const uint64_t x_matrix = hopper::matrix_descriptor(x_memory);
    // Of a warp's 16 rows of an mma, 2 i and 2 i + 1 stand for the halves of row i of W.
    uint32_t fragments[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      fragments[i] = own_ring + place(warp_row + lane / 8 % 2 * 4 + lane % 8 / 2,
                                      lane % 2 * 8 + 2 * i + lane / 16);
    }
    const bool second_half = lane / 4 % 2 == 1;
    int turn = 0, slot = 0;
    for (int tile_n = first_n; tile_n < n_size; tile_n += step_n, ++turn) {
      float sums[columns / 2] = {};
      for (int round = 0; round < rounds; ++round, slot = slot + 1 < kDepth ? slot + 1 : 0) {
        const int chunk = round * kGroups + group;
        wait_for_packs<kDepth - 1>();
        __syncwarp();
        if (chunk < split.chunks) {
          if (turn == 0) hopper::barrier_wait(x_full + 8 * round, 0);
          uint32_t a[4][4];
#pragma unroll
          for (int i = 0; i < 4; ++i) load_matrices(a[i], fragments[i] + slot * kSlot);
          const uint64_t matrix = x_matrix + chunk * (kXChunk / 16);  // In units of 16 bytes.
          float products[columns];
          hopper::multiply_fence();
          multiply<false>(products, a[0], matrix);
#pragma unroll
          for (int i = 1; i < 4; ++i) multiply<true>(products, a[i], matrix + 2 * i);
          hopper::multiply_commit();
          __syncwarp();
          fetch(slot);
          hopper::multiply_wait<0>();
#pragma unroll
          for (int i = 0; i < columns / 2; ++i) {
            sums[i] += second_half ? products[columns / 2 + i] : products[i];
          }
        } else {
          fetch(slot);
        }
      }

      // A thread has two rows of W, of one half; its neighbour has the same ones of the other. Each
      // gets one row of both.
      const int finisher = turn % ranks, buffer = turn / ranks % kBuffers;
      const int place_in_turn = turn % (kBuffers * ranks);
      if (clustered && turn == 0) hopper::cluster_wait();
      hopper::barrier_wait(empty + 8 * place_in_turn, turn / (kBuffers * ranks) % 2 ^ 1);
      float* const own = sums_memory + ((buffer * ranks + rank) * kGroups + group) * kSums +
                         lane % 4 * 2 * kStride + warp_row + lane / 8 + (second_half ? 4 : 0);
      [[maybe_unused]] const uint32_t remote = address_in(hopper::shared_address(own), finisher);
      [[maybe_unused]] const uint32_t remote_full = address_in(full, finisher);
#pragma unroll
      for (int i = 0; i < columns / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float upper = sums[4 * i + j], lower = sums[4 * i + 2 + j];
          const float total = (second_half ? lower : upper) +
                              __shfl_xor_sync(0xffffffffu, second_half ? upper : lower, 4);
          if constexpr (clustered) {
            store_in(remote + (8 * i + j) * kStride * 4, total, remote_full);
          } else {
            own[(8 * i + j) * kStride] = total;
          }
        }
      }
      if constexpr (!clustered) hopper::threads_arrive(1 + buffer, kThreads);
    }
    wait_for_packs<0>();  // Zeros, of tiles that do not exist.
  }
  if constexpr (clustered) hopper::cluster_sync();  // Others may still store and arrive here.
#endif
}

// --- The launch ----------------------------------------------------------------------------------

// With X and its sums in the shared memory of `ranks` blocks: how K is split, and the bytes; 0 if
// it does not fit.
int bytes_of(const Product& p, int columns, int ranks, Split* split) {
  split->tiles = static_cast<int>(ceil_div(p.n, kTileRows));
  split->chunks = static_cast<int>(ceil_div(ceil_div(p.k, kChunk), ranks));
  const int64_t buffers = ranks > 1 ? ranks : 2;
  const int64_t bytes = int64_t{split->chunks} * x_chunk(columns) +
                        depth_of(columns) * kGroups * kSlot +
                        buffers * kGroups * sums_of_group(columns) * 4;
  return bytes <= kMostBytes && split->chunks <= kGroups * kMaxRounds ? static_cast<int>(bytes) : 0;
}

template <int columns>
cudaError_t launch(const Product& p, int processors, cudaStream_t stream) {
  Split split;
  int bytes, ranks = 1;  // More than X needs to fit were slower, where N is 4096 and more.
  while ((bytes = bytes_of(p, columns, ranks, &split)) == 0) ranks *= 2;
  CUtensorMap x_map;
  if (!encode_map(&x_map, p.x.data, p.x.type, p.batch, p.m, p.k, columns, kChunk / 2)) {
    return cudaErrorInvalidValue;
  }
  const auto kernel =
      ranks > 1 ? small_m_hopper_kernel<columns, true> : small_m_hopper_kernel<columns, false>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostBytes);
  if (error != cudaSuccess) return error;
  const int64_t clusters = std::clamp<int64_t>(processors / ranks / p.batch, 1, split.tiles);
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(ranks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * ranks), static_cast<unsigned>(p.batch));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = ranks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p, split, x_map);
}

}  // namespace

bool small_m_hopper_supports(const Product& p, int capability) {
  Split split;
  return capability == 90 && p.m <= 16 && p.x.type == Type::kE4M3 && p.w.type == Type::kE4M3 &&
         !p.blocks() && p.k % 16 == 0 && bytes_of(p, p.m <= 8 ? 8 : 16, kMaxRanks, &split) > 0 &&
         hopper::is_device();
}

bool small_m_hopper_wins(const Product& p) {
  // Measured with 4096 rows of W and more, and with one block and with two that share K.
  Split split;
  return p.n >= 2048 && p.k >= 1024 && bytes_of(p, p.m <= 8 ? 8 : 16, 2, &split) > 0;
}

cudaError_t small_m_hopper(const Product& p, cudaStream_t stream) {
  int device, processors;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  return p.m <= 8 ? launch<8>(p, processors, stream) : launch<16>(p, processors, stream);
}

}  // namespace jax_fp8
