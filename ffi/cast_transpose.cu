#include "ffi/cast_transpose_kernels.h"
#include "ffi/zero.h"

namespace jax_fp8 {
namespace {

// One layout by the kernels of quantize; `rows` and `cols` are its own.
cudaError_t quantize_layout(const CastTranspose& q, bool transposed, cudaStream_t stream) {
  Quantize one{};
  one.batch = q.batch;
  one.rows = transposed ? q.cols : q.rows;
  one.cols = transposed ? q.rows : q.cols;
  if (q.block_rows == 0) {
    one.batch = q.entries;
    one.cols *= one.rows * (q.batch / q.entries);
    one.rows = 1;
  }
  one.block_rows = q.block_rows, one.block_cols = q.block_cols;
  one.x = q.x, one.x_type = q.x_type;
  one.given = q.given;
  one.data = transposed ? q.transposed : q.straight, one.data_type = q.data_type;
  one.scale = transposed ? q.transposed_scale : q.straight_scale;
  one.amax = q.amax;
  one.scratch = q.scratch;
  one.power_of_two = q.power_of_two;
  const int64_t scales =
      one.batch * scale_extent(one.rows, one.block_rows) * scale_extent(one.cols, one.block_cols);
  return scales == 0 || one.scale == nullptr ? cudaSuccess : quantize_device(one, stream);
}

}  // namespace

cudaError_t cast_transpose_device(const CastTranspose& q, cudaStream_t stream) {
  if (q.batch * q.rows * q.cols == 0) {  // There may be scales, and both layouts are the same.
    const cudaError_t error = quantize_layout(q, false, stream);
    return error == cudaSuccess ? quantize_layout(q, true, stream) : error;
  }
  if (q.transposed == nullptr && q.keys == nullptr && q.known == nullptr) {
    return quantize_layout(q, false, stream);
  }
  const bool is_dynamic = q.given == nullptr && q.known == nullptr && q.block_cols == 0;
  if (is_dynamic) {
    const cudaError_t error = cast_held(q, stream);
    if (error != cudaErrorNotSupported) return error;
  }
  int parts = 0;
  bool follows = true;
  cudaError_t error = cudaSuccess;
  if (q.block_rows == 0 && q.given == nullptr) {
    error = tensor_amaxes(q, &parts, stream);
  } else if (q.block_rows == 0 && q.amax != nullptr) {
    error = zero_words(q.amax, q.entries, stream);
  } else if (has_row_scales(q) && q.known == nullptr) {
    error = row_and_column_amaxes(q, q.straight_scale != nullptr, q.transposed_scale != nullptr,
                                  stream);
  } else {
    follows = false;
  }
  return error == cudaSuccess ? cast_tiles(q, parts, follows, stream) : error;
}

cudaError_t line_amaxes_device(const CastTranspose& q, cudaStream_t stream) {
  return scratch_words(q) == 0 ? cudaSuccess : row_and_column_amaxes(q, true, true, stream);
}

}  // namespace jax_fp8
