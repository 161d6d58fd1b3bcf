// Row granularity: a row is read once, held in registers between its amax and the cast. Also for
// tensors that are small enough to be one row.
#include <cooperative_groups.h>

#include <algorithm>

#include "ffi/follow.h"
#include "ffi/quantize_kernels.h"

namespace jax_fp8 {
namespace {

namespace cg = cooperative_groups;

constexpr int kMaxThreads = 512, kMaxPacks = 8, kMaxCluster = 8;
constexpr int kRowsABlock = 4;  // Where a row is one warp's.

// How a row is spread: over the threads of a cluster of thread blocks, `packs` to each.
struct Spread {
  int threads, packs, cluster;
};

#if __CUDA_ARCH__ >= 900
// The maximum over a cluster, in every thread. All of them call, once, after having arrived at the
// cluster's barrier. Each warp tells every block, for that is faster than asking them.
__device__ uint32_t cluster_max(uint32_t value) {
  __shared__ uint32_t warps[kMaxCluster * kMaxThreads / 32];
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned lane = threadIdx.x % 32, warps_a_block = blockDim.x / 32;
  const unsigned warp = cluster.block_rank() * warps_a_block + threadIdx.x / 32;
  value = lanes_max<32>(value);
  cluster.barrier_wait();  // The other blocks run: their memory can be written.
  if (lane < cluster.num_blocks()) cluster.map_shared_rank(warps, lane)[warp] = value;
  cluster.sync();
  for (unsigned i = lane; i < cluster.num_blocks() * warps_a_block; i += 32) {
    value = max(value, warps[i]);
  }
  return lanes_max<32>(value);
}
#endif

// Without a cluster, threads along y have rows of their own: those of a warp each. What exceeds
// `packs` packs a thread is read twice.
template <typename V, int packs, bool clustered>
__global__ void __launch_bounds__(kMaxThreads) row_kernel(Quantize q) {
  int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  int64_t thread = threadIdx.x, threads = blockDim.x;
#if __CUDA_ARCH__ >= 900
  if constexpr (clustered) {
    const cg::cluster_group cluster = cg::this_cluster();
    cluster.barrier_arrive();
    row = blockIdx.x / cluster.num_blocks();
    thread += int64_t{cluster.block_rank()} * blockDim.x;
    threads *= cluster.num_blocks();
  }
#endif
  if (row >= q.batch * q.rows) return;       // A whole warp.
  if (clustered && q.follows) let_follow();  // Blocks are small: there is room beside them.
  wait_for_kernel_in_front();
  const int64_t start = row * q.cols, rest = (packs * threads + thread) * V::width;
  typename V::Pack held[packs];
  Amax<V::in> amax;
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t column = (i * threads + thread) * V::width;
    if (column < q.cols) {
      held[i].load(V::source(q, start + column));
    } else {
      held[i] = {};
    }
  }
  let_follow();  // Not before: what follows would read ahead of these.
  uint32_t largest = 0;
  if (q.given == nullptr || q.amax != nullptr) {
#pragma unroll
    for (int i = 0; i < packs; ++i) amax.take(held[i]);
    for (int64_t column = rest; column < q.cols; column += threads * V::width) {
      typename V::Pack pack;
      pack.load(V::source(q, start + column));
      amax.take(pack);
    }
#if __CUDA_ARCH__ >= 900
    if constexpr (clustered) {
      largest = cluster_max(amax.bits());
    } else
#endif
    {
      largest = block_max(amax.bits());
    }
  }
  const float inverse = scale_group(q, row, largest, thread == 0);
  for (int64_t column = rest; column < q.cols; column += threads * V::width) {
    typename V::Pack pack;
    pack.load(V::source(q, start + column));
    V::store(q, start + column, pack, inverse);
  }
#pragma unroll
  for (int i = 0; i < packs; ++i) {
    const int64_t column = (i * threads + thread) * V::width;
    if (column < q.cols) V::store(q, start + column, held[i], inverse);
  }
}

bool has_clusters() {
  int found = 0;
  return device_attribute(cudaDevAttrClusterLaunch, &found) == cudaSuccess && found != 0;
}

bool is_measured(const Quantize& q) { return q.given == nullptr || q.amax != nullptr; }

// The constants are what was fastest on an H200: blocks of about 256 threads that load as soon as
// they start; clusters, which cost 0.6 us, where a block cannot hold a row, and where there are so
// few rows that most of the device would idle. Behind a product of few rows they cost nothing, as
// they start before it has ended: there shorter rows are spread too.
Spread spread(const Quantize& q) {
  const int64_t packs = ceil_div(q.cols, pack_width(q)), rows = q.batch * q.rows;
  const bool single = pack_width(q) == 1;
  if (packs <= 128) return {32, single ? 8 : (packs <= 64 ? 2 : 4), 1};
  int cluster = 1, sms = 0;
  bool few = false;
  if (packs > (q.follows && !single ? 1024 : 2048) && is_measured(q) && has_clusters()) {
    few = device_attribute(cudaDevAttrMultiProcessorCount, &sms) == cudaSuccess &&
          rows * kMaxCluster <= sms;
    const int64_t needed = packs <= 4096 ? 1 : ceil_div(packs, 2048);
    while (cluster < (few ? kMaxCluster : std::min<int64_t>(needed, kMaxCluster))) cluster *= 2;
  }
  const int64_t share = ceil_div(packs, cluster);
  int each = 8;
  if (!single && share <= 2048 && (few || cluster == 1)) each = share <= 512 && !few ? 2 : 4;
  const int64_t threads = ceil_div(ceil_div(share, each), 32) * 32;
  return {static_cast<int>(std::min<int64_t>(threads, kMaxThreads)), each, cluster};
}

template <typename V, int packs, bool clustered>
cudaError_t launch(const Quantize& q, const Spread& spread, cudaStream_t stream) {
  const int rows_a_block = !clustered && spread.threads == 32 ? kRowsABlock : 1;
  const int64_t blocks = ceil_div(q.batch * q.rows, rows_a_block) * spread.cluster;
  const dim3 grid(static_cast<unsigned>(blocks)), block(spread.threads, rows_a_block);
  const auto kernel = row_kernel<V, packs, clustered>;
  return launch_clusters(kernel, q.follows, spread.cluster, grid, block, 0, stream, q);
}

}  // namespace

bool row_is_held(const Quantize& q) {
  const int64_t blocks = has_clusters() ? kMaxCluster : 1;
  return ceil_div(q.cols, pack_width(q)) <= blocks * kMaxThreads * kMaxPacks;
}

cudaError_t quantize_rows(const Quantize& q, cudaStream_t stream) {
  const Spread chosen = spread(q);
  return dispatch(q, [&](auto variant) {
    using V = decltype(variant);
    const bool clustered = chosen.cluster > 1;
    if constexpr (V::width > 1) {
      if (chosen.packs == 2) return launch<V, 2, false>(q, chosen, stream);
      if (chosen.packs == 4) {
        return clustered ? launch<V, 4, true>(q, chosen, stream)
                         : launch<V, 4, false>(q, chosen, stream);
      }
    }
    return clustered ? launch<V, 8, true>(q, chosen, stream)
                     : launch<V, 8, false>(q, chosen, stream);
  });
}

}  // namespace jax_fp8
