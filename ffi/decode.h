// The product on 16-bit tensor cores: both FP8 formats are exact in float16 and in bfloat16, so the
// tiles are decoded on their way to them. For every GPU from 7.5 on, and every combination of
// types, scales and shapes; it is what runs where cublasLt has no FP8 product, and when X is 16
// bits wide.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "ffi/product.h"

namespace jax_fp8 {

// Why a GPU of this compute capability (90 for 9.0) cannot run it; empty if it can.
std::string decode_refusal(const Product& product, int capability);

cudaError_t decode_matmul(const Product& product, cudaStream_t stream);

}  // namespace jax_fp8
