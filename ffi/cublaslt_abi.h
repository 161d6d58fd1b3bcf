// The part of cublasLt's binary interface that FP8 products use, declared by its documentation.
//
// The real header comes only with a wheel of 423 MB, and what is here has not changed from 12.9 to
// 13.10. tests/cublaslt_abi.cc asserts each value against the real header where one is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace jax_fp8::lt {

using Handle = void*;
using MatmulDesc = void*;
using Layout = void*;
using Preference = void*;
using Status = int;
constexpr Status kSuccess = 0;

struct Algo {
  uint64_t data[8];
};

struct HeuristicResult {
  Algo algo;
  size_t workspace_size;
  Status state;
  float waves_count;
  int reserved[4];
};

// cudaDataType_t, cublasComputeType_t, cublasOperation_t
constexpr int kTypeF32 = 0, kTypeF16 = 2, kTypeBF16 = 14, kTypeE4M3 = 28, kTypeE5M2 = 29;
constexpr int kComputeF32 = 68;
constexpr int32_t kOpT = 1;

// cublasLtMatmulDescAttributes_t
enum DescAttribute : int {
  kDescTransA = 3,
  kDescEpilogue = 7,
  kDescBiasPointer = 8,
  kDescAScalePointer = 17,
  kDescBScalePointer = 18,
  kDescDScalePointer = 20,
  kDescAmaxDPointer = 21,
  kDescFastAccum = 25,
  kDescBiasDataType = 26,
  kDescAScaleMode = 31,
  kDescBScaleMode = 32,
};
constexpr int32_t kScaleScalar = 0;
// cublasLtMatmulMatrixScale_t: one scale for each row of A and each column of B; for each 128 of K
// of those; for each block of 128 x 128.
constexpr int32_t kScaleOuterVec = 3, kScaleVec128 = 4, kScaleBlock128x128 = 5;

// cublasLtEpilogue_t: flags that add up.
constexpr uint32_t kEpilogueDefault = 1, kEpilogueRelu = 2, kEpilogueBias = 4, kEpilogueGelu = 32;

// cublasLtMatrixLayoutAttribute_t
enum LayoutAttribute : int { kLayoutBatchCount = 5, kLayoutBatchStride = 6 };

// cublasLtMatmulPreferenceAttributes_t
enum PreferenceAttribute : int {
  kPrefMaxWorkspace = 1,
  kPrefMinAlignmentA = 5,
  kPrefMinAlignmentB = 6,
  kPrefMinAlignmentC = 7,
  kPrefMinAlignmentD = 8,
};

// cublasLtMatmulAlgoConfigAttributes_t
enum AlgoAttribute : int {
  kAlgoId = 0,
  kAlgoTile = 1,
  kAlgoSplitK = 2,
  kAlgoReductionScheme = 3,
  kAlgoSwizzle = 4,
  kAlgoCustom = 5,
  kAlgoStages = 6,
  kAlgoInnerShape = 7,
  kAlgoCluster = 8,
};

// The functions, as found in the library.
struct Api {
  size_t (*GetVersion)();
  const char* (*GetStatusString)(Status);
  Status (*Create)(Handle*);
  Status (*MatmulDescCreate)(MatmulDesc*, int compute_type, int scale_type);
  Status (*MatmulDescDestroy)(MatmulDesc);
  Status (*MatmulDescSetAttribute)(MatmulDesc, int attribute, const void*, size_t);
  Status (*MatrixLayoutCreate)(Layout*, int type, uint64_t rows, uint64_t cols, int64_t ld);
  Status (*MatrixLayoutDestroy)(Layout);
  Status (*MatrixLayoutSetAttribute)(Layout, int attribute, const void*, size_t);
  Status (*MatmulPreferenceCreate)(Preference*);
  Status (*MatmulPreferenceDestroy)(Preference);
  Status (*MatmulPreferenceSetAttribute)(Preference, int attribute, const void*, size_t);
  Status (*MatmulAlgoGetHeuristic)(Handle, MatmulDesc, Layout a, Layout b, Layout c, Layout d,
                                   Preference, int requested, HeuristicResult*, int* found);
  Status (*MatmulAlgoConfigGetAttribute)(const Algo*, int attribute, void*, size_t,
                                         size_t* written);
  Status (*MatmulAlgoConfigSetAttribute)(Algo*, int attribute, const void*, size_t);
  Status (*MatmulAlgoCheck)(Handle, MatmulDesc, Layout a, Layout b, Layout c, Layout d, const Algo*,
                            HeuristicResult*);
  Status (*Matmul)(Handle, MatmulDesc, const void* alpha, const void* a, Layout, const void* b,
                   Layout, const void* beta, const void* c, Layout, void* d, Layout, const Algo*,
                   void* workspace, size_t workspace_size, void* stream);
};

}  // namespace jax_fp8::lt
