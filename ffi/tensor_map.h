// Descriptions of arrays for the copy engine (TMA).
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include "ffi/fp8.h"

namespace jax_fp8 {

// The driver's function, found at run time, since the module must load where there is no driver;
// null where the driver has none.
inline PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

inline CUtensorMapDataType map_type(Type type) {
  switch (type) {
    case Type::kBF16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Type::kF16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

// Describes (batch, rows, columns), to be copied in boxes whose rows have 64 or 128 bytes and are
// swizzled as far. What lies outside reads as zeros.
inline bool encode_map(CUtensorMap* map, const void* data, Type type, int64_t batch, int64_t rows,
                       int64_t columns, int box_rows, int box_columns) {
  static const auto encode = find_encode();
  if (encode == nullptr) return false;
  const auto width = static_cast<uint64_t>(byte_width(type));
  const cuuint64_t dims[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                             static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {dims[0] * width, dims[0] * dims[1] * width};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows),
                            1};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto swizzle =
      box_columns * width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  return encode(map, map_type(type), 3, const_cast<void*>(data), dims, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace jax_fp8
