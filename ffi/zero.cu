#include <algorithm>

#include "ffi/follow.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace {

constexpr int kThreads = 256, kMostBlocks = 1024;

__global__ void __launch_bounds__(kThreads) zero_kernel(uint32_t* data, int64_t words) {
  let_follow();
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < words; i += int64_t{gridDim.x} * kThreads) data[i] = 0;
}

}  // namespace

cudaError_t zero_words(void* data, int64_t words, cudaStream_t stream) {
  if (words == 0) return cudaSuccess;
  const int64_t blocks = std::min<int64_t>((words + kThreads - 1) / kThreads, kMostBlocks);
  zero_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<uint32_t*>(data),
                                                                      words);
  return cudaGetLastError();
}

}  // namespace jax_fp8
