#include <cooperative_groups.h>

#include <algorithm>
#include <type_traits>

#include "ffi/device.h"
#include "ffi/finish.h"
#include "ffi/follow.h"
#include "ffi/gemv.h"
#include "ffi/small_m.h"
#include "ffi/small_m_device.h"
#include "ffi/small_m_hopper.h"
#include "ffi/tensor_map.h"

namespace jax_fp8 {
namespace {

namespace cg = cooperative_groups;

constexpr int kMaxM = 64;
constexpr int kMaxStages = 8;
constexpr int kMostSplits = 8;  // Thread blocks that share the K of a tile.

// --- The kernel ----------------------------------------------------------------------------------

// A block goes through tiles of 16 * rows rows of W by 8 * tokens rows of X. Its warps take turns
// in chunks of K, of which each has a ring of slots of its own; their sums meet at the end of the
// tile. Where there are few tiles, the blocks of a cluster share the K of one, and each finishes a
// part of it, with the sums of all.
//
// A slot holds 128 bytes of each row, then the next 128 bytes. Of those, the 16 bytes at column i
// of row r lie at column i ^ (r % 8), as box copies can lay them and no reader meets a bank twice.
template <Type x_type, int warps, int rows, int tokens, int chunk>
struct Shape {
  static constexpr Type kXType = x_type;  // kE4M3 stands for both FP8 formats.
  static constexpr int kXWidth = kXType == Type::kE4M3 ? 1 : 2;
  static constexpr int kWarps = warps, kThreads = 32 * warps;
  static constexpr int kRows = rows, kTokens = tokens, kTileRows = 16 * rows;
  static constexpr int kChunk = chunk, kParts = chunk / 128, kXParts = kParts * kXWidth;
  static constexpr int kPart = 128 * kTileRows, kXPart = 128 * 8 * kTokens;
  static constexpr int kSlot = kParts * kPart, kXSlot = kXParts * kXPart;
  // Fragments of rows whose sums fit into a slot.
  static constexpr int kFit = kSlot / (512 * kTokens), kPass = kFit < kRows ? kFit : kRows;
  static_assert(kPass > 0 && kChunk % 128 == 0);
};

struct Plan {
  int stages;    // Slots of a ring.
  int x_slots;   // The same, or enough for all of a warp's K:
  bool x_stays;  // X is copied once and not for each tile.
  int splits;    // Blocks of a cluster, which has one tile if these are several.
};

// `e4m3`: all that is FP8 is E4M3. Else each decoding asks for the format, which takes time.
template <class S, bool e4m3>
__global__ void __launch_bounds__(S::kThreads)
    small_m_kernel(Product p, Plan plan, const __grid_constant__ CUtensorMap w_map,
                   const __grid_constant__ CUtensorMap x_map) {
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
  constexpr Type mma = S::kXType == Type::kBF16 ? Type::kBF16 : Type::kF16;
  extern __shared__ uint8_t unaligned_memory[];
  __shared__ uint64_t barriers[S::kWarps][kMaxStages];
  __shared__ float x_scales[8 * S::kTokens], w_scales[S::kTileRows], biases[S::kTileRows];

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int b = static_cast<int>(blockIdx.y);
  const int splits = plan.splits, split = static_cast<int>(blockIdx.x) % splits;
  const int rows = static_cast<int>(p.n);
  const int first_tile = static_cast<int>(blockIdx.x) / splits * S::kTileRows;
  const int tile_step = static_cast<int>(gridDim.x) / splits * S::kTileRows;
  const int k_size = static_cast<int>(p.k), m_size = static_cast<int>(p.m);
  const int first_k = (split * S::kWarps + warp) * S::kChunk;
  const int round_k = splits * S::kWarps * S::kChunk;
  const int rounds = (k_size + round_k - 1) / round_k;
  const Type w_type = e4m3 ? Type::kE4M3 : p.w.type;
  const Type x_type = e4m3 ? Type::kE4M3 : p.x.type;

  uint8_t* const memory =
      unaligned_memory + (1024 - shared_address(unaligned_memory) % 1024) % 1024;
  uint8_t* const w_ring = memory + warp * plan.stages * S::kSlot;
  uint8_t* const x_ring =
      memory + S::kWarps * plan.stages * S::kSlot + warp * plan.x_slots * S::kXSlot;
  uint64_t* const full = barriers[warp];
  if (lane < plan.stages) init_barrier(full + lane, 1);
  fence_boxes();
  __syncwarp();

  const uint64_t w_policy = policy_read_once(), x_policy = policy_read_often();
  int fetch_tile = first_tile, fetch_round = 0, fetch_stage = 0;
  const auto fetch = [&] {
    if (fetch_tile >= rows) return;
    const int k = first_k + fetch_round * round_k;
    const bool with_x = !plan.x_stays || fetch_tile == first_tile;
    uint64_t* const barrier = full + fetch_stage;
    uint8_t* const slot = w_ring + fetch_stage * S::kSlot;
    uint8_t* const x_slot = x_ring + (plan.x_stays ? fetch_round : fetch_stage) * S::kXSlot;
    if (lane == 0) {
      const bool in_k = k < k_size;
      expect_bytes(barrier, in_k ? S::kSlot + (with_x ? S::kXSlot : 0) : 0);
      for (int i = 0; i < S::kParts && in_k; ++i) {
        copy_box(slot + i * S::kPart, w_map, k + i * 128, fetch_tile, b, barrier, w_policy);
      }
      for (int i = 0; i < S::kXParts && in_k && with_x; ++i) {
        copy_box(x_slot + i * S::kXPart, x_map, k * S::kXWidth + i * 128, 0, b, barrier, x_policy);
      }
    }
    __syncwarp();
    fetch_stage = fetch_stage + 1 == plan.stages ? 0 : fetch_stage + 1;
    if (++fetch_round == rounds) {
      fetch_round = 0;
      fetch_tile += tile_step;
    }
  };
  for (int i = 0; i < plan.stages; ++i) fetch();
  for (int m = thread; m < m_size; m += S::kThreads) x_scales[m] = p.x.scale_at(b, m, 0);

  // Of the fragments of mma, a thread has row `group` and 32 of its codes, in two halves. Which
  // codes stand for which k is free, as long as W and X agree. The halves change places in half of
  // the threads, for the sake of the banks of a 16-bit X.
  const int group = lane / 4, quad = lane % 4;
  int offsets[2], x_offsets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int half = i ^ (quad / 2);
    offsets[i] = group * 128 + ((2 * quad + half) ^ group) * 16;
    x_offsets[i] = S::kXWidth == 1 ? offsets[i]
                                   : quad / 2 * S::kXPart + group * 128 +
                                         ((4 * (quad % 2) + 2 * half) ^ group) * 16;
  }

