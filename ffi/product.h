// A scaled product as plain data: what every implementation of jax_fp8_scaled_matmul takes.
//
//   D[b, m, n] = activation(sum_k X[b, m, k] sx W[b, n, k] sw + bias[n])
#pragma once

#include <cstdint>

#include "ffi/fp8.h"

namespace jax_fp8 {

constexpr int64_t kBlock = 128;  // Edge of a scale block.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// An operand (batch, rows, K) with its scales. block_rows and block_cols say how many rows and
// columns share a scale, 0 standing for all of them. W is FP8; X is FP8, or bfloat16 or float16,
// which has one scale that is 1 (but where small_m_hopper.h quantizes it).
struct Operand {
  const uint8_t* data;
  const float* scale;
  Type type;
  int block_rows;
  int block_cols;
  int64_t scale_cols;   // Scales along K.
  int64_t scale_batch;  // Distance between the scales of batch entries, 0 if they share them.

  bool wide() const { return !is_fp8(type); }
  bool per_tensor() const { return block_rows == 0; }
  bool per_block() const { return block_cols != 0; }

  __host__ __device__ const uint8_t* at(int64_t element) const {
    return data + element * byte_width(type);
  }

  // Index of the first scale of a row. The branches spare the GPU a division.
  __host__ __device__ int64_t scale_index(int64_t batch, int64_t row) const {
    const int64_t scale_row = block_rows == 0 ? 0 : (block_rows == 1 ? row : row / kBlock);
    return batch * scale_batch + scale_row * scale_cols;
  }

  __host__ __device__ float scale_at(int64_t batch, int64_t row, int64_t k_block) const {
    return scale[scale_index(batch, row) + k_block];
  }
};

enum class Activation : int { kNone, kRelu, kGelu };

struct Product {
  int64_t batch, m, n, k;
  Operand x, w;
  const void* bias;  // (n,), or null.
  Type bias_type;
  Activation activation;
  void* d;  // (batch, m, n).
  Type d_type;
  const float* inverse_out_scale;  // One float when D is FP8, else null.
  float* amax;                     // Likewise.
  bool fast;                       // Accumulation.

  // What fused_matmul.h puts around a product, with D in bfloat16; null and false elsewhere.
  const __nv_bfloat16* norm_weight;  // (k,), of an RMSNorm of X, or null.
  float eps;                         // Of the norm.
  bool swiglu;                    // D is (m, n / 2): silu of the first columns, times the others.
  const __nv_bfloat16* residual;  // Of D's shape, added at the end, or null.
  uint8_t* codes;                 // D once more, in E4M3 with that one scale, or null.
  const float* codes_scale;

  __host__ __device__ int64_t d_columns() const { return swiglu ? n / 2 : n; }
  bool blocks() const { return x.per_block() || w.per_block(); }
};

}  // namespace jax_fp8
