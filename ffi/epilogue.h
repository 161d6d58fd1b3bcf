// Kernels around a raw product of cublasLt: what it cannot do itself on the device at hand.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// Finishes `count_b` batch entries from `b`, of `rows` rows from `row` each, whose sums lie in
// `raw`: scales, unless the sums are scaled already, bias, activation, cast, amax.
cudaError_t finish_raw(const Product& product, const float* raw, bool scaled, int64_t b,
                       int64_t count_b, int64_t row, int64_t rows, cudaStream_t stream);

// Writes `count` floats: `source` itself (stride 1), or its first element over and over (0).
cudaError_t fill_scales(float* target, const float* source, int stride, int64_t count,
                        cudaStream_t stream);

// The scales of `rows` rows from `row` of batch entry `b` in the layouts of cublasLt's block
// scales, from those of any granularity: for each 128 of K the scales of all rows; and for each 128
// rows, which then have blocks of 128 x 128, the scales along K, filled up to a multiple of 4.
cudaError_t vector_scales(float* target, const Operand& operand, int64_t k, int64_t b, int64_t row,
                          int64_t rows, cudaStream_t stream);
cudaError_t tile_scales(float* target, const Operand& operand, int64_t b, int64_t rows,
                        cudaStream_t stream);

}  // namespace jax_fp8
