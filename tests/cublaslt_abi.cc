// Compiled, and not run, by test_cublaslt_abi.py: what ffi/cublaslt_abi.h says of cublasLt against
// what its own header says.
#include "ffi/cublaslt_abi.h"

#include <cublasLt.h>

#include <type_traits>

namespace lt = jax_fp8::lt;

// --- Values ---

#define SAME(ours, theirs) \
  static_assert(static_cast<long long>(lt::ours) == static_cast<long long>(theirs))

SAME(kSuccess, CUBLAS_STATUS_SUCCESS);

SAME(kTypeF32, CUDA_R_32F);
SAME(kTypeF16, CUDA_R_16F);
SAME(kTypeBF16, CUDA_R_16BF);
SAME(kTypeE4M3, CUDA_R_8F_E4M3);
SAME(kTypeE5M2, CUDA_R_8F_E5M2);
SAME(kComputeF32, CUBLAS_COMPUTE_32F);
SAME(kOpT, CUBLAS_OP_T);

SAME(kDescTransA, CUBLASLT_MATMUL_DESC_TRANSA);
SAME(kDescEpilogue, CUBLASLT_MATMUL_DESC_EPILOGUE);
SAME(kDescBiasPointer, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
SAME(kDescAScalePointer, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER);
SAME(kDescBScalePointer, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER);
SAME(kDescDScalePointer, CUBLASLT_MATMUL_DESC_D_SCALE_POINTER);
SAME(kDescAmaxDPointer, CUBLASLT_MATMUL_DESC_AMAX_D_POINTER);
SAME(kDescFastAccum, CUBLASLT_MATMUL_DESC_FAST_ACCUM);
SAME(kDescBiasDataType, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
SAME(kDescAScaleMode, CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
SAME(kDescBScaleMode, CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
SAME(kScaleScalar, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F);
SAME(kScaleOuterVec, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
SAME(kScaleVec128, CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F);
SAME(kScaleBlock128x128, CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F);

SAME(kEpilogueDefault, CUBLASLT_EPILOGUE_DEFAULT);
SAME(kEpilogueRelu, CUBLASLT_EPILOGUE_RELU);
SAME(kEpilogueBias, CUBLASLT_EPILOGUE_BIAS);
SAME(kEpilogueGelu, CUBLASLT_EPILOGUE_GELU);
SAME(kEpilogueRelu | lt::kEpilogueBias, CUBLASLT_EPILOGUE_RELU_BIAS);
SAME(kEpilogueGelu | lt::kEpilogueBias, CUBLASLT_EPILOGUE_GELU_BIAS);

SAME(kLayoutBatchCount, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
SAME(kLayoutBatchStride, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET);

SAME(kPrefMaxWorkspace, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
SAME(kPrefMinAlignmentA, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
SAME(kPrefMinAlignmentB, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
SAME(kPrefMinAlignmentC, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
SAME(kPrefMinAlignmentD, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);

SAME(kAlgoId, CUBLASLT_ALGO_CONFIG_ID);
SAME(kAlgoTile, CUBLASLT_ALGO_CONFIG_TILE_ID);
SAME(kAlgoSplitK, CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
SAME(kAlgoReductionScheme, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME);
SAME(kAlgoSwizzle, CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING);
SAME(kAlgoCustom, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION);
SAME(kAlgoStages, CUBLASLT_ALGO_CONFIG_STAGES_ID);
SAME(kAlgoInnerShape, CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID);
SAME(kAlgoCluster, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID);

// --- Structs ---

#define SAME_FIELD(ours, theirs)                                    \
  static_assert(offsetof(lt::HeuristicResult, ours) ==              \
                offsetof(cublasLtMatmulHeuristicResult_t, theirs)); \
  static_assert(sizeof(lt::HeuristicResult::ours) ==                \
                sizeof(cublasLtMatmulHeuristicResult_t::theirs))

static_assert(sizeof(lt::Algo) == sizeof(cublasLtMatmulAlgo_t));
static_assert(alignof(lt::Algo) == alignof(cublasLtMatmulAlgo_t));
static_assert(sizeof(lt::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
SAME_FIELD(algo, algo);
SAME_FIELD(workspace_size, workspaceSize);
SAME_FIELD(state, state);
SAME_FIELD(waves_count, wavesCount);
SAME_FIELD(reserved, reserved);

// --- Functions ---

// Passed alike: the types differ in name alone, as an opaque pointer or an enum does.
template <typename Ours, typename Theirs>
constexpr bool passed_alike() {
  if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
    using To = std::remove_pointer_t<Ours>;
    return std::is_void_v<To> ||
           std::is_const_v<To> == std::is_const_v<std::remove_pointer_t<Theirs>>;
  } else {
    return sizeof(Ours) == sizeof(Theirs) && (std::is_integral_v<Ours> || std::is_enum_v<Ours>) &&
           (std::is_integral_v<Theirs> || std::is_enum_v<Theirs>);
  }
}

template <typename Ours, typename Theirs>
struct Same : std::false_type {};

template <typename Result, typename... Ours, typename OtherResult, typename... Theirs>
struct Same<Result (*)(Ours...), OtherResult (*)(Theirs...)> {
  static constexpr bool count = sizeof...(Ours) == sizeof...(Theirs);
  static constexpr bool all() {
    if constexpr (count) return (passed_alike<Ours, Theirs>() && ...);
    return false;
  }
  static constexpr bool value = passed_alike<Result, OtherResult>() && all();
};

#define SAME_FUNCTION(name) \
  static_assert(Same<decltype(lt::Api::name), decltype(&cublasLt##name)>::value)

SAME_FUNCTION(GetVersion);
SAME_FUNCTION(GetStatusString);
SAME_FUNCTION(Create);
SAME_FUNCTION(MatmulDescCreate);
SAME_FUNCTION(MatmulDescDestroy);
SAME_FUNCTION(MatmulDescSetAttribute);
SAME_FUNCTION(MatrixLayoutCreate);
SAME_FUNCTION(MatrixLayoutDestroy);
SAME_FUNCTION(MatrixLayoutSetAttribute);
SAME_FUNCTION(MatmulPreferenceCreate);
SAME_FUNCTION(MatmulPreferenceDestroy);
SAME_FUNCTION(MatmulPreferenceSetAttribute);
SAME_FUNCTION(MatmulAlgoGetHeuristic);
SAME_FUNCTION(MatmulAlgoConfigGetAttribute);
SAME_FUNCTION(MatmulAlgoConfigSetAttribute);
SAME_FUNCTION(MatmulAlgoCheck);
SAME_FUNCTION(Matmul);
