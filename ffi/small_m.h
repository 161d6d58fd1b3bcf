// The product for few rows of X (M <= 64), where its time is that of reading W once: W streams from
// memory through a ring of asynchronous copies that each warp keeps for itself, and is decoded in
// registers on its way to the 16-bit tensor cores. X is FP8, or bfloat16 or float16. For up to 16
// rows of E4M3 on Hopper small_m_hopper.h takes over, for up to eight of 16 bits gemv.h.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "ffi/product.h"

namespace jax_fp8 {

// Why it cannot compute the product on a GPU of this compute capability (90 for 9.0); empty if it
// can.
std::string small_m_refusal(const Product& product, int capability);

// Whether it is faster than cublasLt, for a product that both can compute.
bool small_m_wins(const Product& product, int capability);

// `p.x.data` are 16-bit elements where `p.x.type` says so. Where it follows the kernel that writes
// X or the residual, it may start before that one has ended.
cudaError_t small_m_matmul(const Product& product, int capability, cudaStream_t stream,
                           bool follows = false);

}  // namespace jax_fp8
