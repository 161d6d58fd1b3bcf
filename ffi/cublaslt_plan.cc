#include "ffi/cublaslt_plan.h"

#include <map>
#include <memory>
#include <mutex>

#include "ffi/cublaslt_library.h"

namespace jax_fp8::lt {

struct Plan {
  Handle handle = nullptr;
  std::mutex mutex;  // Of the descriptor, which carries the pointers of a call.
  MatmulDesc desc = nullptr;
  Layout w = nullptr, x = nullptr, d = nullptr, c = nullptr;
  Algo algo{};
  int64_t workspace = 0;        // That the algorithm asks for.
  int64_t given_workspace = 0;  // That it may have.
  std::string algorithm;
  std::string refusal;  // Why there is no algorithm; empty when there is one.
};

namespace {

constexpr int kCandidates = 8;

int lt_type(Type type) {
  switch (type) {
    case Type::kF32:
      return kTypeF32;
    case Type::kBF16:
      return kTypeBF16;
    case Type::kF16:
      return kTypeF16;
    case Type::kE4M3:
      return kTypeE4M3;
    case Type::kE5M2:
      return kTypeE5M2;
  }
  return -1;
}

// Splitting K unevenly gave wrong results (releases 12.6.3 to 13.4).
bool split_is_safe(const Api& api, const Algo& algo, int64_t k) {
  int32_t split = 0;
  size_t written = 0;
  api.MatmulAlgoConfigGetAttribute(&algo, kAlgoSplitK, &split, sizeof split, &written);
  const size_t version = api.GetVersion();
  const bool affected = version >= 120603 && version < 130500;
  return !affected || split <= 1 || k % (int64_t{split} * 16) == 0;
}

// The same algorithm without splitting K, if it exists.
bool unsplit(const Api& api, const Plan& plan, HeuristicResult* candidate) {
  Algo algo = candidate->algo;
  const int32_t split = 1;
  const uint32_t scheme = 0;  // No reduction.
  Status status = api.MatmulAlgoConfigSetAttribute(&algo, kAlgoSplitK, &split, sizeof split);
  status |= api.MatmulAlgoConfigSetAttribute(&algo, kAlgoReductionScheme, &scheme, sizeof scheme);
  if (status != kSuccess) return false;
  HeuristicResult checked{};
  status =
      api.MatmulAlgoCheck(plan.handle, plan.desc, plan.w, plan.x, plan.c, plan.d, &algo, &checked);
  if (status != kSuccess || checked.state != kSuccess ||
      static_cast<int64_t>(checked.workspace_size) > plan.given_workspace) {
    return false;
  }
  *candidate = checked;
  candidate->algo = algo;
  return true;
}

std::string describe(const Api& api, const Algo& algo) {
  const auto get = [&](int attribute) {
    int64_t value = 0;  // The attributes are of 2 and 4 bytes.
    size_t written = 0;
    if (api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 4, &written) != kSuccess) {
      api.MatmulAlgoConfigGetAttribute(&algo, attribute, &value, 2, &written);
    }
    return std::to_string(value);
  };
  return "id " + get(kAlgoId) + ", tile " + get(kAlgoTile) + ", stages " + get(kAlgoStages) +
         ", cluster " + get(kAlgoCluster) + ", split-k " + get(kAlgoSplitK);
}

template <typename T>
Status set(const Api& api, MatmulDesc desc, DescAttribute attribute, T value) {
  return api.MatmulDescSetAttribute(desc, attribute, &value, sizeof value);
}

// Sets what the call has; what it has not stays null, as for every call of the same plan.
Status set_pointers(const Api& api, MatmulDesc desc, const Pointers& at) {
  Status status = kSuccess;
  const auto point = [&](DescAttribute attribute, const void* pointer) {
    if (pointer != nullptr) status |= set(api, desc, attribute, pointer);
  };
  point(kDescAScalePointer, at.w_scale);
  point(kDescBScalePointer, at.x_scale);
  point(kDescBiasPointer, at.bias);
  point(kDescDScalePointer, at.out_scale);
  point(kDescAmaxDPointer, at.amax);
  return status;
}

Layout make_layout(const Api& api, Type type, int64_t rows, int64_t cols, int64_t batch,
                   int64_t stride, Status* status) {
  Layout layout = nullptr;
  *status |= api.MatrixLayoutCreate(&layout, lt_type(type), rows, cols, rows);
  if (batch > 1 && *status == kSuccess) {
    const auto count = static_cast<int32_t>(batch);
    *status |= api.MatrixLayoutSetAttribute(layout, kLayoutBatchCount, &count, sizeof count);
    *status |= api.MatrixLayoutSetAttribute(layout, kLayoutBatchStride, &stride, sizeof stride);
  }
  return layout;
}

// Statuses are or-ed: any that is not kSuccess (0) shows. The heuristics look at the pointers: with
// row scales and none set they find nothing.
void make_plan(const Api& api, const Problem& key, const Pointers& at, Plan* plan) {
  Status status = api.MatmulDescCreate(&plan->desc, kComputeF32, kTypeF32);
  if (status == kSuccess) {
    status |= set(api, plan->desc, kDescTransA, kOpT);
    status |= set(api, plan->desc, kDescFastAccum, static_cast<int8_t>(key.fast));
    uint32_t epilogue = key.activation == Activation::kRelu   ? kEpilogueRelu
                        : key.activation == Activation::kGelu ? kEpilogueGelu
                                                              : 0;
    if (key.has_bias) {
      epilogue |= kEpilogueBias;
      status |= set(api, plan->desc, kDescBiasDataType, int32_t{lt_type(key.bias)});
    }
    status |= set(api, plan->desc, kDescEpilogue, epilogue ? epilogue : kEpilogueDefault);
    if (key.vectors) {
      status |= set(api, plan->desc, kDescAScaleMode, kScaleOuterVec);
      status |= set(api, plan->desc, kDescBScaleMode, kScaleOuterVec);
    }
    status |= set_pointers(api, plan->desc, at);
  }
  plan->w = make_layout(api, key.w, key.k, key.n, key.batch, key.k * key.n, &status);
  plan->x = make_layout(api, key.x, key.k, key.m, key.batch, key.k * key.m, &status);
  plan->d = make_layout(api, key.d, key.n, key.m, key.batch, key.n * key.m, &status);
  // C is not read, but its type must be one that goes with an FP8 D.
  plan->c = make_layout(api, is_fp8(key.d) ? Type::kBF16 : key.d, key.n, key.m, key.batch,
                        key.n * key.m, &status);
  Preference preference = nullptr;
  status |= api.MatmulPreferenceCreate(&preference);
  if (status != kSuccess) {
    plan->refusal = std::string("cublasLt refuses the description: ") + api.GetStatusString(status);
    return;
  }
  const auto prefer = [&](PreferenceAttribute attribute, auto value) {
    status |= api.MatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value);
  };
  prefer(kPrefMaxWorkspace, static_cast<uint64_t>(key.workspace));
  prefer(kPrefMinAlignmentA, static_cast<uint32_t>(key.w_alignment));
  prefer(kPrefMinAlignmentB, static_cast<uint32_t>(key.x_alignment));
  prefer(kPrefMinAlignmentC, static_cast<uint32_t>(key.d_alignment));
  prefer(kPrefMinAlignmentD, static_cast<uint32_t>(key.d_alignment));