  int stage = 0, phase = 0;
  float largest = 0.0f;
  for (int tile = first_tile; tile < rows; tile += tile_step) {
    // Loaded here, needed at the end of the tile.
    float w_scale = 0.0f, bias = 0.0f;
    if (thread < S::kTileRows && tile + thread < rows) {
      const int64_t n = tile + thread;
      w_scale = p.w.scale_at(b, n, 0);
      if (p.bias != nullptr) bias = load_as_float(p.bias, p.bias_type, n);
    }
    float sums[S::kRows][S::kTokens][4] = {};
    uint8_t* slot = nullptr;
    for (int round = 0; round < rounds; ++round) {
      slot = w_ring + stage * S::kSlot;
      const uint8_t* const x_slot = x_ring + (plan.x_stays ? round : stage) * S::kXSlot;
      wait_for(full + stage, phase);
      if (first_k + round * round_k < k_size) {
#pragma unroll
        for (int step = 0; step < 2 * S::kParts; ++step) {
          const int part = step / 2, half = step % 2;
          uint4 w_codes[2 * S::kRows], x_values[S::kTokens * S::kXWidth];
#pragma unroll
          for (int i = 0; i < 2 * S::kRows; ++i) {
            w_codes[i] =
                *reinterpret_cast<const uint4*>(slot + part * S::kPart + i * 1024 + offsets[half]);
          }
#pragma unroll
          for (int i = 0; i < S::kTokens * S::kXWidth; ++i) {
            x_values[i] = *reinterpret_cast<const uint4*>(
                x_slot + part * S::kXWidth * S::kXPart + i / S::kXWidth * 1024 +
                (x_offsets[half] ^ (i % S::kXWidth * 16)));
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            uint32_t a[S::kRows][4];
#pragma unroll
            for (int r = 0; r < S::kRows; ++r) {
              const uint2 upper = decode_to<mma>(word_of(w_codes[2 * r], i), w_type);
              const uint2 lower = decode_to<mma>(word_of(w_codes[2 * r + 1], i), w_type);
              a[r][0] = upper.x, a[r][1] = lower.x, a[r][2] = upper.y, a[r][3] = lower.y;
            }
#pragma unroll
            for (int t = 0; t < S::kTokens; ++t) {
              uint2 values;
              if constexpr (S::kXWidth == 1) {
                values = decode_to_f16(word_of(x_values[t], i), x_type);
              } else {
                const uint4 v = x_values[2 * t + i / 2];
                values = {word_of(v, i % 2 * 2), word_of(v, i % 2 * 2 + 1)};
              }
#pragma unroll
              for (int r = 0; r < S::kRows; ++r) multiply_add<mma>(sums[r][t], a[r], values);
            }
          }
        }
      }
      __syncwarp();
      if (round + 1 < rounds) fetch();  // Into the slot that has been read.
      if (++stage == plan.stages) {
        stage = 0;
        phase ^= 1;
      }
    }

    if (thread < S::kTileRows) {
      w_scales[thread] = w_scale;
      biases[thread] = bias;
    }
    // The slot read last takes the sums of its warp; all warps are at the same stage.
    auto* const own_sums = reinterpret_cast<float4*>(slot) + lane;
    constexpr int kFloat4s = S::kSlot / sizeof(float4);
    float4* const first_sums = own_sums - warp * plan.stages * kFloat4s;
    const auto synchronize = [&] {
      if (splits > 1) {
        cg::this_cluster().sync();
      } else {
        __syncthreads();
      }
    };
#pragma unroll
    for (int pass = 0; pass < S::kRows; pass += S::kPass) {
      if (pass > 0) synchronize();
#pragma unroll
      for (int r = 0; r < S::kPass && pass + r < S::kRows; ++r) {
#pragma unroll
        for (int t = 0; t < S::kTokens; ++t) {
          const float (&c)[4] = sums[pass + r][t];
          own_sums[(r * S::kTokens + t) * 32] = make_float4(c[0], c[1], c[2], c[3]);
        }
      }
      synchronize();
      const int fragments = min(S::kPass, S::kRows - pass) * S::kTokens;
      for (int f = split * S::kWarps + warp; f < fragments; f += splits * S::kWarps) {
        float total[4] = {};
        for (int other = 0; other < splits; ++other) {
          const float4* const sums_of =
              splits > 1 ? cg::this_cluster().map_shared_rank(first_sums, other) : first_sums;
#pragma unroll
          for (int i = 0; i < S::kWarps; ++i) {
            const float4 sum = sums_of[i * plan.stages * kFloat4s + f * 32];
            total[0] += sum.x, total[1] += sum.y, total[2] += sum.z, total[3] += sum.w;
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (pass + f / S::kTokens) * 16 + group + i / 2 * 8;
          const int m = f % S::kTokens * 8 + quad * 2 + i % 2;
          if (m >= m_size || tile + row >= rows) continue;
          float value = apply_scales(total[i], x_scales[m], w_scales[row]);
          if (p.bias != nullptr) value += biases[row];
          value = activate(p.activation, value);
          store(p, value, (int64_t{b} * m_size + m) * p.n + tile + row);
          largest = bits_float(max(float_bits(largest), float_bits(fabsf(value))));
        }
      }
    }
    fence_boxes();
    synchronize();  // Before the slot is filled again, or its block ends.
    fetch();
  }
  if (p.amax != nullptr) amax_to_memory(p.amax, largest);
#endif
}

// --- The launch ----------------------------------------------------------------------------------

struct Device {
  int processors, memory, reserved;  // Shared memory of a multiprocessor, and lost for each block.

