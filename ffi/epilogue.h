// Kernels around a raw product of cublasLt: what it cannot do itself on the device at hand.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// Finishes `count_b` batch entries from `b`, of `rows` rows from `row` each, whose sums lie in
// `raw` without scales: scales, bias, activation, cast, amax.
cudaError_t finish_raw(const Product& product, const float* raw, int64_t b, int64_t count_b,
                       int64_t row, int64_t rows, cudaStream_t stream);

// Writes `count` floats: `source` itself (stride 1), or its first element over and over (0).
cudaError_t fill_scales(float* target, const float* source, int stride, int64_t count,
                        cudaStream_t stream);

}  // namespace jax_fp8
