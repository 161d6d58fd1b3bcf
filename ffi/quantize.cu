#include "ffi/quantize_kernels.h"

namespace jax_fp8 {

cudaError_t quantize_device(const Quantize& q, cudaStream_t stream) {
  if (q.block_rows == 0) return quantize_tensors(q, stream);
  if (q.block_rows == 128) return quantize_squares(q, stream);
  // A row of 1 to 128 columns is one strip.
  const bool strips = q.block_cols == 128 || (q.cols > 0 && q.cols <= 128);
  return strips ? quantize_strips(q, stream) : quantize_rows(q, stream);
}

}  // namespace jax_fp8
