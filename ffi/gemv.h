// The product for one to eight rows of X in 16 bits, where its time is that of reading W once: W
// goes from memory straight into registers and is decoded there. What small_m.h runs for so few
// rows.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

constexpr int64_t kGemvM = 8;

// Whether it can have all of X in shared memory, as a norm of X takes.
bool gemv_takes_norm(const Product& product);

// For what small_m_refusal lets pass, with M <= kGemvM and X in bfloat16 or float16. Where it
// follows the kernel that writes X or the residual, it may start before that one has ended, and W
// must be older than all kernels that follow one another there.
cudaError_t gemv(const Product& product, int processors, cudaStream_t stream, bool follows = false);

}  // namespace jax_fp8
