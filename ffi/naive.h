// The naive product, on the host and on the device: decode, multiply, add in float32 over K, one
// output element at a time. It is the fallback and the oracle, and it stays simple.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/finish.h"

namespace jax_fp8 {

// `decode_x` and `decode_w` map the address and the index of an element to its float value. FP8
// values multiply exactly in float32, by each other and by 16-bit ones inside of its range, so the
// host and the device round alike, in the additions alone.
template <typename DecodeX, typename DecodeW>
__host__ __device__ inline float naive_element(const Product& p, int64_t b, int64_t m, int64_t n,
                                               DecodeX decode_x, DecodeW decode_w) {
  const uint8_t* x = p.x.at((b * p.m + m) * p.k);
  const uint8_t* w = p.w.at((b * p.n + n) * p.k);
  const bool blocks = p.x.block_cols != 0 || p.w.block_cols != 0;
  const int64_t step = blocks ? kBlock : p.k;
  float total = 0.0f;
  for (int64_t start = 0; start < p.k; start += step) {
    const int64_t end = start + step < p.k ? start + step : p.k;
    const int64_t k_block = start / kBlock;
    float sum = 0.0f;
    for (int64_t k = start; k < end; ++k) sum += decode_x(x, k) * decode_w(w, k);
    total += apply_scales(sum, p.x.scale_at(b, m, p.x.block_cols ? k_block : 0),
                          p.w.scale_at(b, n, p.w.block_cols ? k_block : 0));
  }
  return finish(p, total, n);
}

void naive_host(const Product& product);
cudaError_t naive_device(const Product& product, cudaStream_t stream);

// Gives NaN to those elements of an FP8 result of cublasLt that are infinite before the cast,
// which cublasLt saturates to a finite code. Ends at once when the amax is finite.
cudaError_t repair_infinities(const Product& product, cudaStream_t stream);

}  // namespace jax_fp8
