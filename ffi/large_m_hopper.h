// Products of many rows for fused_matmul, by Hopper's tensor cores, with SwiGLU and residual.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// D = [silu of the first half of the columns, times the others:] X W [+ bias] [+ residual] for E4M3
// codes with one scale or one a row, D in bfloat16; sums are those of fast accumulation. K goes in
// steps of 16, columns of D in steps of 8.
bool large_m_hopper_supports(const Product& p, int capability);

cudaError_t large_m_hopper(const Product& p, cudaStream_t stream);

}  // namespace jax_fp8