  cudaError_t query() {
    cudaError_t error = cudaSuccess;
    const auto get = [&](int* value, cudaDeviceAttr attribute) {
      if (error == cudaSuccess) error = device_attribute(attribute, value);
    };
    get(&processors, cudaDevAttrMultiProcessorCount);
    get(&memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    get(&reserved, cudaDevAttrReservedSharedMemoryPerBlock);
    return error;
  }
};

template <class S, bool e4m3>
cudaError_t launch(const Product& p, const Device& device, cudaStream_t stream) {
  const auto kernel = small_m_kernel<S, e4m3>;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;

  // As many blocks as fit at once, with all of the shared memory.
  const int64_t blocks = std::max<int64_t>(1, device.processors / p.batch);
  constexpr int alignment = 1024;
  const int budget =
      device.memory - device.reserved - alignment - static_cast<int>(attributes.sharedSizeBytes);
  constexpr int w_slot = S::kWarps * S::kSlot, x_slot = S::kWarps * S::kXSlot;
  const int64_t tiles = ceil_div(p.n, S::kTileRows), round_k = S::kWarps * S::kChunk;
  Plan plan;
  plan.splits = splits_of(tiles, device.processors, p.k, round_k, kMostSplits);
  const int64_t rounds = ceil_div(p.k, plan.splits * round_k);
  plan.x_stays = budget - rounds * x_slot >= 2 * w_slot;
  const int64_t stages =
      plan.x_stays ? (budget - rounds * x_slot) / w_slot : budget / (w_slot + x_slot);
  if (stages == 0) return cudaErrorInvalidConfiguration;
  plan.stages =
      static_cast<int>(std::min<int64_t>({stages, kMaxStages, rounds * ceil_div(tiles, blocks)}));
  plan.x_slots = plan.x_stays ? static_cast<int>(rounds) : plan.stages;
  const int bytes = alignment + plan.stages * w_slot + plan.x_slots * x_slot;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;

  CUtensorMap w_map, x_map;  // Of bytes.
  if (!encode_map(&w_map, p.w.data, Type::kE4M3, p.batch, p.n, p.k, S::kTileRows, 128) ||
      !encode_map(&x_map, p.x.data, Type::kE4M3, p.batch, p.m, p.k * S::kXWidth, 8 * S::kTokens,
                  128)) {
    return cudaErrorInvalidValue;
  }
  const int64_t clusters = plan.splits > 1 ? tiles : std::min(tiles, blocks);
  const dim3 grid(static_cast<unsigned>(clusters * plan.splits), static_cast<unsigned>(p.batch));
  return launch_clusters(kernel, false, plan.splits, grid, S::kThreads, bytes, stream, p, plan,
                         w_map, x_map);
}

// What was fastest on an H200, where weights of 4096 x 4096 to 28672 x 4096 were tried.
template <Type x_type, bool e4m3>
cudaError_t launch_for_m(const Product& p, const Device& device, cudaStream_t stream) {
  constexpr bool wide = x_type != Type::kE4M3;
  if (p.m <= 16) {
    return launch<Shape<x_type, wide ? 8 : 16, 2, 2, 128>, e4m3>(p, device, stream);
  }
  if (p.m <= 32) return launch<Shape<x_type, 8, 2, 4, 128>, e4m3>(p, device, stream);
  return launch<Shape<x_type, wide ? 4 : 8, 2, 8, 128>, e4m3>(p, device, stream);
}

}  // namespace

std::string small_m_refusal(const Product& p, int capability) {
  if (capability < 90 || capability >= 120) {
    return "it is made for the tensor copies and the 227 KiB of shared memory that compute"
           " capability 9.0 to 11 have";
  }
  if (p.m > kMaxM) return "it takes M <= " + std::to_string(kMaxM);
  if (p.k % 16 != 0) return "it reads K in steps of 16";
  if (p.x.per_block() || p.w.per_block()) return "it takes no block scales";
  if (p.k >= 1 << 30 || p.n >= 1 << 30 || p.batch > 65535) return "it counts N and K in 32 bits";
  const auto address =
      reinterpret_cast<uintptr_t>(p.x.data) | reinterpret_cast<uintptr_t>(p.w.data);
  if (address % 16 != 0) return "an operand does not start at a multiple of 16 bytes";
  return "";
}

bool small_m_wins(const Product& p, int capability) {
  // Measured on H100 and H200, with weights of 16 MB and more.
  if (capability / 10 != 9 || p.n * p.k < int64_t{1} << 20) return false;
  // Without a product of cublasLt the other choice is decode, whose Hopper kernel for 16-bit
  // activations takes 40 us for 64 x 28672 x 4096 (here 84), but 16 for 16 x 4096 x 4096 (here 9).
  if (!is_fp8(p.x.type)) return p.m <= 16 || p.n <= 8192;
  if (p.x.type == Type::kE5M2 && p.w.type == Type::kE5M2) return true;
  return small_m_hopper_supports(p, capability) && small_m_hopper_wins(p);
}

cudaError_t small_m_matmul(const Product& p, int capability, cudaStream_t stream, bool follows) {
  if (small_m_hopper_supports(p, capability)) return small_m_hopper(p, stream, follows);
  Device device;
  const cudaError_t error = device.query();
  if (error != cudaSuccess) return error;
  if (p.m <= kGemvM && p.x.wide()) return gemv(p, device.processors, stream, follows);
  const auto launch_for = [&](auto e4m3) {
    constexpr bool known = decltype(e4m3)::value;
    if (p.x.type == Type::kBF16) return launch_for_m<Type::kBF16, known>(p, device, stream);
    if (p.x.type == Type::kF16) return launch_for_m<Type::kF16, known>(p, device, stream);
    return launch_for_m<Type::kE4M3, known>(p, device, stream);
  };
  const bool e4m3 = p.w.type == Type::kE4M3 && p.x.type != Type::kE5M2;
  return e4m3 ? launch_for(std::true_type{}) : launch_for(std::false_type{});
}

}  // namespace jax_fp8
