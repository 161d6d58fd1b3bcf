// FP8 weights times 16-bit activations on Hopper: the weights are read in FP8 and decoded, exactly,
// into the registers that the tensor cores take them from; wide weights exist nowhere else.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/product.h"

namespace jax_fp8 {

// Whether decode_hopper can run: compute capability 9.0, x in bfloat16 or float16, w in FP8 with
// tensor or row scales, a wide result, and rows that the copy engine can address.
bool decode_hopper_supports(const Product& product, int capability);

cudaError_t decode_hopper(const Product& product, cudaStream_t stream);

}  // namespace jax_fp8
