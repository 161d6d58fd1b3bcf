#include "ffi/fused_kernels.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace fused {
namespace {

cudaError_t run(const Fused& f, Pass pass, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  return launch_rows(f, pass, stream, &error) ? error : launch_general(f, pass, stream);
}

}  // namespace
}  // namespace fused

cudaError_t fused_device(const Fused& all, cudaStream_t stream) {
  using fused::Pass;
  Fused f = all;
  if (f.rows == 0 || f.cols == 0) {  // No values, but scales. The simplest producer does.
    f.producer = Producer::kGelu;
    f.residual = nullptr;
    if (f.block_rows == 0) f.rows = 1;
    f.cols = 0;
  }
  if (f.given != nullptr) return fused::run(f, Pass::kGiven, stream);
  if (f.block_cols != 0) return fused::run(f, Pass::kStrips, stream);
  // A tensor of one row, unless more than one thread block had better share it.
  if (f.block_rows != 0 || (f.rows == 1 && f.cols <= 16384))
    return fused::run(f, Pass::kRow, stream);
  cudaError_t error = cudaSuccess;
  if (fused::launch_rows(f, Pass::kTwice, stream, &error)) return error;
  error = zero_words(f.amax, f.batch, stream);
  if (error == cudaSuccess) error = fused::launch_general(f, Pass::kAmax, stream);
  if (error != cudaSuccess) return error;
  return fused::launch_general(fused::after_sum(f), Pass::kTensor, stream);
}

}  // namespace jax_fp8
