// Products of many rows for fused_matmul, by Hopper's tensor cores, with SwiGLU and residual.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// D = [silu of the first half of the columns, times the others:] X W [+ bias] [+ residual] for E4M3
// codes with one scale or one a row, D in bfloat16, and where they are asked for its codes. Sums
// are those of fast accumulation, rounded to bfloat16 before all else is done to them. K goes in
// steps of 16, columns of D in steps of 8, and all starts at multiples of 16 bytes.
bool large_m_hopper_supports(const Product& p, int capability);

cudaError_t large_m_hopper(const Product& p, cudaStream_t stream);

}  // namespace jax_fp8
