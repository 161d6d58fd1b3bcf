// Quantization of (batch, rows, columns) and of its transpose, from one read.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/fp8.h"

namespace jax_fp8 {

// A layout that is not wanted has null for its data and its scales. block_rows and block_cols say
// how many rows and columns of a layout share a scale, 0 standing for all.
struct CastTranspose {
  int64_t batch, rows, cols;
  int64_t entries;  // Equal parts of the batch, each with a tensor scale and a key of its own.
  int block_rows, block_cols;
  bool power_of_two;
  const void* x;
  Type x_type;
  const float* given;     // Static scales of whole tensors, or null for dynamic ones.
  const uint32_t* known;  // Amaxes for row scales, as in the scratch, or null: found here.
  const uint32_t* keys;   // Two words for each entry, or null for rounding to nearest even.
  uint8_t *straight, *transposed;
  Type data_type;
  float *straight_scale, *transposed_scale;
  float* amax;        // Of whole tensors; null otherwise, and may be with static scales.
  uint32_t* scratch;  // scratch_words of any content.
};

// For a dynamic tensor: what its thread blocks find, an array for each entry. Row scales: the amax
// of each row, then of each column, as the bits of floats.
constexpr int kMaxParts = 1024;

inline bool has_row_scales(const CastTranspose& q) {
  return q.block_rows == 1 && q.block_cols == 0;
}

inline int64_t scratch_words(const CastTranspose& q) {
  if (q.block_rows == 0) return q.given == nullptr ? q.entries * kMaxParts : 0;
  return has_row_scales(q) && q.known == nullptr ? q.batch * (q.rows + q.cols) : 0;
}

void cast_transpose_host(const CastTranspose& q);
cudaError_t cast_transpose_device(const CastTranspose& q, cudaStream_t stream);

// Only the amaxes, of all rows and then of all columns, into the scratch.
void line_amaxes_host(const CastTranspose& q);
cudaError_t line_amaxes_device(const CastTranspose& q, cudaStream_t stream);

}  // namespace jax_fp8
