// Tensor granularity: one pass where the scale is known, and else as much of one as fits the chip.
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>

#include <algorithm>
#include <utility>

#include "ffi/follow.h"
#include "ffi/quantize_kernels.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace {

// --- The scale is known: one pass
// -----------------------------------------------------------------

constexpr int kCastThreads = 256;

template <typename V, int packs_>
__global__ void __launch_bounds__(kCastThreads)
    cast_kernel(Quantize q, int64_t size, unsigned blocks) {
  const unsigned entry = blockIdx.x / blocks, chunk = blockIdx.x - entry * blocks;
  const int64_t start = entry * size;
  const int64_t first = (int64_t{chunk} * (kCastThreads * packs_) + threadIdx.x) * V::width;
  const auto place = [&](int i) { return first + i * (kCastThreads * V::width); };
  typename V::Pack packs[packs_];
  wait_for_kernel_in_front();
#pragma unroll
  for (int i = 0; i < packs_; ++i) {
    if (place(i) < size) {
      packs[i].load(V::source(q, start + place(i)));
    } else {
      packs[i] = {};
    }
  }
  let_follow();  // Not before: what follows would read ahead of these.
  const float scale = q.given[entry], inverse = inverse_scale(scale);
#pragma unroll
  for (int i = 0; i < packs_; ++i) {
    if (place(i) < size) V::store(q, start + place(i), packs[i], inverse);
  }
  if (chunk == 0 && threadIdx.x == 0) q.scale[entry] = scale;
  if (q.amax == nullptr) return;
  Amax<V::in> amax;
#pragma unroll
  for (int i = 0; i < packs_; ++i) amax.take(packs[i]);
  const uint32_t largest = block_max(amax.bits());
  if (threadIdx.x > 0) return;
  // Most blocks find a larger one there, and an atomic maximum is slower than a look.
  auto* total = reinterpret_cast<uint32_t*>(q.amax) + entry;
  if (largest > *static_cast<volatile uint32_t*>(total)) atomicMax(total, largest);
}

template <typename V>
cudaError_t cast(const Quantize& q, cudaStream_t stream) {
  constexpr int packs = V::width == 1 ? 16 : 2;
  const int64_t size = q.rows * q.cols;
  const int64_t blocks = std::max<int64_t>(ceil_div(size, kCastThreads * packs * V::width), 1);
  if (q.amax != nullptr) {
    const cudaError_t error = zero_words(q.amax, q.batch, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(cast_kernel<V, packs>, q.follows, static_cast<unsigned>(blocks * q.batch),
                       kCastThreads, 0, stream, q, size, static_cast<unsigned>(blocks));
}

// --- It is not: the tensor stays on the chip, as far as it fits ----------------------------------

// Measured on an H200, where more registers spill and more shared memory there is not.
constexpr int kThreads = 512;             // At most.
constexpr int kHeld = 22;                 // Packs in the registers of a thread.
constexpr int kGroup = 4, kGroups = 7;    // Packs in its part of shared memory.
constexpr uint32_t kUnset = 0xffffffffu;  // No magnitude.

// Loads for once: the L2 cache had better keep what is read again.
template <typename Pack>
__device__ void load_once(Pack* pack, const typename Pack::T* source) {
  if constexpr (Pack::kBytes == 16) {
    const uint4 four = __ldcs(reinterpret_cast<const uint4*>(source));
    pack->words[0] = four.x, pack->words[1] = four.y;
    pack->words[2] = four.z, pack->words[3] = four.w;
  } else {
    pack->load(source);
  }
}

// To shared memory that this thread alone reads, once it has waited for it.
template <bool once, typename Pack>
__device__ void load_async(Pack* pack, const typename Pack::T* source) {
  if constexpr (Pack::kBytes == 16) {
#if __CUDA_ARCH__ >= 800
    if constexpr (once) {
      uint64_t policy;
      asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
      asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(pack))),
                   "l"(source), "l"(policy)
                   : "memory");
      return;
    }
#endif
    __pipeline_memcpy_async(pack, source, 16);
  } else {
    pack->load(source);
  }
}