  HeuristicResult found[kCandidates];
  int count = 0;
  if (status == kSuccess) {
    status = api.MatmulAlgoGetHeuristic(plan->handle, plan->desc, plan->w, plan->x, plan->c,
                                        plan->d, preference, kCandidates, found, &count);
  }
  if (status != kSuccess) count = 0;
  const HeuristicResult* chosen = nullptr;
  for (int i = 0; i < count && chosen == nullptr; ++i) {
    if (found[i].state == kSuccess && split_is_safe(api, found[i].algo, key.k)) chosen = &found[i];
  }
  for (int i = 0; i < count && chosen == nullptr; ++i) {
    if (found[i].state == kSuccess && unsplit(api, *plan, &found[i])) chosen = &found[i];
  }
  api.MatmulPreferenceDestroy(preference);
  if (chosen != nullptr) {
    plan->algo = chosen->algo;
    plan->workspace = static_cast<int64_t>(chosen->workspace_size);
    plan->algorithm = describe(api, chosen->algo);
    return;
  }
  plan->refusal = "cublasLt " + version_string(api.GetVersion()) + " has no algorithm for it" +
                  (status == kSuccess ? "" : std::string(": ") + api.GetStatusString(status));
}

// Handles and plans live as long as the process: at its end the driver may be gone before them.
struct Cache {
  std::mutex mutex;
  std::map<int, Handle> handles;
  std::map<Problem, std::unique_ptr<Plan>> plans;
};

Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

}  // namespace

int alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer) | 256;
  return static_cast<int>(address & -address);
}

Plan* find_plan(const Api& api, const Problem& key, const Pointers& at, cudaStream_t stream,
                std::string* reason) {
  const std::lock_guard lock(cache().mutex);
  std::unique_ptr<Plan>& plan = cache().plans[key];
  if (plan != nullptr) return plan.get();
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess ||
      capturing != cudaStreamCaptureStatusNone) {
    *reason = "its plan was not made before a graph was captured";
    return nullptr;
  }
  Handle& handle = cache().handles[key.device];
  if (handle == nullptr) {
    if (const Status status = api.Create(&handle); status != kSuccess) {
      *reason = std::string("cublasLtCreate: ") + api.GetStatusString(status);
      return nullptr;
    }
  }
  plan = std::make_unique<Plan>();
  plan->handle = handle;
  plan->given_workspace = key.workspace;
  make_plan(api, key, at, plan.get());
  return plan.get();
}

const std::string& refusal(const Plan& plan) { return plan.refusal; }
const std::string& algorithm(const Plan& plan) { return plan.algorithm; }
int64_t workspace(const Plan& plan) { return plan.workspace; }

std::string multiply(const Api& api, Plan* plan, const Pointers& at, void* workspace,
                     cudaStream_t stream) {
  const float one = 1.0f, zero = 0.0f;
  const std::lock_guard lock(plan->mutex);
  Status status = set_pointers(api, plan->desc, at);
  if (status == kSuccess) {
    status = api.Matmul(plan->handle, plan->desc, &one, at.w, plan->w, at.x, plan->x, &zero,
                        nullptr, plan->c, at.d, plan->d, &plan->algo, workspace,
                        static_cast<size_t>(plan->given_workspace), stream);
  }
  if (status == kSuccess) return "";
  return std::string("cublasLtMatmul: ") + api.GetStatusString(status) + " (" + plan->algorithm +
         ")";
}

}  // namespace jax_fp8::lt
