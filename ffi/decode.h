// The product on 16-bit tensor cores: both FP8 formats are exact in float16, so the tiles are
// decoded on their way into shared memory. For every GPU from 7.5 on, and every combination of
// types, scales and shapes; it is what runs where cublasLt has no FP8 product.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

cudaError_t decode_matmul(const Product& product, cudaStream_t stream);

}  // namespace jax_fp8