// Runs as one wave of thread blocks, each with an equal part of the tensor. A thread holds its
// first packs in registers. The others go through its ring in shared memory, which runs ahead of
// the amax and then, backwards, of the cast: so the last ones are read once, and of the others
// those are read again first that the cache may still have.
template <typename V>
__global__ void __launch_bounds__(kThreads, 1)
    tensor_kernel(Quantize q, int64_t packs, int whole_steps) {
  using Pack = typename V::Pack;
  extern __shared__ __align__(16) unsigned char shared[];
  Pack* const ring = reinterpret_cast<Pack*>(shared) + threadIdx.x;
  volatile uint32_t* const amaxes = q.scratch;
  const auto grid = cooperative_groups::this_grid();
  if (threadIdx.x == 0) amaxes[blockIdx.x] = kUnset;
  auto token = grid.barrier_arrive();

  const uint32_t stride = gridDim.x * blockDim.x, first = blockIdx.x * blockDim.x + threadIdx.x;
  const int steps = whole_steps + (int64_t{whole_steps} * stride + first < packs);
  const auto place = [&](int step) {
    return (first + uint64_t{stride} * static_cast<uint32_t>(step)) * V::width;
  };
  const auto each_held = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i > whole_steps) break;  // No thread has more: a branch, where what follows masks.
      if (i < steps) body(i);
    }
  };
  const auto each_in = [&](int group, auto body) {
    Pack* const slots = ring + group % kGroups * kGroup * blockDim.x;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int step = kHeld + group * kGroup + i;
      if (step < steps) body(step, slots + i * blockDim.x);
    }
  };
  const int groups = max(0, steps - kHeld + kGroup - 1) / kGroup;
  const int staying = groups - kGroups;  // This group and those behind it are read once.
  const auto request = [&](int group) {
    if (group >= staying) {
      each_in(group,
              [&](int step, Pack* slot) { load_async<true>(slot, V::source(q, place(step))); });
    } else {
      each_in(group,
              [&](int step, Pack* slot) { load_async<false>(slot, V::source(q, place(step))); });
    }
  };

  for (int group = 0; group < kGroups; ++group) {
    if (group < groups) request(group);
    __pipeline_commit();
  }
  Pack held[kHeld];
  Amax<V::in> amax;
  each_held([&](int i) { load_once(&held[i], V::source(q, place(i))); });
  each_held([&](int i) { amax.take(held[i]); });
  for (int group = 0; group < groups; ++group) {
    __pipeline_wait_prior(kGroups - 1);
    each_in(group, [&](int, const Pack* slot) { amax.take(*slot); });
    if (group + kGroups < groups) request(group + kGroups);
    __pipeline_commit();
  }

  uint32_t largest = block_max(amax.bits());
  if (threadIdx.x == 0) amaxes[blockIdx.x] = largest;
  grid.barrier_wait(std::move(token));  // All of them had been unset.
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
    uint32_t other;
    do {
      other = amaxes[i];
    } while (other == kUnset);
    largest = max(largest, other);
  }
  const float inverse = scale_group(q, 0, block_max(largest), first == 0);

  for (int group = groups - 1; group >= 0; --group) {
    __pipeline_wait_prior(kGroups - 1);
    each_in(group, [&](int step, const Pack* slot) { V::store(q, place(step), *slot, inverse); });
    if (group >= kGroups) {
      each_in(group - kGroups,
              [&](int step, Pack* slot) { load_async<false>(slot, V::source(q, place(step))); });
    }
    __pipeline_commit();
  }
  each_held([&](int i) { V::store(q, place(i), held[i], inverse); });
}

template <typename V>
cudaError_t measure_and_cast(const Quantize& q, cudaStream_t stream) {
  const auto kernel = reinterpret_cast<const void*>(tensor_kernel<V>);
  constexpr int kRing = kGroup * kGroups * sizeof(typename V::Pack);  // Of a thread.
  constexpr int kReserved = 2048;  // Shared memory that is taken by others.
  int sms = 0, shared = 0;
  cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &sms);
  if (error != cudaSuccess) return error;
  error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  if (error != cudaSuccess) return error;
  const int threads = std::min((shared - kReserved) / kRing / 32 * 32, kThreads);
  const int64_t size = q.rows * q.cols;
  int64_t packs = size / V::width;
  const auto blocks =
      static_cast<int>(std::min<int64_t>({ceil_div(packs, threads), sms, kScratchWords}));
  int whole_steps = static_cast<int>(packs / (int64_t{blocks} * threads));
  const int bytes = whole_steps < kHeld ? 0 : kRing * threads;
  // Always the most: another thread of the host may be about to launch.
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRing * threads);
  Quantize entry = q;
  void* arguments[] = {&entry, &packs, &whole_steps};
  for (int64_t i = 0; i < q.batch && error == cudaSuccess; ++i) {
    // Cooperative: blocks that wait for each other must all be resident, whatever else runs.
    error =
        cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, bytes, stream);
    entry.x = static_cast<const typename V::T*>(entry.x) + size;
    entry.data += size;
    ++entry.scale;
    ++entry.amax;
  }
  return error;
}

}  // namespace

cudaError_t quantize_tensors(const Quantize& q, cudaStream_t stream) {
  if (q.given != nullptr) {
    return dispatch(q, [&](auto variant) { return cast<decltype(variant)>(q, stream); });
  }
  Quantize row = q;
  row.cols *= row.rows;
  row.rows = 1;
  if (row_is_held(row)) return quantize_rows(row, stream);
  return dispatch(q, [&](auto variant) { return measure_and_cast<decltype(variant)>(q, stream); });
}

}  // namespace jax_fp8
