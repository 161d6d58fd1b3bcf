#include <algorithm>
#include <iterator>

#include "ffi/decode_hopper.h"
#include "ffi/decode_hopper_kernel.h"
#include "ffi/device.h"
#include "ffi/tensor_map.h"

namespace jax_fp8 {
namespace {

using hopper::kDepth;
using hopper::Maps;
using hopper::Shape;
using hopper::Tiles;

template <Type w_type, Type x_type, class S>
cudaError_t launch(const Product& p, int cluster, int multiprocessors, cudaStream_t stream) {
  Maps maps{};
  if (!encode_map(&maps.x, p.x.data, p.x.type, p.batch, p.m, p.k, S::kTokens / cluster, kDepth) ||
      !encode_map(&maps.w, p.w.data, p.w.type, p.batch, p.n, p.k, S::kRows, kDepth) ||
      (p.d_type != Type::kF32 &&
       !encode_map(&maps.d, p.d, p.d_type, p.batch, p.m, p.n, S::kTokens, 64))) {
    return cudaErrorInvalidValue;
  }
  Tiles tiles;
  tiles.token_tiles = static_cast<int>(ceil_div(p.m, S::kTokens));
  tiles.row_clusters = static_cast<int>(ceil_div(p.n, S::kRows * cluster));
  tiles.count = static_cast<int>(p.batch * tiles.token_tiles * tiles.row_clusters);
  tiles.depth_steps = static_cast<int>(ceil_div(p.k, kDepth * S::kDepthGroups) * S::kDepthGroups);

  const auto kernel = hopper::decode_kernel<w_type, x_type, S>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(std::min(tiles.count, multiprocessors / cluster) * cluster);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = S::kBytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, p, maps, tiles);
}

// A shape, and how many blocks share their X.
struct Plan {
  int row_groups, depth_groups, tokens, cluster;
  int stage_ns;  // Time of a stage on an H200, all of whose multiprocessors are at work.
};

// With more warpgroups along K there are more, smaller tiles.
constexpr Plan kPlans[] = {{2, 1, 256, 2, 740}, {4, 1, 128, 2, 780}, {2, 2, 128, 2, 430},
                           {4, 1, 64, 1, 550},  {2, 2, 64, 1, 265},  {1, 4, 64, 1, 200},
                           {1, 4, 32, 1, 180}};

// The plan whose waves of tiles take the shortest.
Plan choose(const Product& p, int multiprocessors) {
  constexpr int64_t kTileNs = 1500;  // Of a tile, besides its stages.
  const auto cost = [&](const Plan& plan) {
    const int64_t tiles = p.batch * ceil_div(p.m, plan.tokens) *
                          ceil_div(p.n, int64_t{64} * plan.row_groups * plan.cluster);
    const int64_t waves = ceil_div(tiles, multiprocessors / plan.cluster);
    return waves * (ceil_div(p.k, kDepth) * plan.stage_ns + kTileNs);
  };
  return *std::min_element(std::begin(kPlans), std::end(kPlans),
                           [&](const Plan& a, const Plan& b) { return cost(a) < cost(b); });
}

template <Type w_type, Type x_type, int index = 0>
cudaError_t launch(const Product& p, const Plan& plan, int multiprocessors, cudaStream_t stream) {
  if constexpr (index < static_cast<int>(std::size(kPlans))) {
    constexpr Plan here = kPlans[index];
    if (plan.row_groups == here.row_groups && plan.depth_groups == here.depth_groups &&
        plan.tokens == here.tokens) {
      return launch<w_type, x_type, Shape<here.row_groups, here.depth_groups, here.tokens>>(
          p, plan.cluster, multiprocessors, stream);
    }
    return launch<w_type, x_type, index + 1>(p, plan, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch(const Product& p, const Plan& plan, int multiprocessors, cudaStream_t stream) {
  if (p.w.type == Type::kE4M3) {
    return p.x.type == Type::kBF16
               ? launch<Type::kE4M3, Type::kBF16>(p, plan, multiprocessors, stream)
               : launch<Type::kE4M3, Type::kF16>(p, plan, multiprocessors, stream);
  }
  return p.x.type == Type::kBF16
             ? launch<Type::kE5M2, Type::kBF16>(p, plan, multiprocessors, stream)
             : launch<Type::kE5M2, Type::kF16>(p, plan, multiprocessors, stream);
}

}  // namespace

bool decode_hopper_supports(const Product& p, int capability) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool wide_d = p.d_type == Type::kF32 || (!is_fp8(p.d_type) && p.n % 8 == 0 && aligned(p.d));
  constexpr int64_t kMost = int64_t{1} << 30;  // Coordinates and tiles are counted in 32 bits.
  const bool fits = p.x.wide() && !p.w.per_block() && wide_d && p.k > 0 && p.k % 16 == 0 &&
                    aligned(p.x.data) && aligned(p.w.data) && std::max({p.m, p.n, p.k}) < kMost &&
                    ceil_div(p.m, 32) * ceil_div(p.n, 64) < kMost / p.batch;
  return capability == 90 && fits && hopper::is_device();
}

cudaError_t decode_hopper(const Product& p, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &multiprocessors);
  if (error != cudaSuccess) return error;
  return launch(p, choose(p, multiprocessors), multiprocessors, stream);
}

}  // namespace jax_fp8
