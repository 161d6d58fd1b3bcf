// Quantization of (batch, rows, columns) to FP8: on the host and on the device.
#pragma once

#include <cuda_runtime_api.h>

#include "ffi/fp8.h"

namespace jax_fp8 {

// block_rows and block_cols say how many rows and columns share a scale, 0 standing for all.
struct Quantize {
  int64_t batch, rows, cols;
  int block_rows, block_cols;
  const void* x;
  Type x_type;
  const float* given;  // Static scales, or null for dynamic ones.
  uint8_t* data;
  Type data_type;
  float* scale;
  float* amax;        // May be null with static scales.
  uint32_t* scratch;  // kScratchWords of any content; may be null where there is no need.
  bool power_of_two;  // Dynamic scales are rounded up to one.
  // Whether it may start while the kernel in front still runs, as follow.h has it.
  bool follows;
};

// The thread blocks of a tensor whose scale is sought tell each other their amax.
constexpr int kScratchWords = 1024;

inline bool needs_scratch(const Quantize& q) { return q.block_rows == 0 && q.given == nullptr; }

// The shape of the scales: (batch, scale_rows, scale_cols).
inline int64_t scale_extent(int64_t extent, int block) {
  return block == 0 ? 1 : (extent + block - 1) / block;
}

void quantize_host(const Quantize& q);
cudaError_t quantize_device(const Quantize& q, cudaStream_t stream);

}  // namespace jax_fp8
