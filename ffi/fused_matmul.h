// A product with what stands around it in a transformer, without a batch, W in E4M3
// with tensor or row scales, and all else in bfloat16:
//
//   D = residual + swiglu(rms_norm(X) W^T + bias)
//
// gemv.h has it as one kernel, which multiplies X by the norm's weight in bfloat16, and the sums by
// 1 / RMS. Or the normalized X is quantized to E4M3 with scales of its rows: small_m_hopper.h has
// all behind that for few rows, and reads W while the quantization runs, or has that too, of one
// row; large_m_hopper.h is for many. X may be quantized with one scale that is given, too. Here are
// the steps before and after a bare product, for where neither runs: what they round to bfloat16 is
// the normalized X.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// (m, k) of the normalized X.
void normalize_host(const Product& product, __nv_bfloat16* normalized);
cudaError_t normalize_device(const Product& product, __nv_bfloat16* normalized,
                             cudaStream_t stream);

// D, of the (m, n) of the product with its bias, in float32 or bfloat16.
void finish_host(const Product& product, const void* sums, Type type);
cudaError_t finish_device(const Product& product, const void* sums, Type type, cudaStream_t stream);

}  // namespace jax_fp8
