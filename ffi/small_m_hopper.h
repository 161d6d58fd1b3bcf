// The product for few rows of FP8 X on Hopper: the FP8 tensor cores take W as it is in memory, and
// what remains is reading it. With what fused_matmul.h puts behind the product, the codes of D too,
// and for one row with what it puts in front.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// Whether small_m_hopper can run: compute capability 9.0, at most 16 rows of X, both operands in
// E4M3 with tensor or row scales.
bool small_m_hopper_supports(const Product& product, int capability);

// Whether it is faster than cublasLt, for a product that it can run.
bool small_m_hopper_wins(const Product& product);

// Whether it also quantizes X, which is bfloat16: one row, normalized before where the product has
// a norm's weight. x.scale is null, for a dynamic scale, or that of what is multiplied.
bool small_m_hopper_quantizes(const Product& product, int capability);

// `follows`: the last kernel in the stream has written X and its scales; W and the norm's weight
// are older than that kernel. What does not depend on X then starts beside it.
cudaError_t small_m_hopper(const Product& product, cudaStream_t stream, bool follows = false);

}  // namespace jax_fp8
